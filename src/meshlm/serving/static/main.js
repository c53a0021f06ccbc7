// Puts the page together: what the buttons and keys do, and what is shown when.

import { AlternativesPanel } from "./alternatives.js";
import { Api, ApiError, wellFormed } from "./api.js";
import { setUpTheme } from "./appearance.js";
import { Counter } from "./counter.js";
import { KeyDialog, copied, setUpCode, setUpExamples } from "./dialogs.js";
import { documentOf, lastRun } from "./document.js";
import { button, byId, node } from "./dom.js";
import { Editor } from "./editor.js";
import { HistoryView } from "./history-view.js";
import { Notices } from "./notices.js";
import { drawSeed, requestOf, settingsFrom } from "./options.js";
import { grouped, perplexity } from "./probability.js";
import { Runner } from "./runner.js";
import { SamplesView } from "./samples.js";
import { Session } from "./session.js";
import { SettingsPanel } from "./settings.js";
import { documentFrom, fragmentOf, isShared, sharedIn } from "./share.js";
import { keep, keepKey, recall, recallKey } from "./storage.js";
import { TokensView } from "./tokens.js";
import { Watch } from "./watch.js";

const NARROW = matchMedia("(max-width: 60rem)");
const base = new URL(".", document.baseURI).href;
let key = recallKey();
let model = "";
let view = /** @type {"text" | "tokens"} */ ("text");
let wasBusy = false;
let isLinkDamaged = false;

const announce = (/** @type {string} */ words) => (node("status").textContent = words);
const api = new Api(base, () => key);
const notices = new Notices(announce);
const counter = new Counter(api);
const session = new Session(() => show());
const panel = new SettingsPanel(settingsFrom(recall("settings")), () => {
  keep("settings", panel.settings);
  counter.show(session.doc.text, panel.settings.max_tokens);
});
const editor = new Editor({
  onText: (text) => session.type(text),
  onUndo: () => step("undo"),
  onRedo: () => step("redo"),
});
const alternatives = new AlternativesPanel({
  onChoose: (token, chosen) => {
    tokens.focus();
    void runner.branch(token, chosen);
  },
  onClose: () => tokens.focus(),
});
const tokens = new TokensView({
  onOpen: (token, at, pinned) => {
    if (!runner.isBusy) alternatives.open(token, at, pinned);
  },
  onLeave: () => alternatives.leave(),
});
const samples = new SamplesView({
  onUse: (sample) => {
    runner.use(sample);
    announce("The sample is part of the text now.");
    button("generate").focus();
  },
  onDismiss: () => {
    runner.dismiss();
    button("generate").focus();
  },
});
const history_ = new HistoryView({
  onRestore: (entry) => {
    runner.dismiss();
    session.change(documentFrom(entry.text, entry.runs));
    panel.set(entry.settings);
    if (entry.seed !== null) panel.ran(entry.seed);
    announce("Restored.");
  },
});
const runner = new Runner({
  api,
  session,
  panel,
  counter,
  samples,
  notices,
  announce,
  model: () => model,
  tellStats: (words) => (node("stats").textContent = words),
  onState: showBusy,
  onFailure: (error, again) => fail(error, again),
  onDone: (seed) => {
    panel.ran(seed);
    if (!samples.isOpen) history_.add(entryOf(seed));
  },
});
const keyDialog = new KeyDialog((given) => {
  key = given;
  keepKey(given);
  void loadFacts();
});
const watch = new Watch(base, {
  notices,
  announce,
  isBusy: () => runner.isBusy,
  again: () => runner.again,
  onReady: () => {
    void loadFacts();
    // What was said of the server meanwhile stood in its place.
    if (isLinkDamaged) tellDamaged();
    isLinkDamaged = false;
  },
});

