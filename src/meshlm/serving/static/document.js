// The text in the editor: what the model wrote of it, and which tokens of it are measured.
// A document is never changed: every function returns another one.

/**
 * @typedef {{text: string, logprob: number}} Alternative
 *
 * A token that the model wrote or measured. `logprob` is null where nothing comes before it.
 * @typedef {object} Token
 * @property {number} start
 * @property {number} end
 * @property {string} text the API's name of it, `bytes:\xNN` for a part of a character
 * @property {number | null} logprob
 * @property {Alternative[]} top most probable first
 *
 * @typedef {object} Doc
 * @property {string} text
 * @property {ReadonlyArray<import("./align.js").Range>} runs what the model wrote, run by run
 * @property {ReadonlyArray<Token>} tokens in order
 *
 * @typedef {{text: string, byModel: boolean}} Segment
 */

/**
 * @param {string} text
 * @returns {Doc}
 */
export function documentOf(text) {
  return { text, runs: [], tokens: [] };
}

/**
 * Returns the document after a person changed its text. The change is what differs.
 * @param {Doc} doc
 * @param {string} text
 */
export function edited(doc, text) {
  const shorter = Math.min(doc.text.length, text.length);
  let start = 0;
  while (start < shorter && doc.text[start] === text[start]) start++;
  let tail = 0;
  while (tail < shorter - start && doc.text.at(-1 - tail) === text.at(-1 - tail)) tail++;
  if (start === doc.text.length && start === text.length) return doc;
  return spliced(doc, start, doc.text.length - tail, text.slice(start, text.length - tail));
}

/**
 * Returns the document with `insert`, a person's, in place of start to end.
 * @param {Doc} doc
 * @param {number} start
 * @param {number} end
 * @param {string} insert
 * @returns {Doc}
 */
export function spliced(doc, start, end, insert) {
  const shift = insert.length - (end - start);
  const runs = doc.runs.flatMap((run) => {
    const before = { start: run.start, end: Math.min(run.end, start) };
    const after = { start: Math.max(run.start, end) + shift, end: run.end + shift };
    // Text taken out of the midst of a run leaves one run.
    if (insert === "" && before.start < before.end && after.start < after.end) {
      return [{ start: before.start, end: after.end }];
    }
    return [before, after].filter((part) => part.start < part.end);
  });
  return {
    text: doc.text.slice(0, start) + insert + doc.text.slice(end),
    runs,
    tokens: tokensBefore(doc, start),
  };
}

/**
 * Returns the document up to `at`.
 * @param {Doc} doc
 * @param {number} at
 */
export function truncated(doc, at) {
  return spliced(doc, at, doc.text.length, "");
}

/**
 * Returns the document with a model's text after it, as a run of its own.
 * @param {Doc} doc
 * @param {string} text
 * @param {Token[]} tokens with places in the new document
 * @returns {Doc}
 */
export function withRun(doc, text, tokens) {
  const run = { start: doc.text.length, end: doc.text.length + text.length };
  return {
    text: doc.text + text,
    runs: text === "" ? doc.runs : [...doc.runs, run],
    tokens: tokens.length === 0 ? doc.tokens : [...doc.tokens, ...tokens],
  };
}

/**
 * Returns the document with its tokens measured anew.
 * @param {Doc} doc
 * @param {Token[]} tokens
 * @returns {Doc}
 */
export function measured(doc, tokens) {
  return { ...doc, tokens };
}

/**
 * Returns the last run where the text ends with one.
 * @param {Doc} doc
 */
export function lastRun(doc) {
  const run = doc.runs.at(-1);
  return run && run.end === doc.text.length ? run : undefined;
}

/**
 * Returns the document with another alternative in a token's place, and nothing after it.
 * @param {Doc} doc
 * @param {Token} token
 * @param {Alternative} chosen
 */
export function branched(doc, token, chosen) {
  const before = truncated(doc, token.start);
  const place = { start: token.start, end: token.start + chosen.text.length };
  return withRun(before, chosen.text, [{ ...place, ...chosen, top: token.top }]);
}

/**
 * Returns the text cut at the borders of the model's runs.
 * @param {Doc} doc
 * @returns {Segment[]}
 */
export function segments(doc) {
  /** @type {Segment[]} */
  const parts = [];
  let at = 0;
  for (const run of doc.runs) {
    if (run.start > at) parts.push({ text: doc.text.slice(at, run.start), byModel: false });
    parts.push({ text: doc.text.slice(run.start, run.end), byModel: true });
    at = run.end;
  }
  if (at < doc.text.length) parts.push({ text: doc.text.slice(at), byModel: false });
  return parts;
}

/**
 * Returns the text as tokens and as stretches (strings) that no token covers.
 * @param {Doc} doc
 * @returns {(Token | string)[]}
 */
export function pieces(doc) {
  /** @type {(Token | string)[]} */
  const parts = [];
  let at = 0;
  for (const token of doc.tokens) {
    if (token.start > at) parts.push(doc.text.slice(at, token.start));
    parts.push(token);
    at = token.end;
  }
  if (at < doc.text.length) parts.push(doc.text.slice(at));
  return parts;
}

/**
 * What is before a change keeps its tokens; what comes after was measured with other text before it.
 * @param {Doc} doc
 * @param {number} start
 */
function tokensBefore(doc, start) {
  return doc.tokens.filter(
    (token) => token.end <= start && (token.end > token.start || token.end < start),
  );
}
