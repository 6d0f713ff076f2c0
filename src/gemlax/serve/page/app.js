// The page's one state and what its controls do. See tree.js for conversations, view.js for how
// they are drawn, generate.js for how answers come, api.js for the server.

import { explain, models, props, setKey } from "./api.js";
import { announce, byId, el, formatCount, icon, toast } from "./dom.js";
import { generate, requestBody } from "./generate.js";
import { createList } from "./list.js";
import { watchMetrics } from "./server.js";
import { buildSettings, pointAt, requestSettings, showDefaults, systemPrompt } from "./settings.js";
import * as store from "./store.js";
import * as tree from "./tree.js";
import { createView } from "./view.js";

const SAVE_EVERY_MS = 2000;
const input = byId("input");
const wide = matchMedia("(min-width: 860px)");

const state = {
  conversation: tree.newConversation(),
  jobs: new Map(), // conversation id -> {conversation, controller, removed}
  context: null,
  models: [],
};

const running = (id = state.conversation.id) => state.jobs.has(id);
const probabilities = () => byId("probabilities").getAttribute("aria-pressed") === "true";
const view = createView({ edit, regenerate, goOn, branch, answer, running, probabilities });
const list = createList({ open: openConversation, current: () => state.conversation.id, changed: reload });

/** Draw everything that depends on the conversation shown. */
function show() {
  view.show(state.conversation);
  byId("title").textContent = state.conversation.title || "New conversation";
  document.title = state.conversation.title ? `${state.conversation.title} – gemlax` : "gemlax";
  showControls();
  showContext();
}

function showControls() {
  const busy = running();
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}

function showContext() {
  const path = tree.shownPath(state.conversation);
  const last = path.findLast((index) => state.conversation.nodes[index].stats);
  const { prompt = 0, completion = 0 } = last === undefined ? {} : state.conversation.nodes[last].stats;
  const used = prompt + completion;
  const model = state.models.find((m) => m.id === byId("model").value);
  const context = state.context ?? model?.context;
  const meter = byId("context");
  meter.hidden = !context || !used;
  if (meter.hidden) return;
  const bar = byId("context-bar");
  bar.max = context;
  bar.value = used;
  bar.classList.toggle("full", used > 0.9 * context);
  byId("context-text").textContent = `${formatCount(used)} of ${formatCount(context)} tokens`;
}

async function save(conversation) {
  conversation.updated = Date.now();
  try {
    await store.save(conversation);
    await list.draw();
  } catch (error) {
    toast(`The browser could not keep this conversation: ${error.message}`);
  }
}

/** Stream an answer into node `index` of the conversation shown. */
async function run(index, { onward = false } = {}) {
  const { conversation } = state;
  const node = conversation.nodes[index];
  let settings;
  try {
    settings = requestSettings();
  } catch (error) {
    node.finish = "error";
    node.error = { title: "A setting is wrong", text: error.message };
    show();
    return;
  }
  const path = tree.pathTo(conversation, onward ? index : node.parent);
  const body = requestBody({
    model: byId("model").value,
    messages: tree.apiMessages(conversation, path, systemPrompt()),
    settings,
    probabilities: probabilities(),
    goOn: onward,
  });
  const job = { conversation, controller: new AbortController(), removed: false };
  node.finish = "running";
  state.jobs.set(conversation.id, job);
  show();
  view.toEnd();
  announce("The answer begins");
  save(conversation);
  let saved = performance.now();
  const failure = await generate(node, body, job.controller.signal, () => {
    if (state.conversation === conversation) {
      view.update(index);
      showContext();
    }
    if (performance.now() - saved > SAVE_EVERY_MS && !job.removed) {
      saved = performance.now();
      save(conversation);
    }
  });
  state.jobs.delete(conversation.id);
  if (job.removed) return;
  await save(conversation);
  if (state.conversation === conversation) show();
  announceEnd(node);
  if (failure?.status === 401) askKey(() => regenerate(index));
  else if (node.error?.param) pointAt(node.error.param);
}

function announceEnd(node) {
  if (node.error) announce(`${node.error.title}. ${node.error.text}`);
  else if (node.finish === "stopped") announce("Stopped");
  else if (node.calls?.length) announce(`The model calls ${node.calls.map((call) => call.name).join(", ")}`);
  else announce(`Answer: ${node.content.slice(0, 300)}`);
}

