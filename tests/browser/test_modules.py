"""The page's modules by themselves, in Chromium: what Python computes otherwise is the measure."""

from __future__ import annotations

import ast
import codecs
import json
import math
import mimetypes
import random
import subprocess
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, Route

STATIC = files("meshlm.serving") / "static"
NASTY = [
    "",
    'it\'s $HOME `id` "x" \\ \\n',
    "a\nb\r\nc\td\0e\x7f\u2028\u2029\ufeff",
    "'; rm -rf / #",
    "𝔘𝔫𝔦 é 漢字 🙂",
    "</script><script>alert(1)</script>",
]


@pytest.fixture(scope="module")
def run(browser: Browser) -> Iterator[Callable[..., Any]]:
    """Runs JavaScript on what a module exports: run("sse.js", "(m, x) => m.f(x)", x)."""
    page = browser.new_page()

    def answer(route: Route) -> None:
        name = route.request.url.rpartition("/")[2]
        if not name:
            route.fulfill(body="<!doctype html><title>modules</title>", content_type="text/html")
            return
        kind = mimetypes.types_map[f".{name.rpartition('.')[2]}"]
        route.fulfill(body=(STATIC / name).read_text(), content_type=kind)

    page.route("**/*", answer)
    page.goto("http://page.test/")

    def call(module: str, script: str, value: Any = None) -> Any:
        wrapped = f"async (x) => ({script})(await import('/{module}'), x)"
        return page.evaluate(wrapped, value)

    yield call
    page.close()


def units(text: str) -> int:
    """How long JavaScript finds a text."""
    return len(text.encode("utf-16-le")) // 2


# Streams


def test_a_stream_reads_the_same_however_it_is_cut(run: Callable[..., Any]) -> None:
    data = json.dumps({"text": "é漢🙂"}, ensure_ascii=False)
    stream = (
        f": queued 3\n\ndata: {data}\n\r\ndata: two\r\ndata:lines\r\n\r\n:ping\n\ndata\n\nid: 1\n\n"
    )
    found = run(
        "sse.js",
        """(m, bytes) => {
          const read = (...parts) => {
            const parser = new m.SseParser();
            return JSON.stringify(parts.flatMap((part) => parser.push(Uint8Array.from(part))));
          };
          const cuts = bytes.map((_, i) => read(bytes.slice(0, i), bytes.slice(i)));
          return [...new Set([...cuts, read(...bytes.map((byte) => [byte]))])];
        }""",
        list(stream.encode()),
    )
    items = [{"comment": "queued 3"}, {"data": data}, {"data": "two\nlines"}]
    assert [json.loads(one) for one in found] == [[*items, {"comment": "ping"}, {"data": ""}]]


# Tokens and text


def names_of(parts: list[bytes]) -> list[str]:
    """Tokens as the API names them."""

    def name(part: bytes) -> str:
        try:
            return part.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)

    return [name(part) for part in parts]


@pytest.mark.parametrize("seed", range(4))
def test_tokens_lie_where_python_decodes_them(run: Callable[..., Any], seed: int) -> None:
    rng = random.Random(seed)
    # Whole text, and bytes that are none.
    data = rng.choice([("naïve 漢字 🙂 𝔘 \ufeff\n" * 5).encode(), rng.randbytes(200)])
    parts, at = [], 0
    while at < len(data):
        size = rng.randint(1, 4)
        parts.append(data[at : at + size])
        at += size
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    wanted, length = [], 7
    for part in parts:
        start, length = length, length + units(decoder.decode(part))
        wanted.append({"start": start, "end": length})
    script = "(m, names) => { const a = new m.Aligner(7); return names.map((n) => a.push(n)); }"
    assert run("align.js", script, names_of(parts)) == wanted


