// How many tokens a text has, and how many the context holds.

import { byId, node } from "./dom.js";
import { grouped } from "./probability.js";

const PAUSE_MS = 250;

export class Counter {
  /** @type {number | null} */
  contextLength = null;
  #text = "";
  #count = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {AbortController | undefined} */
  #asking;
  #meter = byId("meter", HTMLMeterElement);

  /** @param {import("./api.js").Api} api */
  constructor(api) {
    this.api = api;
  }

  /**
   * Returns the number of tokens of a text.
   * @param {string} text
   * @param {AbortSignal} [signal]
   * @returns {Promise<number>}
   */
  async of(text, signal) {
    if (text === this.#text) return this.#count;
    const { tokens } = await this.api.post(
      "tokenize",
      { prompt: text, add_special_tokens: false },
      signal,
    );
    [this.#text, this.#count] = [text, tokens.length];
    return this.#count;
  }

  /**
   * Shows the count of a text after a pause; a newer text takes its place.
   * @param {string} text
   * @param {number} reserved tokens that are to be written
   */
  show(text, reserved) {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    if (text === this.#text) {
      this.#draw(this.#count, text, reserved);
      return;
    }
    this.#timer = setTimeout(async () => {
      this.#asking = new AbortController();
      try {
        this.#draw(await this.of(text, this.#asking.signal), text, reserved);
      } catch {
        // Without an answer the last count stays; what is wrong is told where it matters.
      }
    }, PAUSE_MS);
  }

  /**
   * @param {number} count
   * @param {string} text
   * @param {number} reserved
   */
  #draw(count, text, reserved) {
    const context = this.contextLength;
    const words = [
      context === null
        ? `${grouped(count)} tokens`
        : `${grouped(count)} of ${grouped(context)} tokens`,
    ];
    if (context !== null) {
      this.#meter.max = context;
      this.#meter.high = Math.max(1, context - reserved);
      this.#meter.value = Math.min(count, context);
      if (count >= context) words.push("full");
      else if (count + reserved > context) words.push(`room for ${grouped(context - count)} more`);
    }
    if (/[^\s] $/.test(text)) words.push("ends with a space, which models find hard to go on from");
    node("count").textContent = words.join(" · ");
  }
}