setUpExamples((example) => {
  runner.dismiss();
  session.change(documentOf(example.text));
  panel.set({ stop: [], ...example.settings });
  choose("text");
  editor.focus();
});
setUpCode(() => ({ base, body: currentRequest(), withKey: key !== "" }));
setUpButtons();
setUpKeys();
setUpTheme();
openShared();
addEventListener("hashchange", openShared);
byId("settings", HTMLDetailsElement).open = !NARROW.matches;
show();
void watch.ask();

function setUpButtons() {
  const actions = {
    generate: () => void runner.generate(),
    stop: () => runner.stop(),
    regenerate: () => void runner.regenerate(),
    measure: () => void runner.measure(),
    undo: () => step("undo"),
    redo: () => step("redo"),
    clear: () => {
      runner.dismiss();
      session.change(documentOf(""));
      choose("text");
      editor.focus();
    },
    share: () => void share(),
    "view-text": () => choose("text"),
    "view-tokens": () => choose("tokens"),
  };
  for (const [id, action] of Object.entries(actions)) button(id).addEventListener("click", action);
  document.querySelector(".skip")?.addEventListener("click", (event) => {
    event.preventDefault();
    choose("text");
    editor.focus();
  });
}

function setUpKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const command = event.ctrlKey || event.metaKey;
    if (event.key === "Escape") {
      if (runner.isBusy) runner.stop();
      else alternatives.close();
    } else if (command && event.key === "Enter") {
      event.preventDefault();
      void runner.generate();
    } else if (command && !event.altKey && isUndoPlace(event.target)) {
      const letter = event.key.toLowerCase();
      if (letter !== "z" && letter !== "y") return;
      event.preventDefault();
      step(letter === "y" || event.shiftKey ? "redo" : "undo");
    }
  });
}

/**
 * Whether an undo there is one of the text: fields of settings have their own.
 * @param {EventTarget | null} target
 */
function isUndoPlace(target) {
  return !(target instanceof HTMLInputElement) || target.type === "range";
}

/** @param {"undo" | "redo"} which */
function step(which) {
  if (runner.isBusy) return;
  session[which]();
}

/** @param {"text" | "tokens"} chosen */
function choose(chosen) {
  view = chosen;
  show();
}

/** Shows the document, and which buttons can be used. */
function show() {
  const { doc } = session;
  const follow = runner.isBusy && editor.isAtEnd;
  alternatives.close();
  const isText = view === "text";
  node("editor").hidden = node("legend-text").hidden = !isText;
  node("tokens-page").hidden = node("legend-tokens").hidden = isText;
  button("view-text").setAttribute("aria-pressed", String(isText));
  button("view-tokens").setAttribute("aria-pressed", String(!isText));
  editor.show(doc);
  if (!isText) tokens.show(doc);
  node("tokens").hidden = doc.text === "";
  node("starters").hidden = doc.text !== "";
  node("measure-result").textContent = measureWords();
  if (follow) editor.scrollToEnd();
  if (!runner.isBusy) counter.show(doc.text, panel.settings.max_tokens);
  showButtons();
}

function showButtons() {
  const busy = runner.isBusy;
  const { doc } = session;
  const run = lastRun(doc);
  button("generate").textContent = run ? "Continue" : "Generate";
  button("regenerate").disabled = busy || !run;
  button("undo").disabled = busy || !session.canUndo;
  button("redo").disabled = busy || !session.canRedo;
  button("clear").disabled = busy || doc.text === "";
  button("measure").disabled = busy || doc.text === "";
  button("open-examples").disabled = busy;
}

/** Shows that the model begins or ends to write. The focus stays with the button in that place. */
function showBusy() {
  const busy = runner.isBusy;
  const [shown, hidden] = busy
    ? [button("stop"), button("generate")]
    : [button("generate"), button("stop")];
  const hadFocus = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (hadFocus) shown.focus();
  editor.setBusy(busy);
  tokens.setBusy(busy);
  if (wasBusy && !busy) {
    counter.show(session.doc.text, panel.settings.max_tokens);
    watch.tell();
  }
  wasBusy = busy;
  showButtons();
}

