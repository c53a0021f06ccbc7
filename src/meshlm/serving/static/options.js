// What can be set for a completion: names, bounds, and the request made of them.

/**
 * @typedef {object} Settings
 * @property {number} temperature
 * @property {number} top_p
 * @property {number} top_k 0 is off
 * @property {number} max_tokens
 * @property {number} n
 * @property {number | null} seed null draws another each time
 * @property {string[]} stop
 * @property {number} min_p 0 is off
 * @property {number} repetition_penalty 1 is off
 * @property {number} logprobs
 *
 * @typedef {object} Bound
 * @property {"temperature" | "top_p" | "top_k" | "max_tokens" | "n" | "min_p" | "repetition_penalty" | "logprobs"} name
 * @property {number} least
 * @property {number} most
 * @property {number} step
 */

/** @type {Settings} */
export const DEFAULTS = Object.freeze({
  temperature: 0.8,
  top_p: 0.95,
  top_k: 0,
  max_tokens: 128,
  n: 1,
  seed: null,
  stop: [],
  min_p: 0,
  repetition_penalty: 1,
  logprobs: 5,
});

/** @type {ReadonlyArray<Bound>} */
export const BOUNDS = [
  { name: "temperature", least: 0, most: 2, step: 0.01 },
  { name: "top_p", least: 0.01, most: 1, step: 0.01 },
  { name: "top_k", least: 0, most: 200, step: 1 },
  { name: "max_tokens", least: 1, most: 2048, step: 1 },
  { name: "n", least: 1, most: 8, step: 1 },
  { name: "min_p", least: 0, most: 1, step: 0.01 },
  { name: "repetition_penalty", least: 0.5, most: 2, step: 0.01 },
  { name: "logprobs", least: 0, most: 20, step: 1 },
];

/**
 * How many stop texts there may be, and how long each.
 * @typedef {{most: number, characters: number}} StopBounds
 */

/** @type {Readonly<StopBounds>} */
export const STOP_BOUNDS = { most: 16, characters: 256 };

/**
 * Returns settings from anything: what is missing or wrong is as in DEFAULTS, what is too large or
 * small is at its bound. The bounds are the usual ones of a server, or what one has told.
 * @param {unknown} source
 * @param {Iterable<Bound>} bounds
 * @param {StopBounds} stops
 * @returns {Settings}
 */
export function settingsFrom(source, bounds = BOUNDS, stops = STOP_BOUNDS) {
  const given = /** @type {Record<string, unknown>} */ (
    typeof source === "object" && source !== null ? source : {}
  );
  /** @type {Settings} */
  const settings = { ...DEFAULTS, stop: [] };
  for (const bound of bounds) {
    const value = given[bound.name];
    if (typeof value === "number" && Number.isFinite(value))
      settings[bound.name] = fitted(bound, value);
  }
  if (isSeed(given.seed)) settings.seed = given.seed;
  if (Array.isArray(given.stop)) {
    settings.stop = given.stop
      .filter((text) => typeof text === "string" && text !== "")
      .map((text) => text.slice(0, stops.characters))
      .slice(0, stops.most);
  }
  return settings;
}

/**
 * Returns the nearest value that the bound allows.
 * @param {Bound} bound
 * @param {number} value
 */
export function fitted(bound, value) {
  const stepped = Math.round(value / bound.step) * bound.step;
  const digits = bound.step < 1 ? 2 : 0;
  return Math.min(bound.most, Math.max(bound.least, Number(stepped.toFixed(digits))));
}

/**
 * Returns whether a value is a seed. The server takes any 64-bit integer, the page those that a
 * number holds exactly.
 * @param {unknown} value
 * @returns {value is number}
 */
export function isSeed(value) {
  return Number.isSafeInteger(value);
}

/** Returns a seed drawn at random. */
export function drawSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/**
 * Returns the body of a request, without what is off and how it is answered.
 * @param {Settings} settings
 * @param {{model: string, prompt: string, seed: number, maxTokens: number}} run
 * @returns {Record<string, unknown>}
 */
export function requestOf(settings, run) {
  return {
    model: run.model,
    prompt: run.prompt,
    max_tokens: run.maxTokens,
    temperature: settings.temperature,
    top_p: settings.top_p,
    ...(settings.top_k > 0 && { top_k: settings.top_k }),
    ...(settings.min_p > 0 && { min_p: settings.min_p }),
    ...(settings.repetition_penalty !== 1 && { repetition_penalty: settings.repetition_penalty }),
    ...(settings.stop.length > 0 && { stop: settings.stop }),
    ...(settings.n > 1 && { n: settings.n }),
    seed: run.seed,
  };
}

/**
 * Returns a stop text as it is typed: a new line is \n, a tab \t, a backslash \\.
 * @param {string} text
 */
export function escaped(text) {
  return text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
}

/**
 * Returns what `escaped` was given.
 * @param {string} typed
 */
export function unescaped(typed) {
  const marks = /** @type {Record<string, string>} */ ({ n: "\n", t: "\t", "\\": "\\" });
  return typed.replace(/\\([nt\\])/g, (_, mark) => marks[mark]);
}
