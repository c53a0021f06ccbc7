// Earlier texts: a list that can be kept, exported and read back.

import { settingsFrom } from "./options.js";
import { documentFrom } from "./share.js";

/**
 * @typedef {object} Entry
 * @property {string} id
 * @property {string} time ISO 8601
 * @property {string} model
 * @property {string} text
 * @property {number[][]} runs start and end of what the model wrote
 * @property {import("./options.js").Settings} settings
 * @property {number | null} seed of the last run
 */

export const MOST_ENTRIES = 100;
export const MOST_CHARACTERS = 1_000_000;
const FORMAT = "meshlm-history-1";

/**
 * Returns the list with an entry first. One that only goes on from the newest takes its place.
 * @param {Entry[]} entries newest first
 * @param {Entry} entry
 */
export function withEntry(entries, entry) {
  const isMore = entries.length > 0 && entry.text.startsWith(entries[0].text);
  return [entry, ...(isMore ? entries.slice(1) : entries)];
}

/**
 * Returns both lists as one, newest first, each id once.
 * @param {Entry[]} entries
 * @param {Entry[]} more
 */
export function merged(entries, more) {
  const all = new Map([...more, ...entries].map((entry) => [entry.id, entry]));
  return [...all.values()].sort((a, b) => (a.time < b.time ? 1 : a.time > b.time ? -1 : 0));
}

/**
 * Returns those of other entries that a list has not and has room for, newest first.
 * @param {Entry[]} entries
 * @param {Entry[]} more
 */
export function fitting(entries, more) {
  const known = new Set(entries.map((entry) => entry.id));
  const fresh = merged(more, []).filter((entry) => !known.has(entry.id));
  let left = entries.reduce((sum, entry) => sum - entry.text.length, MOST_CHARACTERS);
  const fits = fresh.filter(({ text }) => {
    const isFit = text.length <= left;
    if (isFit) left -= text.length;
    return isFit;
  });
  const kept = fits.slice(0, Math.max(0, MOST_ENTRIES - entries.length));
  return { kept, left: fresh.length - kept.length };
}

/** @param {Entry[]} entries */
export function exported(entries) {
  return JSON.stringify({ format: FORMAT, entries }, null, 2);
}

/**
 * Returns the entries of an exported file.
 * @param {string} text
 * @returns {Entry[]}
 * @throws {Error} it is no such file
 */
export function imported(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (value?.format !== FORMAT || !Array.isArray(value.entries)) {
    throw new Error("This file is not an exported history of this page.");
  }
  return entriesFrom(value.entries);
}

/**
 * Returns the entries among any values.
 * @param {unknown} values
 * @returns {Entry[]}
 */
export function entriesFrom(values) {
  if (!Array.isArray(values)) return [];
  return values.filter(isEntry).map((entry) => ({
    id: entry.id,
    time: entry.time,
    model: entry.model,
    text: entry.text,
    runs: documentFrom(entry.text, entry.runs).runs.map((run) => [run.start, run.end]),
    settings: settingsFrom(entry.settings),
    seed: typeof entry.seed === "number" ? entry.seed : null,
  }));
}

/** @param {any} value */
function isEntry(value) {
  const texts = [value?.id, value?.time, value?.model, value?.text];
  return texts.every((text) => typeof text === "string") && !Number.isNaN(Date.parse(value.time));
}

/**
 * Returns the newest entries, as many as a history holds.
 * @param {Entry[]} entries
 */
export function bounded(entries) {
  let characters = 0;
  return entries.slice(0, MOST_ENTRIES).filter((entry, index) => {
    characters += entry.text.length;
    return index === 0 || characters <= MOST_CHARACTERS;
  });
}
