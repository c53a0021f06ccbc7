// Several levels of undo and redo. Typing within a moment is one level.

const TYPING_PAUSE_MS = 900;
const MOST = 200;

/** @template T */
export class UndoStack {
  /** @type {T[]} */
  #past = [];
  /** @type {T[]} */
  #future = [];
  #typedAt = -Infinity;

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  /**
   * Keeps a state that is about to be replaced.
   * @param {T} state
   */
  keep(state) {
    this.#past.push(state);
    if (this.#past.length > MOST) this.#past.shift();
    this.#future = [];
    this.#typedAt = -Infinity;
  }

  /**
   * Keeps a state before a person typed, once for what they type without a pause.
   * @param {T} state
   * @param {number} now in milliseconds
   */
  keepTyping(state, now) {
    const pause = now - this.#typedAt;
    if (pause > TYPING_PAUSE_MS) this.keep(state);
    this.#typedAt = now;
  }

  /**
   * Returns the state before `current`, undefined where there is none.
   * @param {T} current
   */
  undo(current) {
    return this.#move(this.#past, this.#future, current);
  }

  /**
   * Returns the state that an undo left, undefined where there is none.
   * @param {T} current
   */
  redo(current) {
    return this.#move(this.#future, this.#past, current);
  }

  /**
   * @param {T[]} from
   * @param {T[]} to
   * @param {T} current
   */
  #move(from, to, current) {
    const state = from.pop();
    if (state !== undefined) to.push(current);
    this.#typedAt = -Infinity;
    return state;
  }
}
