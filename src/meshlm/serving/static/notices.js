// What the page says when something is in the way, and what can be done about it.

import { makeButton, node, byId } from "./dom.js";
import { grouped } from "./probability.js";

/**
 * @typedef {object} Notice
 * @property {string} id one notice replaces another of any id; `clear(id)` takes away only that one
 * @property {string} title
 * @property {string} text
 * @property {"calm" | "warn"} [tone]
 * @property {number | null} [progress] share done; null is unknown; left out is no bar
 * @property {{text: string, run: () => void, waitS?: number}[]} [actions] `waitS`: not before
 */

export class Notices {
  #box = node("notice");
  #id = "";
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #clock;

  /** @param {(words: string) => void} announce */
  constructor(announce) {
    this.announce = announce;
  }

  get id() {
    return this.#id;
  }

  /** @param {Notice} notice */
  show(notice) {
    clearInterval(this.#clock);
    const isNew = notice.id !== this.#id;
    this.#id = notice.id;
    this.#box.dataset.tone = notice.tone ?? "warn";
    node("notice-title").textContent = notice.title;
    node("notice-text").textContent = notice.text;
    const bar = byId("notice-progress", HTMLProgressElement);
    bar.hidden = notice.progress === undefined;
    if (typeof notice.progress === "number") bar.value = notice.progress;
    else bar.removeAttribute("value");
    const actions = notice.actions ?? [];
    // Replaced only where they differ: a button that has the focus keeps it.
    const buttons = node("notice-buttons");
    const shown = [...buttons.children].map((one) => one.textContent).join();
    if (isNew || shown !== actions.map((action) => action.text).join()) {
      buttons.replaceChildren(...actions.map((action) => this.#button(action)));
    }
    this.#box.hidden = false;
    if (isNew) this.announce(`${notice.title} ${notice.text}`);
  }

  /** @param {string} [id] */
  clear(id) {
    if (id !== undefined && id !== this.#id) return;
    clearInterval(this.#clock);
    this.#id = "";
    this.#box.hidden = true;
  }

  /** @param {{text: string, run: () => void, waitS?: number}} action */
  #button({ text, run, waitS = 0 }) {
    const made = makeButton(text, run);
    if (waitS > 0) this.#countDown(made, text, waitS);
    return made;
  }

  /**
   * @param {HTMLButtonElement} button
   * @param {string} text
   * @param {number} seconds
   */
  #countDown(button, text, seconds) {
    const until = performance.now() + 1000 * seconds;
    const show = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      button.disabled = left > 0;
      button.textContent = left > 0 ? `${text} in ${left} s` : text;
      if (left <= 0) clearInterval(this.#clock);
    };
    this.#clock = setInterval(show, 250);
    show();
  }
}

/**
 * Returns the notice of a failed request.
 * @param {import("./api.js").ApiError} error
 * @param {{kept: number, again: () => void}} run `kept`: tokens that had come
 * @returns {Notice}
 */
export function noticeOf(error, { kept, again }) {
  const tokens = `${grouped(kept)} ${kept === 1 ? "token" : "tokens"}`;
  const rest = kept > 0 ? ` The ${tokens} that had come ${kept === 1 ? "is" : "are"} kept.` : "";
  const retry = { text: kept > 0 ? "Continue" : "Try again", run: again };
  const words = /** @type {const} */ ({
    lost: ["The connection is lost.", `The server did not answer to the end.${rest}`],
    busy: ["The server is full.", `Too many requests wait already. ${error.message}`],
    loading: ["The model is not ready.", error.message],
    draining: [
      "The server is shutting down.",
      `${error.message}${rest} Once it is back, try again.`,
    ],
    timeout: ["This took too long.", `${error.message}${rest}`],
    context: ["The context is full.", error.message],
    refused: ["The server refused this request.", error.message],
    engine: ["The server failed.", `${error.message}${rest}`],
    key: ["The server wants an API key.", error.message],
  });
  const [title, text] = words[error.kind];
  const action = error.kind === "busy" ? { ...retry, waitS: error.retryAfterS ?? 1 } : retry;
  const actions = error.kind === "context" || error.kind === "refused" ? [] : [action];
  return { id: error.kind, title, text, actions };
}
