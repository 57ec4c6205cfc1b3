// Where a read-out comes from: the share of every earlier token, exact while keys and gates are
// held fixed. It is hamt.analysis.contributions for one token after the other.
//
// With the bound items x_j, the gates and the read weights r_t of a layer, the mixture of slots
// that token t reads is Σ_j c_tj x_j, and c follows from the recurrence backwards: λ = r_t, and for
// j = t, t-1, …
//
//   any but delta   c_tj = Σ_s λ[s] w_j[s]         λ ← α_j ⊙ λ
//   delta           c_tj = β_j Σ_s λ[s] w_j[s]     λ ← α_j ⊙ (λ - w_j c_tj)
//
// A boundary between two tokens has multiplied the slots by a matrix T: λ ← Tᵀ λ. The share of
// token j is c_tj ⟨x_j, q_t⟩ with q_t = m_t / |m_t|², m_t the mixture: shares add up to 1.
"use strict";

/** What the memories of all layers did with the last tokens; older ones are forgotten. */
export class Record {
  /**
   * @param page what step.json tells under this name: `layers`, of each memory its sizes (heads,
   *   slots, features) and `at`, where each part of its trace begins in that of a token, heads one
   *   after the other; `window`, how many tokens are kept; `kept`, how many numbers of each, all
   *   but matrices; `read_before_write`
   */
  constructor({layers, window, kept, read_before_write: readsFirst}) {
    Object.assign(this, {layers, window, readsFirst, size: kept});
    this.numbers = new Float32Array(kept * window);
    this.reset();
  }

  reset() {
    this.length = 0;  // tokens read, those that are forgotten included
    this.boundaries = new Map();  // token -> the matrices behind all else in its trace
  }

  /** The first token that is still known. */
  get begin() {
    return Math.max(0, this.length - this.window);
  }

  /**
   * Take over what a token left.
   * @param trace a Float32Array, the output "trace"
   * @param boundary whether the slots are mixed after this token
   */
  add(trace, boundary = false) {
    this.numbers.set(trace.subarray(0, this.size), this.length % this.window * this.size);
    this.boundaries.delete(this.length - this.window);
    if (boundary) this.boundaries.set(this.length, trace.slice(this.size));
    this.length += 1;
  }

  /**
   * What the read-out of a layer at a token came from.
   * @param index which of the layers
   * @param query the token
   * @param begin the first token that is told apart
   * @returns {begin, shares, before}: means over heads of the share of each token from `begin` to
   *   the query, and of what came before them. A read-out of nothing has no shares.
   */
  shares(index, query, begin = this.begin) {
    if (query < begin || begin < this.begin || query >= this.length) {
      throw new RangeError(`tokens ${begin} to ${query} are not known`);
    }
    const layer = this.layers[index], shares = new Float64Array(query - begin + 1);
    let heads = 0;
    for (let head = 0; head < layer.heads; head++) {
      heads += this.#head(layer, head, query, begin, shares);
    }
    for (let i = 0; i < shares.length; i++) shares[i] /= layer.heads;
    return {begin, shares, before: heads / layer.heads - shares.reduce((a, b) => a + b, 0)};
  }

  /** The means over all layers. */
  meanShares(query, begin = this.begin) {
    const found = this.layers.map((_, index) => this.shares(index, query, begin));
    const mean = (of) => found.reduce((sum, each) => sum + of(each), 0) / found.length;
    const shares = found[0].shares.map((_, i) => mean((each) => each.shares[i]));
    return {begin, shares, before: mean((each) => each.before)};
  }

  /** Add the shares of one head; returns 1, or 0 if it has read nothing. */
  #head({at, slots, features}, head, query, begin, shares) {
    const {numbers, size} = this, place = (token) => token % this.window * size;
    const sought = place(query) + at.sought + head * features;
    const read = place(query) + at.read + head * slots;
    if (!numbers.subarray(sought, sought + features).some((x) => x !== 0)) return 0;
    let weight = Float64Array.from(numbers.subarray(read, read + slots));
    for (let j = query; j >= begin; j--) {
      if (j < query && "mixing" in at && this.boundaries.has(j)) {
        const start = at.mixing - this.size + head * slots * slots;
        weight = transposed(this.boundaries.get(j), start, weight);
      }
      if (j === query && this.readsFirst) continue;
      const token = place(j), bound = token + at.bound + head * features;
      const write = token + at.write + head * slots, keep = token + at.keep + head * slots;
      let coefficient = 0, product = 0;
      for (let s = 0; s < slots; s++) coefficient += weight[s] * numbers[write + s];
      if ("beta" in at) coefficient *= numbers[token + at.beta + head];
      const erased = "beta" in at ? coefficient : 0;
      for (let s = 0; s < slots; s++) {
        weight[s] = numbers[keep + s] * (weight[s] - numbers[write + s] * erased);
      }
      for (let f = 0; f < features; f++) product += numbers[sought + f] * numbers[bound + f];
      shares[j - begin] += coefficient * product;
    }
    return 1;
  }
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
