// The text as tokens, each marked by its probability; one of them is current for the keyboard.

import { pieces } from "./document.js";
import { make, node } from "./dom.js";
import { isBytes } from "./align.js";
import { STEPS, percent, spoken, stepOf, visible } from "./probability.js";

/**
 * @typedef {import("./document.js").Doc} Doc
 * @typedef {import("./document.js").Token} Token
 */

const HOVER_MS = 120;

export class TokensView {
  #list = node("tokens");
  /** @type {(Token | string)[]} */
  #shown = [];
  #text = "";
  /** @type {Map<HTMLElement, Token>} */
  #tokens = new Map();
  /** @type {HTMLElement | undefined} */
  #current;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #hover;

  /**
   * @param {object} tell
   * @param {(token: Token, at: HTMLElement, pinned: boolean) => void} tell.onOpen
   * @param {() => void} tell.onLeave
   */
  constructor(tell) {
    this.tell = tell;
    this.#list.addEventListener("click", (event) => this.#open(event.target, true));
    this.#list.addEventListener("keydown", (event) => this.#onKey(event));
    this.#list.addEventListener("pointerover", (event) => {
      clearTimeout(this.#hover);
      if (event.pointerType === "mouse") {
        this.#hover = setTimeout(() => this.#open(event.target, false), HOVER_MS);
      }
    });
    this.#list.addEventListener("pointerleave", () => {
      clearTimeout(this.#hover);
      tell.onLeave();
    });
    node("legend-steps").replaceChildren(
      ...STEPS.map(({ name }, step) =>
        make("span", { className: `key token step-${step}`, text: name }),
      ),
    );
  }

  /**
   * Shows a document; what is shown already stays.
   * @param {Doc} doc
   */
  show(doc) {
    const parts = pieces(doc);
    let same = 0;
    while (same < parts.length && parts[same] === this.#shown[same]) same++;
    while (this.#list.childNodes.length > same) {
      const last = /** @type {HTMLElement} */ (this.#list.lastChild);
      this.#tokens.delete(last);
      if (last === this.#current) this.#setCurrent(undefined);
      last.remove();
    }
    this.#text = doc.text;
    this.#list.append(...parts.slice(same).map((part, i) => this.#made(part, same + i)));
    this.#shown = parts;
  }

  /** @param {boolean} busy */
  setBusy(busy) {
    this.#list.setAttribute("aria-busy", String(busy));
  }

  focus() {
    this.#list.focus({ preventScroll: true });
  }

  /**
   * @param {Token | string} part
   * @param {number} index
   */
  #made(part, index) {
    if (typeof part === "string") {
      return make("span", {
        className: "unmeasured",
        text: part,
        attributes: { role: "presentation" },
      });
    }
    const step = part.logprob === null ? "none" : stepOf(part.logprob);
    const probability =
      part.logprob === null ? "first token, no probability" : percent(part.logprob);
    const token = make("span", {
      className: `token step-${step}`,
      attributes: {
        id: `token-${index}`,
        role: "option",
        "aria-selected": "false",
        "aria-label": `${spoken(part.text)}, ${probability}`,
      },
    });
    token.append(...this.#glyphs(part));
    this.#tokens.set(token, part);
    return token;
  }

  /** @param {Token} token */
  #glyphs(token) {
    if (token.start === token.end) {
      const name = isBytes(token.text) ? token.text.slice("bytes:".length) : token.text;
      return [mark(visible(name))];
    }
    const lines = this.#text.slice(token.start, token.end).split("\n");
    return lines.flatMap((line, i) => (i === 0 ? [line] : [mark("↵"), `\n${line}`]));
  }

  /**
   * @param {EventTarget | null} target
   * @param {boolean} pinned
   */
  #open(target, pinned) {
    clearTimeout(this.#hover);
    const element = target instanceof Element ? target.closest(".token") : null;
    if (!(element instanceof HTMLElement)) return;
    const token = this.#tokens.get(element);
    if (!token) return;
    if (pinned) this.#setCurrent(element);
    this.tell.onOpen(token, element, pinned);
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const moves = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: "down",
      ArrowUp: "up",
      Home: "first",
      End: "last",
    };
    if (event.key === "Enter" || event.key === " ") {
      if (event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      if (this.#current) this.#open(this.#current, true);
      return;
    }
    const move = moves[/** @type {keyof typeof moves} */ (event.key)];
    if (move === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#setCurrent(this.#next(move));
    this.#current?.scrollIntoView({ block: "nearest" });
  }

  /** @param {number | string} move */
  #next(move) {
    const all = [...this.#tokens.keys()];
    if (move === "first" || !this.#current) return all[0];
    if (move === "last") return all.at(-1);
    const index = all.indexOf(this.#current);
    if (typeof move === "number") return all[Math.min(all.length - 1, Math.max(0, index + move))];
    return nearestLine(all, index, move === "down" ? 1 : -1);
  }

  /** @param {HTMLElement | undefined} element */
  #setCurrent(element) {
    this.#current?.setAttribute("aria-selected", "false");
    this.#current = element;
    element?.setAttribute("aria-selected", "true");
    if (element) this.#list.setAttribute("aria-activedescendant", element.id);
    else this.#list.removeAttribute("aria-activedescendant");
  }
}

/**
 * A sign in a character's place, which the token's label says in words.
 * @param {string} text
 */
function mark(text) {
  return make("span", { className: "mark", text, attributes: { "aria-hidden": "true" } });
}

/**
 * Returns the token on the next line, up or down, that is nearest below or above.
 * @param {HTMLElement[]} all
 * @param {number} index
 * @param {1 | -1} direction
 */
function nearestLine(all, index, direction) {
  const from = all[index].getClientRects()[0];
  let best = all[index];
  let line = null;
  let distance = Infinity;
  for (let i = index + direction; i >= 0 && i < all.length; i += direction) {
    const place = all[i].getClientRects()[0];
    if (!place || Math.abs(place.top - from.top) < 4) continue;
    line ??= place.top;
    if (Math.abs(place.top - line) > 4) break;
    const away = Math.abs(place.left - from.left);
    if (away < distance) [best, distance] = [all[i], away];
  }
  return best;
}