def test_a_sample_shows_tokens_once_their_text_has_come(run: Callable[..., Any]) -> None:
    def choice(text: str, names: list[str], finish: str | None = None) -> dict[str, Any]:
        numbers = {"token_logprobs": [-1.0] * len(names), "top_logprobs": [{}] * len(names)}
        return {"text": text, "finish_reason": finish, "logprobs": {"tokens": names, **numbers}}

    # The text of "wo" is held back, for it may begin a stop text; then one is complete.
    events = [choice("hi ", ["hi", " wo"]), choice("wo", ["rl", "d!"], "stop")]
    script = """(m, events) => {
      const sample = new m.Sample(10);
      return events.map((event) => {
        sample.add(event);
        return sample.tokens.map((token) => [token.text, token.start, token.end]);
      });
    }"""
    first, last = run("generation.js", script, events)
    assert first == [["hi", 10, 12]]
    assert last == [["hi", 10, 12], [" wo", 12, 15]]
    ended = run("generation.js", script, [choice("", ["<|endoftext|>"], "stop")])
    assert ended == [[["<|endoftext|>", 10, 10]]]
    half = run("generation.js", script, [choice("a�", ["a", "bytes:\\xc3"], "length")])
    assert half == [[["a", 10, 11], ["bytes:\\xc3", 11, 12]]]


def test_probabilities_are_never_rounded_to_a_false_certainty(run: Callable[..., Any]) -> None:
    values = [0.5, 0.0123, 0.00012, 1e-9, 0.99997, 1.0]
    logs = [math.log(value) for value in values]
    found = run("probability.js", "(m, x) => x.map(m.percent)", logs)
    assert found == ["50.0 %", "1.2 %", "0.01 %", "< 0.01 %", "> 99.9 %", "100.0 %"]
    steps = run(
        "probability.js", "(m, x) => x.map(m.stepOf)", [0.0, *map(math.log, (0.5, 0.2, 0.05))]
    )
    assert steps == [0, 1, 2, 3]
    assert run("probability.js", "(m) => m.stepOf(-Infinity)") == 4
    assert run("probability.js", "(m, x) => m.perplexity(x)", logs[:3]) == pytest.approx(
        math.exp(-sum(logs[:3]) / 3)
    )
    assert run("probability.js", "(m) => m.perplexity([])") is None


# The document


@pytest.mark.parametrize("seed", range(6))
def test_edits_keep_who_wrote_what(run: Callable[..., Any], seed: int) -> None:
    """The measure: a list of characters, each with its author."""
    rng = random.Random(seed)
    cells: list[tuple[str, bool]] = []
    commands, wanted = [], []
    for _ in range(40):
        if rng.random() < 0.4:
            # Letters that only the model uses, so that what differs is never ambiguous.
            text = "".join(rng.choices("ABCDEFGH", k=rng.randint(1, 6)))
            commands.append(["run", text])
            cells += [(character, True) for character in text]
        else:
            start = rng.randint(0, len(cells))
            end = rng.randint(start, min(len(cells), start + 5))
            text = "".join(rng.choices("abcdefgh", k=rng.randint(0, 4)))
            commands.append(["splice", start, end, text])
            cells[start:end] = [(character, False) for character in text]
        parts: list[list[Any]] = []
        for character, by_model in cells:
            if parts and parts[-1][1] == by_model:
                parts[-1][0] += character
            else:
                parts.append([character, by_model])
        wanted.append(parts)
    found = run(
        "document.js",
        """(m, commands) => {
          let doc = m.documentOf("");
          return commands.map(([what, ...rest]) => {
            doc = what === "run" ? m.withRun(doc, rest[0], []) : m.spliced(doc, ...rest);
            const merged = [];
            for (const { text, byModel } of m.segments(doc)) {
              if (merged.at(-1)?.[1] === byModel) merged.at(-1)[0] += text;
              else merged.push([text, byModel]);
            }
            return merged;
          });
        }""",
        commands,
    )
    assert found == wanted