function measureWords() {
  const { doc } = session;
  const known = doc.tokens.filter((token) => token.logprob !== null);
  const value = perplexity(known.map((token) => /** @type {number} */ (token.logprob)));
  if (value === null)
    return "Gives each token of your own text its probability, and the perplexity of the whole.";
  const covered = doc.tokens.reduce((sum, token) => sum + token.end - token.start, 0);
  const rest = covered < doc.text.length ? " that are measured" : "";
  return `Perplexity ${value.toFixed(2)} over the ${grouped(known.length)} tokens${rest}.`;
}

function currentRequest() {
  const { settings } = panel;
  const seed = settings.seed ?? drawSeed();
  return requestOf(settings, {
    model,
    prompt: wellFormed(session.doc.text),
    seed,
    maxTokens: settings.max_tokens,
  });
}

/**
 * @param {number} seed
 * @returns {import("./history.js").Entry}
 */
function entryOf(seed) {
  const { text, runs } = session.doc;
  const id = [drawSeed(), drawSeed()].map((part) => part.toString(16).padStart(8, "0")).join("");
  const time = new Date().toISOString();
  return {
    id,
    time,
    model,
    text,
    runs: runs.map((run) => [run.start, run.end]),
    settings: panel.settings,
    seed,
  };
}

async function share() {
  const fragment = fragmentOf(session.doc, panel.settings);
  let words = "Too long for a link";
  if (fragment !== null) {
    const isCopied = await copied(base + fragment);
    // Where nothing can be copied, the link is put where it can be seen.
    if (!isCopied) history.replaceState(null, "", fragment);
    words = isCopied ? "Link copied" : "Link is in the address";
  }
  button("share").textContent = words;
  announce(`${words}.`);
  setTimeout(() => (button("share").textContent = "Share"), 2500);
}

/** Opens what the address holds, once: what is written later is not to be lost by a reload. */
function openShared() {
  if (!isShared(location.hash)) return;
  const shared = sharedIn(location.hash);
  if (shared && runner.isBusy) return;
  if (shared) {
    session.change(shared.doc);
    panel.set(shared.settings);
  } else {
    isLinkDamaged = model === "";
    tellDamaged();
  }
  history.replaceState(null, "", base);
}

function tellDamaged() {
  const close = () => {
    notices.clear("damaged");
    editor.focus();
  };
  notices.show({
    id: "damaged",
    title: "This link is damaged.",
    text: "It holds no text that can be read: ask for it again. Your own text is as it was.",
    actions: [{ text: "Close", run: close }],
  });
}

/**
 * @param {ApiError} error
 * @param {() => void} again
 */
function fail(error, again) {
  if (error.kind === "key")
    keyDialog.ask(key === "" ? "This server wants an API key." : error.message, again);
  else if (["lost", "loading", "draining", "engine"].includes(error.kind)) void watch.ask();
}

/** Loads what is served and what it allows. */
async function loadFacts() {
  try {
    const [models, version] = await Promise.all([
      api.get("v1/models"),
      api.get("version?limits=1"),
    ]);
    const { id, context_length: context, vocab_size: vocabulary } = models.data[0];
    model = id;
    counter.contextLength = context;
    node("model-name").textContent = id;
    node("model-facts").textContent = `context ${grouped(context)}`;
    node("model-more").textContent = ` · vocabulary ${grouped(vocabulary)}`;
    node("facts").title = `MeshLM ${version.version}, JAX ${version.jax}`;
    const limits = version.limits ?? {};
    panel.allow(
      {
        n: Math.min(limits.max_n, limits.max_samples),
        logprobs: limits.max_logprobs,
        max_tokens: context - 1,
        top_k: Math.min(vocabulary, 200),
      },
      { most: limits.max_stop, characters: limits.max_stop_chars },
    );
    show();
  } catch (error) {
    if (error instanceof ApiError) fail(error, () => {});
    else throw error;
  }
}
