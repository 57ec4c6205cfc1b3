// Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) from a tokenizer.json, as the
// tokenizers library computes it: text -> bytes -> pieces that are merged in the order learnt.
"use strict";

// How GPT-2 cuts text into words. \s of JavaScript is another set than that of the library.
const WORDS = new RegExp(
  String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+` +
  String.raw`|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+`, "gu");

// Bytes stand in vocabularies as printable characters: those that are printable as themselves.
const CHARACTERS = new Array(256);
for (let byte = 0, next = 256; byte < 256; byte++) {
  const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  CHARACTERS[byte] = String.fromCharCode(printable ? byte : next++);
}
const BYTES = new Map(CHARACTERS.map((character, byte) => [character, byte]));
const MOST_CACHED = 10000;  // words

export class Tokenizer {
  /** @param file the content of a tokenizer.json, parsed */
  constructor(file) {
    this.ids = new Map(Object.entries(file.model.vocab));
    this.pieces = [];
    for (const [piece, id] of this.ids) this.pieces[id] = piece;
    this.ranks = new Map();
    file.model.merges.forEach((merge, rank) => {
      this.ranks.set(Array.isArray(merge) ? merge.join(" ") : merge, rank);
    });
    this.addsSpace = file.pre_tokenizer.add_prefix_space;
    this.added = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    this.special = new Map(file.added_tokens.map((token) => [token.id, token.content]));
    // The longest of those that begin at a place.
    const longestFirst = [...this.added.keys()].sort((a, b) => b.length - a.length);
    const escaped = longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"));
    this.between = escaped.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
    this.known = new Map();
  }

  /** The tokens of a text, special ones only where they are written out. */
  encode(text) {
    const ids = [];
    for (let part of this.between ? text.split(this.between) : [text]) {
      if (this.added.has(part)) {
        ids.push(this.added.get(part));
        continue;
      }
      if (this.addsSpace && part && !part.startsWith(" ")) part = " " + part;
      for (const [word] of part.matchAll(WORDS)) ids.push(...this.#word(word));
    }
    return ids;
  }

  /** The bytes of a token; of a special one none. */
  bytes(id) {
    if (this.special.has(id)) return new Uint8Array();
    return Uint8Array.from(this.pieces[id] ?? "", (character) => BYTES.get(character));
  }

  #word(word) {
    let ids = this.known.get(word);
    if (ids) return ids;
    const bytes = new TextEncoder().encode(word);
    // Bytes that the vocabulary lacks are left out.
    const parts = Array.from(bytes, (byte) => CHARACTERS[byte]).filter((x) => this.ids.has(x));
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    ids = parts.map((part) => this.ids.get(part));
    if (this.known.size >= MOST_CACHED) this.known.clear();
    this.known.set(word, ids);
    return ids;
  }
}

/** Turns tokens into text one by one: characters may be spread over several of them. */
export class Decoder {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.reset();
  }

  reset() {
    this.decoder = new TextDecoder("utf-8", {ignoreBOM: true});
  }

  /** The characters that this token completes; none if its last one is still to come. */
  push(id) {
    return this.decoder.decode(this.tokenizer.bytes(id), {stream: true});
  }
}
