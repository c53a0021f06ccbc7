// One request at a time: generates or measures, and says how it went.

import { ApiError } from "./api.js";
import { branched, lastRun, measured, truncated, withRun } from "./document.js";
import { Generation, measuredTokens } from "./generation.js";
import { noticeOf } from "./notices.js";
import { drawSeed, requestOf } from "./options.js";
import { grouped } from "./probability.js";

/**
 * @typedef {import("./document.js").Doc} Doc
 *
 * @typedef {object} Parts
 * @property {import("./api.js").Api} api
 * @property {import("./session.js").Session} session
 * @property {import("./settings.js").SettingsPanel} panel
 * @property {import("./counter.js").Counter} counter
 * @property {import("./samples.js").SamplesView} samples
 * @property {import("./notices.js").Notices} notices
 * @property {() => string} model
 * @property {(words: string) => void} announce
 * @property {(words: string) => void} tellStats
 * @property {() => void} onState the runner has begun or ended
 * @property {(error: ApiError, again: () => void) => void} onFailure
 * @property {(seed: number) => void} onDone
 */

export class Runner {
  /** @type {AbortController | null} */
  #running = null;
  /** @type {{base: Doc, generation: Generation, seed: number} | null} */
  #choice = null;
  #frame = 0;
  /** What the last failure left to do. @type {{words: string, run: () => void} | null} */
  again = null;

  /** @param {Parts} parts */
  constructor(parts) {
    this.parts = parts;
  }

  get isBusy() {
    return this.#running !== null;
  }

  stop() {
    this.#running?.abort();
  }

  /** Lets the model go on at the end of the text. */
  generate() {
    return this.#generate(this.parts.session.doc);
  }

  /** Writes the last run anew. */
  regenerate() {
    const { doc } = this.parts.session;
    const run = lastRun(doc);
    return this.#generate(run ? truncated(doc, run.start) : doc);
  }

  /**
   * Goes on from a token, with another in its place.
   * @param {import("./document.js").Token} token
   * @param {import("./document.js").Alternative} chosen
   */
  branch(token, chosen) {
    return this.#generate(branched(this.parts.session.doc, token, chosen));
  }

  /**
   * Takes one of several samples into the text.
   * @param {import("./generation.js").Sample} sample
   */
  use(sample) {
    if (!this.#choice) return;
    const { base, seed } = this.#choice;
    this.dismiss();
    this.parts.session.change(withRun(base, sample.text, sample.tokens));
    this.parts.onDone(seed);
  }

  /** Puts the samples away. */
  dismiss() {
    this.#choice = null;
    this.parts.samples.close();
  }

  /** Measures the probability of each token of the text. */
  measure() {
    const { api, session, panel, announce, tellStats, model } = this.parts;
    const { doc } = session;
    const again = () => void this.measure();
    return this.#exclusively(
      again,
      () => 0,
      async (signal) => {
        announce("Measuring.");
        tellStats("Measuring…");
        const { logprobs } = panel.settings;
        const body = { model: model(), prompt: doc.text, max_tokens: 0, echo: true, logprobs };
        const answer = await api.post("v1/completions", body, signal);
        session.replace(measured(doc, measuredTokens(answer.choices[0])));
        tellStats(`${grouped(answer.usage.prompt_tokens)} tokens measured`);
        announce("Measured.");
      },
    );
  }

