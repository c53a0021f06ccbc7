// A request as a command or a program that can be pasted and run.

// Parameters of OpenAI's that its Python package has names for; others go in extra_body.
const OWN = new Set(["model", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed"]);

/**
 * Returns `text` as one word of a POSIX shell.
 * @param {string} text
 */
export function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * Returns a value of JSON as Python source.
 * @param {unknown} value
 * @returns {string}
 */
export function pythonLiteral(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") {
    const entries = Object.entries(value).map(
      ([key, item]) => `${pythonLiteral(key)}: ${pythonLiteral(item)}`,
    );
    return `{${entries.join(", ")}}`;
  }
  // JSON's escapes in strings are Python's too; DEL and lone surrogates are safer escaped.
  return JSON.stringify(value).replaceAll("\u007f", "\\u007f");
}

/**
 * Returns a curl command.
 * @param {string} base the address of the server, with a slash at its end
 * @param {Record<string, unknown>} body
 * @param {boolean} withKey
 */
export function curlOf(base, body, withKey) {
  const lines = [
    `curl ${shellQuoted(`${base}v1/completions`)}`,
    "-H 'Content-Type: application/json'",
  ];
  if (withKey) lines.push('-H "Authorization: Bearer $MESHLM_API_KEY"');
  lines.push(`--data-raw ${shellQuoted(JSON.stringify(body, null, 2))}`);
  return `${lines.join(" \\\n  ")}\n`;
}

/**
 * Returns a Python program that uses the `openai` package.
 * @param {string} base the address of the server, with a slash at its end
 * @param {Record<string, unknown>} body
 * @param {boolean} withKey
 */
export function pythonOf(base, body, withKey) {
  const entries = Object.entries(body);
  const lines = entries
    .filter(([name]) => OWN.has(name))
    .map(([name, value]) => `    ${name}=${pythonLiteral(value)},`);
  const extra = entries.filter(([name]) => !OWN.has(name));
  if (extra.length > 0) lines.push(`    extra_body=${pythonLiteral(Object.fromEntries(extra))},`);
  const key = withKey ? 'os.environ["MESHLM_API_KEY"]' : '"none"';
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonLiteral(`${base}v1`)}, api_key=${key})`,
    "completion = client.completions.create(",
    ...lines,
    ")",
    "for choice in completion.choices:",
    "    print(choice.text)",
    "",
  ].join("\n");
}
