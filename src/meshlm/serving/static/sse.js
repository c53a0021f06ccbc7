// Server-sent events from bytes, however the network cut them.

/** @typedef {{data: string} | {comment: string}} SseItem */

/** Reads a stream of server-sent events: bytes in, whole events and comments out. */
export class SseParser {
  #decoder = new TextDecoder();
  #line = "";
  #afterReturn = false;
  /** @type {string[]} */
  #data = [];

  /**
   * Returns what `bytes` completed.
   * @param {Uint8Array} bytes
   * @returns {SseItem[]}
   */
  push(bytes) {
    return this.#read(this.#decoder.decode(bytes, { stream: true }));
  }

  /** @param {string} text */
  #read(text) {
    /** @type {SseItem[]} */
    const items = [];
    for (const character of text) {
      if (character === "\n" && this.#afterReturn) {
        // The second half of a CR LF, perhaps of another chunk.
        this.#afterReturn = false;
        continue;
      }
      this.#afterReturn = character === "\r";
      if (character !== "\n" && character !== "\r") {
        this.#line += character;
        continue;
      }
      const item = this.#endLine(this.#line);
      this.#line = "";
      if (item) items.push(item);
    }
    return items;
  }

  /**
   * @param {string} line
   * @returns {SseItem | undefined}
   */
  #endLine(line) {
    if (line === "") {
      if (this.#data.length === 0) return undefined;
      const data = this.#data.join("\n");
      this.#data = [];
      return { data };
    }
    if (line.startsWith(":")) return { comment: line.slice(1).trim() };
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field === "data") this.#data.push(colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, ""));
    return undefined;
  }
}
