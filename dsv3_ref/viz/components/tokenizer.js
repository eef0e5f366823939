// Byte-level BPE with DeepSeek-V3's rules for splitting text.

// Unicode's white space: JavaScript's \s differs from it in two characters.
const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const DIGITS = /\p{N}{1,3}/gu;
const CJK = /[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+/gu;
const WORDS = new RegExp([
  "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+",
  "[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
  " ?[\\p{P}\\p{S}]+[\\r\\n]*",
  `[${SPACE}]*[\\r\\n]+`,
  `[${SPACE}]+(?![^${SPACE}])`,
  `[${SPACE}]+`,
].join("|"), "gu");

/** Split texts at every match of a pattern; matches and what lies between are pieces. */
function isolate(texts, pattern) {
  return texts.flatMap((text) => {
    const pieces = [];
    let end = 0;
    for (const match of text.matchAll(pattern)) {
      if (match.index > end) pieces.push(text.slice(end, match.index));
      pieces.push(match[0]);
      end = match.index + match[0].length;
    }
    if (end < text.length) pieces.push(text.slice(end));
    return pieces;
  });
}

/** Return the printable character that stands for each byte, as GPT-2 chose them. */
function byteCharacters() {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
}

export class Tokenizer {
  /** vocab: token of each id. merges: pairs "left right", best first. special: ids to hide. */
  constructor({ vocab, merges, special, bos }) {
    const characters = byteCharacters();
    Object.assign(this, { vocab, characters, special: new Set(special), bos });
    this.ids = new Map(vocab.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
    this.bytes = new Map(characters.map((character, byte) => [character, byte]));
  }

  /** Merge the best pair of neighbors until none is left. */
  merge(piece) {
    let parts = Array.from(new TextEncoder().encode(piece), (byte) => this.characters[byte]);
    while (parts.length > 1) {
      const ranks = parts.slice(1).map((part, i) =>
        this.ranks.get(`${parts[i]} ${part}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) break;
      const at = ranks.indexOf(best);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts.map((part) => this.ids.get(part));
  }

  /** Return the ids of a text; special tokens in it are plain characters. */
  encode(text) {
    const pieces = isolate(isolate(isolate([text], DIGITS), CJK), WORDS);
    return pieces.flatMap((piece) => this.merge(piece));
  }

  /** Return the bytes of a token; a special one has none. */
  tokenBytes(id) {
    if (this.special.has(id)) return [];
    return Array.from(this.vocab[id], (character) => this.bytes.get(character));
  }

  decode(ids) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(ids.flatMap((id) => this.tokenBytes(id))));
  }
}