function respond(parent) {
  const index = tree.addNode(state.conversation, parent, { role: "assistant" });
  return run(index);
}

function send() {
  const content = input.value;
  if (!content.trim()) return;
  if (running()) {
    toast("Esc stops the answer; then the next message can go");
    return;
  }
  input.value = "";
  grow();
  const parent = tree.shownPath(state.conversation).at(-1) ?? -1;
  respond(tree.addNode(state.conversation, parent, { role: "user", content }));
}

function edit(index, content) {
  const { role, parent, call, name, model } = state.conversation.nodes[index];
  const copy = tree.addNode(state.conversation, parent, { role, content, call, name, model });
  if (role === "user") {
    respond(copy);
    input.focus();
  } else {
    finishEdit(copy);
  }
}

async function finishEdit(index) {
  const { conversation } = state;
  show();
  view.focus(index);
  await save(conversation);
  if (conversation.nodes[index].role === "tool" && !tree.openCalls(conversation).length) respond(index);
}

function regenerate(index) {
  if (running()) return;
  const { nodes } = state.conversation;
  const { parent, content, reasoning, calls } = nodes[index];
  // An answer that failed before its first word is no version worth keeping.
  if (nodes[index].error && !content && !reasoning && !calls) run(index);
  else respond(parent);
}

function goOn(index) {
  return run(index, { onward: true });
}

function branch(index, step) {
  const next = tree.stepBranch(state.conversation, index, step);
  if (next === index) return;
  show();
  view.focus(next);
  const { nodes } = state.conversation;
  const all = tree.siblings(state.conversation, next);
  announce(`Version ${all.indexOf(next) + 1} of ${all.length}: ${nodes[next].content.slice(0, 100)}`);
  save(state.conversation);
}

/** Take the answers of tools and let the model go on. */
function answer(answers) {
  let parent = tree.shownPath(state.conversation).at(-1);
  for (const one of answers) parent = tree.addNode(state.conversation, parent, { role: "tool", ...one });
  respond(parent);
  input.focus();
}

function stop() {
  state.jobs.get(state.conversation.id)?.controller.abort();
}

function startNew() {
  state.conversation = tree.newConversation();
  show();
  list.draw();
  closeSide();
  input.focus();
}

async function openConversation(id) {
  const conversation = state.jobs.get(id)?.conversation ?? (await store.load(id));
  if (!conversation) return;
  state.conversation = conversation;
  show();
  view.toEnd();
  list.draw();
  closeSide();
  input.focus();
}

/** Stop an answer whose conversation is gone, so that it is not written again. */
function removeJob(job) {
  job.removed = true;
  job.controller.abort();
}

/** A conversation was renamed or removed, here or in another tab. */
async function reload(id) {
  const job = state.jobs.get(id);
  const stored = await store.load(id);
  if (job) {
    if (stored) job.conversation.title = stored.title;
    else removeJob(job);
  }
  if (id !== state.conversation.id) return;
  if (stored && !job) state.conversation = stored;
  if (!stored) state.conversation = tree.newConversation();
  show();
}

function askKey(then) {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  dialog.addEventListener(
    "close",
    () => {
      if (dialog.returnValue !== "ok" || !byId("key").value) return;
      setKey(byId("key").value.trim());
      byId("key").value = "";
      connect();
      then?.();
    },
    { once: true },
  );
}

function banner(title, text = "") {
  const box = byId("banner");
  box.hidden = !title;
  box.replaceChildren(...(title ? [el("strong", {}, title), " ", text] : []));
}

/** Learn the models and the defaults; while the server cannot say, tell so and try again. */
async function connect() {
  try {
    state.models = await models();
    showModels();
    banner("");
  } catch (error) {
    const { title, text } = explain(error);
    if (error.status === 401) {
      askKey();
      banner(title, "Send a message to be asked again.");
    } else {
      banner(title, text);
      setTimeout(connect, 3000);
    }
    return;
  }
  try {
    const { context, defaults } = await props();
    state.context = context;
    showDefaults(defaults);
  } catch {
    showDefaults({}); // a server without /props: its defaults stay unknown
  }
  showContext();
}