def test_an_edit_is_what_differs_and_drops_the_tokens_after_it(run: Callable[..., Any]) -> None:
    script = """(m) => {
      const token = (text, start, end) => ({ text, start, end, logprob: -1, top: [] });
      const tokens = [token("two", 4, 7), token(" three", 7, 13)];
      const doc = m.withRun(m.documentOf("one "), "two three", tokens);
      const end = m.edited(doc, "one two three!");
      const midst = m.edited(doc, "one two four");
      const branch = m.branched(doc, doc.tokens[1], { text: " four", logprob: -2 });
      return [
        end.tokens.length, m.lastRun(end) ?? null,
        midst.tokens.map((one) => one.text), midst.runs,
        branch.text, branch.tokens.map((one) => one.text), m.lastRun(branch),
        m.edited(doc, doc.text) === doc,
      ];
    }"""
    tokens, last, midst, runs, text, names, run_, same = run("document.js", script)
    assert (tokens, last) == (2, None)
    assert midst == ["two"]
    assert runs == [{"start": 4, "end": 8}]
    assert (text, names) == ("one two four", ["two", " four"])
    assert run_ == {"start": 7, "end": 12}
    assert same


def test_undo_has_many_levels_and_typing_is_one(run: Callable[..., Any]) -> None:
    script = """(m) => {
      const stack = new m.UndoStack();
      stack.keepTyping("", 0); stack.keepTyping("a", 100); stack.keepTyping("ab", 200);
      stack.keepTyping("abc", 5000);
      stack.keep("abcd");
      const back = []; let now = "abcd+";
      for (let before; (before = stack.undo(now)) !== undefined; now = before) back.push(before);
      const forth = [];
      for (let after; (after = stack.redo(now)) !== undefined; now = after) forth.push(after);
      stack.undo(now); stack.keep("other");
      return [back, forth, stack.canRedo];
    }"""
    assert run("undo.js", script) == [["abcd", "abc", ""], ["abc", "abcd", "abcd+"], False]


# Requests as code


def test_a_shell_reads_back_what_was_quoted(run: Callable[..., Any]) -> None:
    texts = [text for text in NASTY if "\0" not in text]
    quoted = run("snippets.js", "(m, x) => x.map(m.shellQuoted)", texts)
    for text, word in zip(texts, quoted, strict=True):
        printed = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, check=True)
        assert printed.stdout.decode() == text


def test_python_reads_back_what_was_written_for_it(run: Callable[..., Any]) -> None:
    value = {"texts": NASTY, "none": None, "yes": True, "no": False, "numbers": [0, -1.5, 1e-7]}
    assert ast.literal_eval(run("snippets.js", "(m, x) => m.pythonLiteral(x)", value)) == value


# Links and history


def test_a_link_gives_back_text_authors_and_settings(run: Callable[..., Any]) -> None:
    settings = {"temperature": 0.31, "top_p": 0.5, "top_k": 7, "max_tokens": 9, "n": 2, "seed": 5}
    settings |= {"stop": ["\n"], "min_p": 0.1, "repetition_penalty": 1.2, "logprobs": 3}
    script = """(m, x) => {
      const fragment = m.fragmentOf(x.doc, x.settings);
      return { ...m.sharedIn(fragment), isPlain: /^#s=[\\w-]+$/.test(fragment) };
    }"""
    for text in NASTY:
        runs = [{"start": 0, "end": units(text)}] if text else []
        doc = {"text": text, "runs": runs, "tokens": []}
        found = run("share.js", script, {"doc": doc, "settings": settings})
        assert found == {"doc": doc, "settings": settings, "isPlain": True}


def test_a_link_that_could_not_be_read_is_not_made(run: Callable[..., Any]) -> None:
    script = """(m, x) => {
      const fragment = m.fragmentOf({ text: "x".repeat(x), runs: [], tokens: [] }, {});
      return fragment && m.sharedIn(fragment).doc.text.length;
    }"""
    assert run("share.js", script, 299_900) == 299_900
    assert run("share.js", script, 300_000) is None


