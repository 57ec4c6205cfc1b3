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
    this.added = new Map(file.added_tokens.map(({content, id}) => [content, id]));
    for (const {content, id} of file.added_tokens) this.pieces[id] = content;
    this.special = new Set(file.added_tokens.filter(({special}) => special).map(({id}) => id));
    // The longest of those that begin at a place; what is found as it stands goes before the
    // others.
    this.between = [false, true].map((normalized) => {
      const these = file.added_tokens.filter((token) => token.normalized === normalized);
      const longestFirst = these.map(({content}) => content).sort((a, b) => b.length - a.length);
      const escaped = longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
      return escaped.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
    });
    this.known = new Map();
  }

  /**
   * The tokens of a text, special ones only where they are written out. If it goes on from another
   * text, no space is put before it.
   */
  encode(text, goesOn = false) {
    let parts = [text];
    for (const between of this.between) {
      if (!between) continue;
      parts = parts.flatMap((part) => this.added.has(part) ? part : part.split(between));
    }
    return parts.flatMap((part, place) => {
      if (this.added.has(part)) return this.added.get(part);
      const joins = goesOn && place === 0;
      const begun = this.addsSpace && part && !part.startsWith(" ") && !joins ? " " + part : part;
      return Array.from(begun.matchAll(WORDS)).flatMap(([word]) => this.#word(word));
    });
  }

  /** The bytes of a token; of a special one none. */
  bytes(id) {
    const piece = this.special.has(id) ? "" : this.pieces[id] ?? "";
    const bytes = Array.from(piece, (character) => BYTES.get(character));
    // Tokens that were added are written as they are, unless they look like the others.
    return bytes.includes(undefined) ? new TextEncoder().encode(piece) : Uint8Array.from(bytes);
  }

  #word(word) {
    let ids = this.known.get(word);
    if (ids) return ids;
    const bytes = new TextEncoder().encode(word);
    // Bytes that the vocabulary lacks are left out.
    const parts = Array.from(bytes, (byte) => CHARACTERS[byte]).filter((x) => this.ids.has(x));
    // Of each part and the next one; the last has none. Looking all of them up after each merge
    // would take minutes for a word of 50,000 letters.
    const rank = (i) => this.ranks.get(`${parts[i]} ${parts[i + 1] ?? ""}`) ?? Infinity;
    const ranks = parts.map((_, i) => rank(i));
    for (;;) {
      let at = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[at]) at = i;
      if (!(ranks[at] < Infinity)) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
      ranks.splice(at, 1);
      for (const i of [at - 1, at]) if (i >= 0) ranks[i] = rank(i);
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