function showModels() {
  const select = byId("model");
  const wanted = select.value || localStorage.getItem("gemlax.model");
  const options = (adapters) =>
    state.models.filter((m) => m.adapter === adapters).map((m) => el("option", { value: m.id }, m.id));
  const adapters = options(true);
  select.replaceChildren(...options(false));
  if (adapters.length) select.append(el("optgroup", { label: "Adapters" }, ...adapters));
  if (state.models.some((m) => m.id === wanted)) select.value = wanted;
  select.disabled = state.models.length < 2;
}

function grow() {
  input.style.setProperty("height", "auto");
  input.style.setProperty("height", `${Math.min(input.scrollHeight, 0.4 * innerHeight)}px`);
}

// Beside the messages the list is there unless folded; where there is no room it is a drawer that
// is shut unless opened. Both are remembered, and the style sheet shows the one that applies.
const drawerOpen = () => !wide.matches && document.body.classList.contains("drawer");

function setSide(open) {
  if (wide.matches) document.body.classList.toggle("folded", !open);
  else document.body.classList.toggle("drawer", open);
  showSide();
}

function sideOpen() {
  return wide.matches ? !document.body.classList.contains("folded") : drawerOpen();
}

function showSide() {
  byId("side-open").setAttribute("aria-expanded", String(sideOpen()));
}

function closeSide() {
  if (drawerOpen()) setSide(false);
}

function setSettings(open) {
  document.body.classList.toggle("settings-open", open);
  byId("settings").inert = !open;
  byId("settings-open").setAttribute("aria-expanded", String(open));
  if (open) byId("settings-close").focus();
  else byId("settings-open").focus();
}

const settingsOpen = () => document.body.classList.contains("settings-open");

function setTheme(theme) {
  const { dataset } = document.documentElement;
  if (theme === "auto") delete dataset.theme;
  else dataset.theme = theme;
  localStorage.setItem("gemlax.theme", theme);
  const names = { auto: ["auto", "as the system"], light: ["sun", "light"], dark: ["moon", "dark"] };
  const [picture, name] = names[theme];
  const button = byId("theme");
  button.replaceChildren(icon(picture));
  button.title = `Theme: ${name}`;
  button.setAttribute("aria-label", button.title);
}

function nextTheme() {
  const order = ["auto", "light", "dark"];
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(order[(order.indexOf(now) + 1) % order.length]);
  announce(byId("theme").title);
}

function setProbabilities(on) {
  byId("probabilities").setAttribute("aria-pressed", String(on));
  localStorage.setItem("gemlax.probabilities", on ? "1" : "");
}

function onKey(event) {
  const dialog = document.querySelector("dialog[open]");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (!dialog) startNew();
  } else if (event.key === "Escape" && !dialog) {
    if (settingsOpen()) setSettings(false);
    else if (drawerOpen()) setSide(false);
    else if (running()) stop();
  } else if (event.key === "?" && !dialog && !event.target.matches("input, textarea, select")) {
    byId("help").showModal();
  }
}

function listen() {
  const click = (id, act) => byId(id).addEventListener("click", act);
  document.addEventListener("keydown", onKey);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  click("stop", () => {
    stop();
    input.focus();
  });
  click("new", startNew);
  click("new-top", startNew);
  click("side-open", () => setSide(!sideOpen()));
  click("shade", () => setSide(false));
  click("settings-open", () => setSettings(!settingsOpen()));
  click("settings-close", () => setSettings(false));
  click("theme", nextTheme);
  click("help-open", () => byId("help").showModal());
  click("probabilities", () => {
    setProbabilities(!probabilities());
    show();
  });
  byId("model").addEventListener("change", (event) => {
    localStorage.setItem("gemlax.model", event.target.value);
    showContext();
  });
  wide.addEventListener("change", showSide);
  addEventListener("pagehide", () => state.jobs.forEach(({ conversation }) => store.save(conversation)));
  store.onOtherTab(async (id) => {
    if (!running(id)) await reload(id);
    await list.draw();
  });
}

for (const place of document.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));
buildSettings();
setProbabilities(localStorage.getItem("gemlax.probabilities") === "1");
setTheme(document.documentElement.dataset.theme ?? "auto");
showSide();
listen();
show();
list.draw();
connect();
watchMetrics();
input.focus();
