// The history as this browser keeps it: one list for all tabs, read anew before each change.

import {
  MOST_CHARACTERS,
  MOST_ENTRIES,
  bounded,
  entriesFrom,
  fitting,
  merged,
  withEntry,
} from "./history.js";
import { grouped } from "./probability.js";
import { keep, recall } from "./storage.js";

/** @typedef {import("./history.js").Entry} Entry */

const LIMITS = `the history holds ${grouped(MOST_ENTRIES)} entries and ${grouped(MOST_CHARACTERS)} characters`;
const NO_ROOM = "this browser has no more room";

export class HistoryStore {
  /** What the browser has no room for: it lasts as long as this tab. @type {Entry[]} */
  #unkept = [];

  /** All entries, newest first. */
  get entries() {
    return merged(this.#unkept, stored());
  }

  /**
   * Adds an entry, in the place of the oldest where there is no room. Returns what to say of it.
   * @param {Entry} entry
   */
  add(entry) {
    const all = withEntry(this.entries, entry);
    const most = bounded(all);
    const count = keepMost((size) => most.slice(0, size), 1, most.length);
    if (count === 0) {
      this.#unkept = bounded(withEntry(this.#unkept, entry));
      return "The newest is in this tab only: the browser’s storage is full or off.";
    }
    this.#unkept = [];
    const gone = all.length - count;
    const why = count < most.length ? NO_ROOM : LIMITS;
    return gone > 0 ? `${oldest(gone)} made room for the newest: ${why}.` : "";
  }

  /**
   * Adds entries as far as there is room; none makes way for them. Returns what to say of it.
   * @param {Entry[]} more
   */
  take(more) {
    const entries = stored();
    const { kept, left } = fitting(entries, more);
    const count = keepMost((size) => merged(entries, kept.slice(0, size)), 0, kept.length);
    const out = left + kept.length - count;
    const read = `${grouped(more.length)} read, ${grouped(count)} added`;
    const known = more.length - count - out;
    const here = known > 0 ? `, ${grouped(known)} here already` : "";
    if (out === 0) return `${read}${here}.`;
    const why = count < kept.length ? NO_ROOM : LIMITS;
    return `${read}${here}, ${grouped(out)} left out: ${why}. Delete some and import again.`;
  }

  /** @param {string} id */
  remove(id) {
    const others = (/** @type {Entry[]} */ entries) => entries.filter((entry) => entry.id !== id);
    this.#unkept = others(this.#unkept);
    keep("history", others(stored()));
  }

  clear() {
    this.#unkept = [];
    keep("history", []);
  }
}

function stored() {
  return entriesFrom(recall("history"));
}

/**
 * Keeps as long a list as the browser has room for; returns its size, 0 where there is no room.
 * @param {(size: number) => Entry[]} listOf
 * @param {number} least
 * @param {number} most
 */
function keepMost(listOf, least, most) {
  if (keep("history", listOf(most))) return most;
  let [kept, low, high] = [0, least, most - 1];
  while (low <= high) {
    const size = Math.ceil((low + high) / 2);
    // The longest is tried last: each that is kept takes the place of a shorter one.
    if (keep("history", listOf(size))) [kept, low] = [size, size + 1];
    else high = size - 1;
  }
  return kept;
}

/** @param {number} count */
function oldest(count) {
  return count === 1 ? "The oldest" : `The ${grouped(count)} oldest`;
}