def test_settings_follow_what_the_server_allows(run: Callable[..., Any]) -> None:
    script = """(m) => {
      const bounds = m.BOUNDS.map((bound) => ({ ...bound, most: bound.name === "n" ? 12 : 9000 }));
      const source = { n: 14, max_tokens: 8000, stop: ["abc", "de", "f"] };
      const told = m.settingsFrom(source, bounds, { most: 2, characters: 2 });
      return [told.n, told.max_tokens, told.stop, m.settingsFrom(source).n];
    }"""
    assert run("options.js", script) == [12, 8000, ["ab", "de"], 8]


@pytest.mark.parametrize(
    "fragment", ["", "#", "#s=", "#s=%%%", "#s=AAAA", "#s=eyJ0ZXh0IjoxfQ", "#x"]
)
def test_a_damaged_link_is_no_link(run: Callable[..., Any], fragment: str) -> None:
    assert run("share.js", "(m, x) => m.sharedIn(x)", fragment) is None


def test_a_link_cannot_mark_what_is_not_there(run: Callable[..., Any]) -> None:
    pairs = [[0, 2], [1, 3], [2, 99], ["a", 3], [3, 3], None, [3, 4]]
    found = run("share.js", "(m, x) => m.documentFrom('abcd', x).runs", pairs)
    assert found == [{"start": 0, "end": 2}, {"start": 3, "end": 4}]


def test_history_is_exported_read_back_and_bounded(run: Callable[..., Any]) -> None:
    script = """(m) => {
      const entry = (id, text, time) => ({ id, time, model: "m", text, runs: [[0, 1]],
        settings: {}, seed: 1 });
      const one = entry("1", "abc", "2026-01-01T00:00:00Z");
      const more = entry("2", "abcdef", "2026-01-02T00:00:00Z");
      const other = entry("3", "xyz", "2026-01-03T00:00:00Z");
      const list = [one, more, other].reduce(m.withEntry, []);
      const back = m.imported(m.exported(list));
      const long = Array.from({ length: 150 }, (_, i) => entry(`n${i}`, `${i} text`, one.time));
      return [list.map((e) => e.id), back.map((e) => [e.id, e.text, e.seed]),
              m.merged(back, [one]).map((e) => e.id),
              m.bounded(long.reduce(m.withEntry, [])).length];
    }"""
    ids, back, merged, kept = run("history.js", script)
    assert ids == ["3", "2"]
    assert back == [["3", "xyz", 1], ["2", "abcdef", 1]]
    assert merged == ["3", "2", "1"]
    assert kept == 100


def test_a_browser_without_room_says_what_it_kept(run: Callable[..., Any]) -> None:
    # A storage that holds 1,000 characters stands in for the browser's.
    script = """async (m) => {
      const { HistoryStore } = await import("/history-store.js");
      const put = Storage.prototype.setItem;
      localStorage.clear();
      Storage.prototype.setItem = function (name, value) {
        if (value.length > 1000) throw new DOMException("full", "QuotaExceededError");
        put.call(this, name, value);
      };
      try {
        const store = new HistoryStore();
        const entry = (id) => ({ id: `${id}`, time: `2026-01-0${id}T00:00:00Z`, model: "m",
          text: `${id}`.repeat(10), runs: [], settings: m.settingsFrom({}), seed: null });
        const said = [store.take([3, 1, 2, 4, 5, 6, 7, 8].map(entry))];
        const ids = () => store.entries.map((one) => one.id).join("");
        const kept = [ids()];
        said.push(store.add(entry(9)));
        kept.push(ids());
        store.remove("9");
        kept.push(ids());
        said.push(store.add({ ...entry(9), text: "x".repeat(2000) }));
        kept.push(ids(), new HistoryStore().entries.length);
        return [said, kept];
      } finally {
        Storage.prototype.setItem = put;
        localStorage.clear();
      }
    }"""
    (taken, added, alone), (first, second, third, fourth, elsewhere) = run("options.js", script)
    room = len(first)
    assert first == "87654321"[:room]
    assert 2 <= room < 8
    assert taken.startswith(
        f"8 read, {room} added, {8 - room} left out: this browser has no more room"
    )
    assert second == "987654321"[:room]
    assert added == "The oldest made room for the newest: this browser has no more room."
    assert third == second[1:], "deleted"
    assert "in this tab only" in alone
    assert (fourth, elsewhere) == (second, room - 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "other", "entries": []}'])
