// Where each token's text lies in the whole text. A token may be a part of a character only.

/**
 * A token's place in a text, in UTF-16 units; empty where it shows nothing by itself.
 * @typedef {{start: number, end: number}} Range
 */

const HALF = /^bytes:(?:\\x[0-9a-f]{2})+$/i;
const encoder = new TextEncoder();

/**
 * Whether the API's name of a token stands for bytes that are no whole characters.
 * @param {string} name
 */
export function isBytes(name) {
  return HALF.test(name);
}

/**
 * Returns the bytes that a token's name stands for: `bytes:\xNN...`, or the text itself.
 * @param {string} name
 */
export function tokenBytes(name) {
  if (!isBytes(name)) return encoder.encode(name);
  return Uint8Array.from(name.slice("bytes:".length + 2).split("\\x"), (hex) => parseInt(hex, 16));
}

/** Places tokens one after another: a character belongs to the token that completes it. */
export class Aligner {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #at;

  /** @param {number} start where the first token begins */
  constructor(start = 0) {
    this.#at = start;
  }

  /**
   * Returns the place of the next token.
   * @param {string} name
   * @returns {Range}
   */
  push(name) {
    const start = this.#at;
    this.#at += this.#decoder.decode(tokenBytes(name), { stream: true }).length;
    return { start, end: this.#at };
  }
}
