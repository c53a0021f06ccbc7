// Probabilities as people read them.

/**
 * Steps of probability, each with a class of its own in style.css (colour and underline).
 * @type {ReadonlyArray<{least: number, name: string}>}
 */
export const STEPS = [
  { least: 0.75, name: "75 % and over" },
  { least: 0.35, name: "35 to 75 %" },
  { least: 0.12, name: "12 to 35 %" },
  { least: 0.03, name: "3 to 12 %" },
  { least: 0, name: "under 3 %" },
];

/**
 * Returns the index in STEPS, 0 for the most probable.
 * @param {number} logprob natural logarithm
 */
export function stepOf(logprob) {
  const probability = Math.exp(logprob);
  const index = STEPS.findIndex((step) => probability >= step.least);
  return index < 0 ? STEPS.length - 1 : index;
}

/**
 * Returns a probability in percent, never rounded to a false 0 or 100.
 * @param {number} logprob natural logarithm
 */
export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value > 99.9 && value < 100 - 1e-9) return "> 99.9 %";
  if (value < 0.01) return "< 0.01 %";
  return `${value < 1 ? value.toFixed(2) : value.toFixed(1)} %`;
}

/**
 * Returns the perplexity of tokens, null of none.
 * @param {number[]} logprobs natural logarithms
 */
export function perplexity(logprobs) {
  if (logprobs.length === 0) return null;
  return Math.exp(-logprobs.reduce((sum, value) => sum + value, 0) / logprobs.length);
}

/**
 * Returns a token's text with its white space and half characters visible.
 * @param {string} name
 */
export function visible(name) {
  if (name === "") return "(empty)";
  return name
    .replaceAll(" ", "␣")
    .replaceAll("\n", "↵")
    .replaceAll("\r", "␍")
    .replaceAll("\t", "⇥");
}

/**
 * Returns a token's name for a screen reader.
 * @param {string} name
 */
export function spoken(name) {
  if (name === "") return "empty";
  const words = /** @type {Record<string, string>} */ ({
    " ": "space",
    "\n": "new line",
    "\t": "tab",
  });
  const first = words[name[0]];
  if (name.trim() === "") {
    return first && name.length > 1
      ? `${name.length} characters, first ${first}`
      : (first ?? "white space");
  }
  return first ? `${first}, ${name.trim()}` : name;
}

/** @param {number} value */
export function grouped(value) {
  return value.toLocaleString("en-US");
}