def test_another_file_is_no_history(run: Callable[..., Any], text: str) -> None:
    script = "(m, x) => { try { return m.imported(x); } catch (error) { return error.message; } }"
    assert "This file is not" in run("history.js", script, text)


def test_entries_that_are_none_are_left_out(run: Callable[..., Any]) -> None:
    values = [None, 1, {"id": "1"}, {"id": "1", "time": "never", "model": "m", "text": "t"}]
    assert run("history.js", "(m, x) => m.entriesFrom(x)", values) == []


# Settings and failures


def test_settings_of_any_origin_are_within_their_bounds(run: Callable[..., Any]) -> None:
    given = {
        "temperature": 99,
        "top_p": -1,
        "top_k": 3.7,
        "max_tokens": "7",
        "n": None,
        "seed": 2**53,
        "stop": ["a", 5, "", "b" * 999, *map(str, range(20))],
        "other": 1,
    }
    found = run("options.js", "(m, x) => m.settingsFrom(x)", given)
    assert (found["temperature"], found["top_p"], found["top_k"]) == (2, 0.01, 4)
    assert (found["max_tokens"], found["n"], found["seed"]) == (128, 1, None)
    assert found["stop"] == ["a", "b" * 256, *map(str, range(14))]
    assert "other" not in found
    defaults = run("options.js", "(m) => m.DEFAULTS")
    for junk in (None, 1, "x", []):
        assert run("options.js", "(m, x) => m.settingsFrom(x)", junk) == defaults


@pytest.mark.parametrize("seed", [0, -1, 2**32, 1796046869000, -(2**53) + 1, 2**53 - 1])
def test_seed_is_an_integer_that_a_number_holds(run: Callable[..., Any], seed: int) -> None:
    assert run("options.js", "(m, x) => m.settingsFrom(x)", {"seed": seed})["seed"] == seed
    for other in (str(seed), seed + 0.5 if abs(seed) < 2**40 else 2**60, None):
        assert run("options.js", "(m, x) => m.isSeed(x)", other) is False


def test_stop_texts_are_typed_with_escapes(run: Callable[..., Any]) -> None:
    texts = ["\n", "\t", "\\n", "a\\", "\\\\t", "Q:"]
    assert run("options.js", "(m, x) => x.map(m.escaped)", ["\n", "\\n"]) == ["\\n", "\\\\n"]
    assert run("options.js", "(m, x) => x.map((t) => m.unescaped(m.escaped(t)))", texts) == texts


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "invalid_api_key", "key"),
        (429, "queue_full", "busy"),
        (429, None, "busy"),
        (503, "loading", "loading"),
        (503, "draining", "draining"),
        (503, "timeout", "timeout"),
        (502, None, "loading"),
        (400, "context_length_exceeded", "context"),
        (400, "other", "refused"),
        (413, "request_too_large", "refused"),
        (500, "engine_error", "engine"),
    ],
)
def test_failures_have_kinds(
    run: Callable[..., Any], status: int, code: str | None, kind: str
) -> None:
    assert run("api.js", "(m, [s, e]) => m.kindOf(s, e)", [status, {"code": code}]) == kind


def test_waiting_times_are_whole_seconds(run: Callable[..., Any]) -> None:
    found = run("api.js", "(m, x) => x.map(m.secondsIn)", ["3", "0.2", None, "soon", "-1"])
    assert found == [3, 1, None, None, None]


def test_progress_is_read_from_words(run: Callable[..., Any]) -> None:
    texts = ["Now: compiling 7 of 28.", "loading the weights", "0 of 0", "9 of 3"]
    assert run("connection.js", "(m, x) => x.map(m.shareDone)", texts) == [0.25, None, None, 1]
