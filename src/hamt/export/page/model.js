// The model: one token goes in with the state, logits and the next state come out.
"use strict";
import {Record} from "./sources.js";
import {Tokenizer} from "./tokenizer.js";

const RUNTIME = "./runtime/ort.wasm.bundle.min.js", BINARY = "./runtime/ort-wasm-simd-threaded.wasm";

export class Model {
  /** Load all files; `progress(bytes)` hears of every piece that comes. */
  static async load(progress = () => {}) {
    const [ort, binary, weights, step, tokenizer] = await Promise.all([
      import(RUNTIME),
      download(BINARY, progress),
      download("./model.onnx", progress),
      download("./step.json", progress).then(parse),
      download("./tokenizer.json", progress).then(parse),
    ]);
    ort.env.wasm.numThreads = 1;  // several would need headers that a plain server does not send
    ort.env.wasm.wasmBinary = binary;
    const session = await ort.InferenceSession.create(weights, {executionProviders: ["wasm"]});
    return new Model(ort, session, step, new Tokenizer(tokenizer));
  }

  constructor(ort, session, step, tokenizer) {
    Object.assign(this, {ort, session, step, tokenizer});
    this.record = new Record(step.page);
    this.values = step.inputs.filter(({name}) => name.startsWith("past."));
    this.reset();
  }

  /** Forget everything: a state of zeros. */
  reset() {
    this.record.reset();
    this.state = {};
    for (const {name, dtype, shape} of this.values) {
      const dims = [1, ...shape.slice(1)], size = dims.reduce((a, b) => a * b);
      const zeros = dtype === "int64" ? new BigInt64Array(size) : new Float32Array(size);
      this.state[name] = new this.ort.Tensor(dtype, zeros, dims);
    }
  }

  /** Tokens read so far. */
  get length() {
    return this.record.length;
  }

  /** Bytes of the state, all that is carried from token to token. */
  get stateBytes() {
    return Object.values(this.state).reduce((sum, {data}) => sum + data.byteLength, 0);
  }

  /** Bytes of the keys and values that a transformer of these layers would hold by now. */
  get cacheBytes() {
    return this.step.page.cache_bytes_per_token * this.length;
  }

  /** Read one token; returns the logits of the next one. */
  async read(token) {
    const ids = new this.ort.Tensor("int64", BigInt64Array.of(BigInt(token)), [1, 1]);
    const outputs = await this.session.run({input_ids: ids, ...this.state});
    for (const {name} of this.values) this.state[name] = outputs[name.replace("past.", "present.")];
    const every = this.step.page.boundary_every;
    this.record.add(outputs.trace.data, every !== null && (this.length + 1) % every === 0);
    return outputs.logits.data;
  }
}

async function download(path, progress) {
  // What the browser keeps may be of an earlier export, other files of a later one.
  const response = await fetch(path, {cache: "no-cache"});
  if (!response.ok) throw new Error(`${path} is not there (${response.status})`);
  const parts = [];
  for (const reader = response.body.getReader(); ;) {
    const {done, value} = await reader.read();
    if (done) break;
    parts.push(value);
    progress(value.byteLength);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function parse(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}