  /** @param {Doc} base */
  #generate(base) {
    const { settings } = this.parts.panel;
    const generation = new Generation(base.text.length, settings.n);
    const seed = settings.seed ?? drawSeed();
    const again = () =>
      void (generation.count > 0 && settings.n === 1 ? this.generate() : this.#generate(base));
    return this.#exclusively(
      again,
      () => generation.count,
      (signal) => this.#run(base, generation, seed, signal),
    );
  }

  /**
   * @param {Doc} base
   * @param {Generation} generation
   * @param {number} seed
   * @param {AbortSignal} signal
   */
  async #run(base, generation, seed, signal) {
    const { api, panel, announce, tellStats, model, notices, samples } = this.parts;
    this.dismiss();
    announce("Generating.");
    tellStats("Waiting for the first token…");
    const { maxTokens, isShort } = await this.#fit(base.text, signal);
    const request = requestOf(panel.settings, {
      model: model(),
      prompt: base.text,
      seed,
      maxTokens,
    });
    const extra = { logprobs: panel.settings.logprobs, stream: true };
    const show = this.#shower(base, generation, seed);
    try {
      await generation.follow(api.stream("v1/completions", { ...request, ...extra }, signal), {
        onQueued: (ahead) => notices.show(queuedNotice(ahead)),
        onTokens: () => {
          notices.clear("queued");
          this.#frame ||= requestAnimationFrame(() => show(true));
        },
      });
    } finally {
      notices.clear("queued");
      show(false);
      const tail = [
        `seed ${seed}`,
        ...(isShort ? [`shortened to the ${grouped(maxTokens)} tokens that fit`] : []),
      ];
      tellStats(generation.count > 0 ? [statsOf(generation), ...tail].join(" · ") : "");
      if (generation.count > 0) this.parts.onDone(seed);
    }
    this.#tellEnd(base, generation);
    if (samples.isOpen) samples.show(generation.samples, false);
  }

  /**
   * Returns how many tokens to ask for.
   * @param {string} text
   * @param {AbortSignal} signal
   */
  async #fit(text, signal) {
    const { counter, panel } = this.parts;
    const wanted = panel.settings.max_tokens;
    const context = counter.contextLength;
    if (context === null) return { maxTokens: wanted, isShort: false };
    const count = await counter.of(text, signal);
    if (count < context)
      return {
        maxTokens: Math.min(wanted, context - Math.max(count, 1)),
        isShort: count + wanted > context,
      };
    const words = `The text has ${grouped(count)} tokens and the context holds ${grouped(context)}. `;
    throw new ApiError(
      "context",
      `${words}Take some of the text away: what comes first matters least.`,
    );
  }

  /**
   * Returns what shows the samples so far: one in the text, several beside each other.
   * @param {Doc} base
   * @param {Generation} generation
   * @param {number} seed
   */
  #shower(base, generation, seed) {
    const { session, samples, tellStats } = this.parts;
    let isFirst = true;
    return (/** @type {boolean} */ busy) => {
      cancelAnimationFrame(this.#frame);
      this.#frame = 0;
      if (generation.count === 0) return;
      if (generation.samples.length > 1) {
        if (isFirst) samples.open(generation.samples);
        this.#choice = { base, generation, seed };
        samples.show(generation.samples, busy);
      } else {
        const [sample] = generation.samples;
        const doc = withRun(base, sample.text, sample.tokens);
        if (isFirst) session.change(doc);
        else session.replace(doc);
      }
      isFirst = false;
      if (busy) tellStats(statsOf(generation));
    };
  }

  /**
   * @param {Doc} base
   * @param {Generation} generation
   */
  #tellEnd(base, generation) {
    const { announce, notices } = this.parts;
    const isEmpty = generation.samples.every((sample) => sample.text === "");
    if (!isEmpty) {
      announce(`Done: ${statsOf(generation)}.`);
      return;
    }
    notices.show({
      id: "empty",
      tone: "calm",
      title: "The model wrote nothing.",
      text: "It ended the text at once, or came upon a stop text. Try again, change the end of the text, or take the stop text away.",
      actions: [{ text: "Try again", run: () => void this.#generate(base) }],
    });
  }

  /**
   * Runs one piece of work, and says what went wrong.
   * @param {() => void} again
   * @param {() => number} kept tokens that had come
   * @param {(signal: AbortSignal) => Promise<void>} work
   */
  async #exclusively(again, kept, work) {
    if (this.isBusy) return;
    const { notices, announce, onState, onFailure } = this.parts;
    notices.clear();
    this.again = null;
    this.#running = new AbortController();
    onState();
    try {
      await work(this.#running.signal);
    } catch (error) {
      if (kept() === 0) this.parts.tellStats("");
      if (error instanceof ApiError) {
        this.again = { words: kept() > 0 ? "Continue" : "Try again", run: again };
        if (error.kind !== "key") notices.show(noticeOf(error, { kept: kept(), again }));
        onFailure(error, again);
      } else if (error instanceof DOMException && error.name === "AbortError") {
        announce(`Stopped after ${grouped(kept())} tokens.`);
      } else {
        throw error;
      }
    } finally {
      this.#running = null;
      onState();
    }
  }
}

/** @param {Generation} generation */
function statsOf(generation) {
  const { count, rate, firstMs } = generation;
  const facts = [`${grouped(count)} ${count === 1 ? "token" : "tokens"}`];
  if (rate !== null) facts.push(`${rate.toFixed(1)} tokens/s`);
  if (firstMs !== null) facts.push(`first after ${(firstMs / 1000).toFixed(2)} s`);
  return facts.join(" · ");
}

/**
 * @param {number} ahead
 * @returns {import("./notices.js").Notice}
 */
function queuedNotice(ahead) {
  const text =
    ahead === 0
      ? "It is your turn next."
      : `${grouped(ahead)} ${ahead === 1 ? "sample waits" : "samples wait"} before yours.`;
  return { id: "queued", tone: "calm", title: "Waiting for a free place.", text, actions: [] };
}
