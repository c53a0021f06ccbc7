// The document that is worked on, with its earlier states.

import { documentOf, edited } from "./document.js";
import { keep, recall } from "./storage.js";
import { documentFrom } from "./share.js";
import { UndoStack } from "./undo.js";

/** @typedef {import("./document.js").Doc} Doc */

const KEEP_MS = 400;

export class Session {
  /** @type {Doc} */
  doc;
  /** @type {UndoStack<Doc>} */
  #stack = new UndoStack();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #keeping;

  /** @param {() => void} onChange */
  constructor(onChange) {
    const draft = /** @type {any} */ (recall("draft"));
    this.doc =
      typeof draft?.text === "string" ? documentFrom(draft.text, draft.runs) : documentOf("");
    this.onChange = onChange;
    addEventListener("pagehide", () => this.#keepDraft());
  }

  get canUndo() {
    return this.#stack.canUndo;
  }

  get canRedo() {
    return this.#stack.canRedo;
  }

  /** @param {string} text */
  type(text) {
    const doc = edited(this.doc, text);
    if (doc === this.doc) return;
    this.#stack.keepTyping(this.doc, performance.now());
    this.replace(doc);
  }

  /**
   * Shows another document; an undo brings this one back.
   * @param {Doc} doc
   */
  change(doc) {
    this.#stack.keep(this.doc);
    this.replace(doc);
  }

  /**
   * Shows another document in this one's place.
   * @param {Doc} doc
   */
  replace(doc) {
    this.doc = doc;
    clearTimeout(this.#keeping);
    this.#keeping = setTimeout(() => this.#keepDraft(), KEEP_MS);
    this.onChange();
  }

  undo() {
    const doc = this.#stack.undo(this.doc);
    if (doc) this.replace(doc);
  }

  redo() {
    const doc = this.#stack.redo(this.doc);
    if (doc) this.replace(doc);
  }

  #keepDraft() {
    const { text, runs } = this.doc;
    keep("draft", { text, runs: runs.map((run) => [run.start, run.end]) });
  }
}
