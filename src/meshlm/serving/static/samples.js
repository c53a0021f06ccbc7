// Several samples side by side, one of which can be used.

import { make, makeButton, node } from "./dom.js";
import { perplexity } from "./probability.js";

/** @typedef {import("./generation.js").Sample} Sample */

export class SamplesView {
  #section = node("samples");
  /** @type {{text: HTMLElement, facts: HTMLElement, use: HTMLButtonElement}[]} */
  #cards = [];

  /** @param {{onUse: (sample: Sample) => void, onDismiss: () => void}} tell */
  constructor(tell) {
    this.tell = tell;
  }

  get isOpen() {
    return !this.#section.hidden;
  }

  /** @param {Sample[]} samples */
  open(samples) {
    const cards = samples.map((sample, i) => {
      const text = make("div", { className: "sample-text" });
      const facts = make("p", { className: "hint" });
      const use = makeButton("Use this one", () => this.tell.onUse(sample));
      use.setAttribute("aria-label", `Use this one, sample ${i + 1}`);
      const card = make(
        "article",
        { className: "sample" },
        make("h3", { text: `Sample ${i + 1}` }),
        text,
        facts,
        use,
      );
      this.#cards[i] = { text, facts, use };
      return card;
    });
    this.#cards.length = samples.length;
    const dismiss = makeButton("Use none of them", () => this.tell.onDismiss(), "quiet");
    const head = make(
      "div",
      { className: "samples-head" },
      make("h2", { text: "Samples" }),
      dismiss,
    );
    this.#section.replaceChildren(head, make("div", { className: "sample-grid" }, ...cards));
    this.#section.hidden = false;
    this.show(samples, true);
    this.#section.scrollIntoView({ block: "nearest" });
  }

  /**
   * @param {Sample[]} samples
   * @param {boolean} busy
   */
  show(samples, busy) {
    this.#section.setAttribute("aria-busy", String(busy));
    samples.forEach((sample, i) => {
      const { text, facts, use } = this.#cards[i];
      text.textContent = sample.text;
      facts.textContent = factsOf(sample);
      use.disabled = busy || sample.text === "";
    });
  }

  close() {
    this.#section.hidden = true;
    this.#section.replaceChildren();
    this.#cards = [];
  }
}

/** @param {Sample} sample */
function factsOf(sample) {
  const logprobs = sample.tokens.map((token) => token.logprob).filter((value) => value !== null);
  const mean = perplexity(logprobs);
  const facts = [`${sample.count} tokens`];
  if (mean !== null) facts.push(`perplexity ${mean.toFixed(1)}`);
  if (sample.finish === "stop") facts.push("ended by itself");
  return facts.join(" · ");
}
