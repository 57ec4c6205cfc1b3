// Where a read-out comes from: the share of every earlier token, exact while keys and gates are
// held fixed. It is hamt.analysis.contributions for one token after the other.
//
// With the bound items x_j, the gates and the read weights r_t of a layer, the mixture of slots
// that token t reads is Σ_j c_tj x_j, and c follows from the recurrence backwards: λ = r_t, and for
// j = t, t-1, …
//
//   gated, convex   c_tj = Σ_s λ[s] w_j[s]         λ ← α_j ⊙ λ
//   delta           c_tj = β_j Σ_s λ[s] w_j[s]     λ ← α_j ⊙ (λ - w_j c_tj)
//
// A boundary between two tokens has multiplied the slots by a matrix T: λ ← Tᵀ λ. The share of
// token j is c_tj ⟨x_j, q_t⟩ with q_t = m_t / |m_t|², m_t the mixture: shares add up to 1.
"use strict";

// Of each head, by the last word of an output's name.
const KEPT = ["bound", "sought", "read", "write", "keep", "beta"];

/** What the memories of all layers did with the last tokens; older ones are forgotten. */
export class Record {
  /**
   * @param layers of each memory {name, heads, slots, features, strength, mixes}
   * @param window how many tokens are kept
   * @param readsFirst whether a token reads before it writes
   */
  constructor(layers, window, readsFirst = false) {
    this.window = window;
    this.readsFirst = readsFirst;
    this.layers = layers.map((layer) => {
      const sizes = {bound: layer.features, sought: layer.features, beta: 1};
      const names = KEPT.filter((name) => name !== "beta" || layer.strength);
      const kept = {};
      for (const name of names) {
        const size = layer.heads * (sizes[name] ?? layer.slots);
        kept[name] = {size, numbers: new Float32Array(size * window)};
      }
      return {...layer, kept, mixings: new Map()};
    });
    this.length = 0;  // tokens read, those that are forgotten included
  }

  reset() {
    this.length = 0;
    for (const layer of this.layers) layer.mixings.clear();
  }

  /** The first token that is still known. */
  get begin() {
    return Math.max(0, this.length - this.window);
  }

  /** Bytes that are kept, whatever was read. */
  get bytes() {
    const all = this.layers.flatMap((layer) => Object.values(layer.kept));
    return all.reduce((sum, {numbers}) => sum + numbers.byteLength, 0);
  }

  /**
   * Take over what a token left.
   * @param outputs a Float32Array for each name, such as "trace.layers.0.bound"
   * @param boundary whether something is done to the slots after this token
   */
  add(outputs, boundary = false) {
    const place = this.length % this.window;
    for (const layer of this.layers) {
      for (const [name, {size, numbers}] of Object.entries(layer.kept)) {
        numbers.set(outputs[`trace.${layer.name}.${name}`], place * size);
      }
      layer.mixings.delete(this.length - this.window);
      if (boundary && layer.mixes) {
        layer.mixings.set(this.length, outputs[`trace.${layer.name}.mixing`].slice());
      }
    }
    this.length += 1;
  }

  /**
   * What the read-out of a layer at a token came from.
   * @param index which of the layers
   * @param query the token, from `begin` on
   * @returns {begin, shares, before}: means over heads of the share of each token from `begin` to
   *   the query, and of what came before them. A read-out of nothing has no shares.
   */
  shares(index, query) {
    const {begin} = this;
    if (query < begin || query >= this.length) throw new RangeError(`token ${query} is not known`);
    const layer = this.layers[index], shares = new Float64Array(query - begin + 1);
    let heads = 0;
    for (let head = 0; head < layer.heads; head++) {
      const sought = this.#of(layer, "sought", query, head, layer.features);
      if (!sought.some((x) => x !== 0)) continue;
      heads += 1;
      this.#head(layer, head, query, sought, shares);
    }
    for (let i = 0; i < shares.length; i++) shares[i] /= layer.heads;
    return {begin, shares, before: heads / layer.heads - shares.reduce((a, b) => a + b, 0)};
  }

  /** The means over all layers. */
  meanShares(query) {
    const found = this.layers.map((_, index) => this.shares(index, query));
    const mean = (of) => found.reduce((sum, each) => sum + of(each), 0) / found.length;
    const shares = found[0].shares.map((_, i) => mean((each) => each.shares[i]));
    return {begin: found[0].begin, shares, before: mean((each) => each.before)};
  }

  #head(layer, head, query, sought, shares) {
    const {slots, features} = layer, begin = this.begin;
    let weight = Float64Array.from(this.#of(layer, "read", query, head, slots));
    for (let j = query; j >= begin; j--) {
      if (j < query && layer.mixings.has(j)) {
        weight = transposed(layer.mixings.get(j), head * slots * slots, weight);
      }
      if (j === query && this.readsFirst) continue;
      const write = this.#of(layer, "write", j, head, slots);
      const keep = this.#of(layer, "keep", j, head, slots);
      let coefficient = dot(weight, write);
      if (layer.strength) coefficient *= this.#of(layer, "beta", j, head, 1)[0];
      const erased = layer.strength ? coefficient : 0;
      for (let s = 0; s < slots; s++) weight[s] = keep[s] * (weight[s] - write[s] * erased);
      shares[j - begin] += coefficient * dot(sought, this.#of(layer, "bound", j, head, features));
    }
  }

  #of(layer, name, token, head, count) {
    const {size, numbers} = layer.kept[name];
    const start = token % this.window * size + head * count;
    return numbers.subarray(start, start + count);
  }
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** Tᵀ λ, with T row by row in `numbers` from `start` on. */
function transposed(numbers, start, weight) {
  const size = weight.length, result = new Float64Array(size);
  for (let row = 0; row < size; row++) {
    for (let column = 0; column < size; column++) {
      result[column] += numbers[start + row * size + column] * weight[row];
    }
  }
  return result;
}
