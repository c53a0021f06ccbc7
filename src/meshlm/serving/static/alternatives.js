// What else could have come in a token's place.

import { isBytes } from "./align.js";
import { make, node } from "./dom.js";
import { percent, spoken, visible } from "./probability.js";

/**
 * @typedef {import("./document.js").Token} Token
 * @typedef {import("./document.js").Alternative} Alternative
 */

const END_OF_TEXT = "<|endoftext|>";
const LEAVE_MS = 250;
const MARGIN_PX = 8;

export class AlternativesPanel {
  #panel = node("alternatives");
  #list = node("alternatives-list");
  #pinned = false;
  /** @type {HTMLElement | undefined} */
  #at;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #leaving;

  /** @param {{onChoose: (token: Token, chosen: Alternative) => void, onClose: () => void}} tell */
  constructor(tell) {
    this.tell = tell;
    this.#panel.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    this.#panel.addEventListener("pointerleave", () => this.leave());
    this.#panel.addEventListener("keydown", (event) => this.#onKey(event));
    for (const [source, what] of /** @type {const} */ ([
      [node("sheet"), "scroll"],
      [window, "scroll"],
      [window, "resize"],
    ])) {
      source.addEventListener(what, () => this.#follow());
    }
    document.addEventListener("pointerdown", (event) => {
      const target = event.target;
      if (target instanceof Element && !target.closest("#alternatives, .token")) this.close();
    });
  }

  get isOpen() {
    return !this.#panel.hidden;
  }

  /**
   * Opens beside a token. Pinned, it stays and takes the focus.
   * @param {Token} token
   * @param {HTMLElement} at
   * @param {boolean} pinned
   */
  open(token, at, pinned) {
    clearTimeout(this.#leaving);
    if (this.#pinned && !pinned) return;
    this.#pinned = pinned;
    node("alternatives-title").textContent = visible(token.text);
    node("alternatives-title").setAttribute("aria-label", spoken(token.text));
    node("alternatives-facts").textContent = factsOf(token);
    this.#list.replaceChildren(...choicesOf(token).map((choice) => this.#row(token, choice)));
    node("alternatives-hint").hidden = this.#list.childElementCount === 0;
    this.#panel.hidden = false;
    this.#at = at;
    this.#place(at);
    if (!pinned) return;
    const first = this.#panel.querySelector("button:not(:disabled)");
    (first instanceof HTMLElement ? first : this.#panel).focus({ preventScroll: true });
  }

  /** The pointer left: closes soon unless it is pinned or entered. */
  leave() {
    clearTimeout(this.#leaving);
    if (!this.#pinned) this.#leaving = setTimeout(() => this.close(), LEAVE_MS);
  }

  close() {
    if (!this.isOpen) return;
    const hadFocus = this.#panel.contains(document.activeElement);
    this.#panel.hidden = true;
    this.#pinned = false;
    if (hadFocus) this.tell.onClose();
  }

  /**
   * @param {Token} token
   * @param {Alternative} choice
   */
  #row(token, choice) {
    const isChosen = choice.text === token.text;
    const name = make("span", {
      className: "choice-name",
      text: visible(choice.text),
      attributes: { "aria-hidden": "true" },
    });
    const words = make("span", {
      className: "unseen",
      text: `${spoken(choice.text)}${isChosen ? ", is here now" : ""}, `,
    });
    const bar = make("span", { className: "choice-bar", attributes: { "aria-hidden": "true" } });
    bar.style.setProperty("--share", String(Math.exp(choice.logprob)));
    const share = make("span", { className: "choice-share", text: percent(choice.logprob) });
    const row = make(
      "button",
      { className: isChosen ? "choice chosen" : "choice" },
      name,
      words,
      bar,
      share,
    );
    row.type = "button";
    row.disabled = isBytes(choice.text) || choice.text === END_OF_TEXT;
    if (row.disabled) row.title = "This is no whole text to continue from.";
    row.addEventListener("click", () => {
      this.close();
      this.tell.onChoose(token, choice);
    });
    return make("li", {}, row);
  }

  /** Pinned, it stays with its token; else what is under the pointer has changed. */
  #follow() {
    if (this.#pinned && this.#at) this.#place(this.#at);
    else this.close();
  }

  /** @param {HTMLElement} at */
  #place(at) {
    const beside = at.getClientRects()[0] ?? at.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#panel;
    const left = Math.min(beside.left, innerWidth - width - MARGIN_PX);
    const below = beside.bottom + MARGIN_PX;
    const fits = below + height < innerHeight;
    const top = fits ? below : Math.max(MARGIN_PX, beside.top - height - MARGIN_PX);
    this.#panel.style.left = `${Math.max(MARGIN_PX, left)}px`;
    this.#panel.style.top = `${top}px`;
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      this.close();
      return;
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const rows = [...this.#panel.querySelectorAll("button")].filter((row) => !row.disabled);
    const index = rows.findIndex((row) => row === document.activeElement);
    rows[(index + step + rows.length) % rows.length]?.focus();
  }
}

/**
 * The alternatives, the token itself among them even where it is none of the most probable.
 * @param {Token} token
 */
function choicesOf(token) {
  const { text, logprob, top } = token;
  if (logprob === null || top.length === 0 || top.some((choice) => choice.text === text))
    return top;
  return [...top, { text, logprob }];
}

/** @param {Token} token */
function factsOf(token) {
  if (token.logprob === null)
    return "The first token: nothing comes before it, so it has no probability.";
  const rank = token.top.findIndex((choice) => choice.text === token.text) + 1;
  const place =
    rank > 0
      ? `, number ${rank}`
      : token.top.length > 0
        ? `, not among the first ${token.top.length}`
        : "";
  return `${percent(token.logprob)}${place} · log-probability ${token.logprob.toFixed(3)}`;
}
