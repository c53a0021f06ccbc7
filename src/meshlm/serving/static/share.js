// A text and its settings in the part of an address that browsers never send to a server.

import { documentOf } from "./document.js";
import { settingsFrom } from "./options.js";

const PREFIX = "#s=";
const MOST_CHARACTERS = 400_000;

/**
 * Returns the fragment of a link to a document with its settings, null where it would be too long
 * to be read back.
 * @param {import("./document.js").Doc} doc
 * @param {import("./options.js").Settings} settings
 */
export function fragmentOf(doc, settings) {
  const runs = doc.runs.map((run) => [run.start, run.end]);
  const bytes = new TextEncoder().encode(JSON.stringify({ text: doc.text, runs, settings }));
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  const coded = btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return PREFIX.length + coded.length > MOST_CHARACTERS ? null : PREFIX + coded;
}

/**
 * Whether a fragment is, or was once, one of a link to a document.
 * @param {string} fragment
 */
export function isShared(fragment) {
  return fragment.startsWith(PREFIX);
}

/**
 * Returns what a fragment holds, null where it holds nothing that can be read.
 * @param {string} fragment
 */
export function sharedIn(fragment) {
  if (!isShared(fragment) || fragment.length > MOST_CHARACTERS) return null;
  try {
    const binary = atob(fragment.slice(PREFIX.length).replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
    const value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    if (typeof value?.text !== "string") return null;
    return { doc: documentFrom(value.text, value.runs), settings: settingsFrom(value.settings) };
  } catch {
    return null;
  }
}

/**
 * Returns a document of a text and of pairs that say what the model wrote; wrong pairs are left out.
 * @param {string} text
 * @param {unknown} pairs
 * @returns {import("./document.js").Doc}
 */
export function documentFrom(text, pairs) {
  /** @type {import("./align.js").Range[]} */
  const runs = [];
  for (const pair of Array.isArray(pairs) ? pairs : []) {
    const [start, end] = Array.isArray(pair) ? pair : [];
    const whole = Number.isInteger(start) && Number.isInteger(end);
    if (whole && start >= (runs.at(-1)?.end ?? 0) && start < end && end <= text.length) {
      runs.push({ start, end });
    }
  }
  return { ...documentOf(text), runs };
}
