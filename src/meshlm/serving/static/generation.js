// A completion as it arrives: texts, placed tokens, and the time it takes.

import { Aligner } from "./align.js";

/** @typedef {import("./document.js").Token} Token */

/**
 * Returns the i-th token of an API's `logprobs` object, placed.
 * @param {any} logprobs
 * @param {number} i
 * @param {import("./align.js").Range} range
 * @returns {Token}
 */
export function tokenAt(logprobs, i, range) {
  const top = Object.entries(logprobs.top_logprobs?.[i] ?? {})
    .map(([text, logprob]) => ({ text, logprob }))
    .sort((a, b) => b.logprob - a.logprob);
  return { ...range, text: logprobs.tokens[i], logprob: logprobs.token_logprobs[i], top };
}

/** One sample that grows. Tokens wait until their text has come. */
export class Sample {
  text = "";
  /** @type {Token[]} */
  tokens = [];
  /** @type {"stop" | "length" | null} */
  finish = null;
  count = 0;
  /** @type {Token[]} */
  #waiting = [];
  #aligner;
  #start;

  /** @param {number} start where the sample's text begins in the document */
  constructor(start) {
    this.#start = start;
    this.#aligner = new Aligner(start);
  }

  /** @param {any} choice one choice of one event */
  add(choice) {
    this.text += choice.text ?? "";
    const names = choice.logprobs?.tokens ?? [];
    for (let i = 0; i < names.length; i++) {
      this.#waiting.push(tokenAt(choice.logprobs, i, this.#aligner.push(names[i])));
    }
    this.count += names.length;
    this.finish = choice.finish_reason ?? this.finish;
    const end = this.#start + this.text.length;
    while (this.#waiting.length > 0 && this.#waiting[0].end <= end) {
      this.tokens.push(/** @type {Token} */ (this.#waiting.shift()));
    }
    if (this.finish !== null) this.#close(end);
  }

  /**
   * What the text was cut before is not shown; of a token that is cut, the part in the text is.
   * The end-of-text token has no text of its own, and alternatives that are worth a look.
   * @param {number} end
   */
  #close(end) {
    for (const token of this.#waiting) {
      if (token.start < end) this.tokens.push({ ...token, end });
      else if (token.text === "<|endoftext|>") this.tokens.push({ ...token, start: end, end });
    }
    this.#waiting = [];
    // What is left of a character becomes U+FFFD at the end, and belongs to the last token.
    const last = this.tokens.at(-1);
    if (last && last.end < end) this.tokens[this.tokens.length - 1] = { ...last, end };
  }
}

/** A request for samples of one text. */
export class Generation {
  /** @type {Sample[]} */
  samples;
  /** @type {number | null} */
  firstMs = null;
  /** @type {number | null} */
  lastMs = null;
  #beganMs = performance.now();
  #firstCount = 0;

  /**
   * @param {number} start where the samples begin in the document
   * @param {number} n
   */
  constructor(start, n) {
    this.samples = Array.from({ length: n }, () => new Sample(start));
  }

  /**
   * Follows a stream to its end.
   * @param {AsyncGenerator<{value: any} | {comment: string}>} stream
   * @param {{onQueued: (ahead: number) => void, onTokens: () => void}} tell
   */
  async follow(stream, tell) {
    for await (const item of stream) {
      if ("comment" in item) {
        const ahead = /^queued (\d+)/.exec(item.comment);
        if (ahead) tell.onQueued(Number(ahead[1]));
        continue;
      }
      this.#take(item.value.choices ?? []);
      tell.onTokens();
    }
  }

  /** @param {any[]} choices */
  #take(choices) {
    const before = this.count;
    for (const choice of choices) this.samples[choice.index]?.add(choice);
    if (this.count === before) return;
    this.lastMs = performance.now() - this.#beganMs;
    if (this.firstMs === null) {
      this.firstMs = this.lastMs;
      this.#firstCount = this.count;
    }
  }

  /** How many tokens came, those that end a sample included. */
  get count() {
    return this.samples.reduce((sum, sample) => sum + sample.count, 0);
  }

  /** Tokens a second after the first arrived, null before that can be told. */
  get rate() {
    if (this.firstMs === null || this.lastMs === null || this.lastMs <= this.firstMs) return null;
    return (1000 * (this.count - this.#firstCount)) / (this.lastMs - this.firstMs);
  }
}

/**
 * Returns the tokens of a text that was only measured (`echo` with `max_tokens` 0), placed.
 * @param {any} choice
 * @returns {Token[]}
 */
export function measuredTokens(choice) {
  const aligner = new Aligner();
  const names = /** @type {string[]} */ (choice.logprobs.tokens);
  return names.map((name, i) => tokenAt(choice.logprobs, i, aligner.push(name)));
}
