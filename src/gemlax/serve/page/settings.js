// The settings panel: an empty field leaves the server's default, which the field shows in grey.

import { byId, el } from "./dom.js";

const KEY = "gemlax.settings";

const NUMBERS = [
  { key: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, hint: "0 always takes the likeliest token." },
  { key: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, hint: "Only the likeliest tokens that together have this probability." },
  { key: "top_k", label: "Top k", min: 0, max: 100000, step: 1, hint: "Only this many of the likeliest tokens; 0: all." },
  { key: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "Only tokens at least this likely, measured by the likeliest." },
  { key: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, hint: "Against tokens that were used at all." },
  { key: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, hint: "Against tokens that were used often." },
  { key: "repetition_penalty", label: "Repetition penalty", min: 0.1, max: 2, step: 0.05, hint: "Divides the score of used tokens; 1: off.", also: "repeat_penalty" },
  { key: "max_tokens", label: "Most tokens", min: 1, max: 10000000, step: 1, hint: "Where an answer is cut; empty: what fits.", also: "n_predict" },
  { key: "seed", label: "Seed", min: 0, max: 4294967295, step: 1, hint: "The same seed gives the same answer; empty: a new one each time." },
];

const THINKING = [["", "As the model does"], ["on", "Think first"], ["off", "Do not think"]];
const CHOICES = [["", "If it helps"], ["required", "Always"], ["none", "Never"]];

/** Read what was chosen, by key; only strings. */
function read() {
  try {
    const stored = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return Object.fromEntries(Object.entries(stored).filter(([, v]) => typeof v === "string"));
  } catch {
    return {};
  }
}

let chosen = read();

const fields = () => byId("fields").querySelectorAll("[name]");

export const systemPrompt = () => chosen.system ?? "";

/** Return the fields of a request that were set; throw an Error that names a bad one. */
export function requestSettings() {
  const body = {};
  for (const { key, label, min, max } of NUMBERS) {
    const text = chosen[key]?.trim();
    if (!text) continue;
    const value = Number(text);
    if (!(value >= min && value <= max)) throw new Error(`${label} is ${text}: a number from ${min} to ${max} is expected.`);
    body[key] = value;
  }
  const stop = (chosen.stop ?? "").split("\n").filter((line) => line);
  if (stop.length) body.stop = stop.map((line) => line.replaceAll("\\n", "\n"));
  if (chosen.thinking) body.chat_template_kwargs = { enable_thinking: chosen.thinking === "on" };
  const tools = readTools(chosen.tools ?? "");
  if (tools.length) {
    body.tools = tools;
    if (chosen.tool_choice) body.tool_choice = chosen.tool_choice;
  }
  return body;
}

function readTools(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`, { cause: error });
  }
  // A bare function is as good as one in its wrapper.
  return (Array.isArray(tools) ? tools : [tools]).map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

function store(name, value) {
  if (value) chosen[name] = value;
  else delete chosen[name];
  localStorage.setItem(KEY, JSON.stringify(chosen));
  byId("settings-open").classList.toggle("changed", Object.keys(chosen).length > 0);
}

function fieldRow(control, label, hint) {
  const id = `set-${control.name || control.getAttribute("name")}`;
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-hint`);
  return el("div", { class: "field" }, el("label", { for: id }, label), control, el("p", { id: `${id}-hint`, class: "hint" }, hint));
}

const select = (name, options) =>
  el("select", { name }, ...options.map(([value, text]) => el("option", { value }, text)));

/** Build the panel's fields; call once. */
export function buildSettings() {
  const area = (name, rows, placeholder) => el("textarea", { name, rows, placeholder, spellcheck: name === "system" ? null : "false" });
  const numbers = NUMBERS.map(({ key, label, min, max, step, hint }) =>
    fieldRow(el("input", { name: key, type: "number", min, max, step: step === 1 ? 1 : "any", inputmode: "decimal" }), label, hint),
  );
  const group = (title, ...rows) => el("fieldset", {}, el("legend", {}, title), ...rows);
  byId("fields").append(
    group(
      "Conversation",
      fieldRow(area("system", 4, "None"), "System prompt", "Goes before every conversation."),
      fieldRow(select("thinking", THINKING), "Thinking", "Where the model can."),
    ),
    group("Sampling", el("div", { class: "pairs" }, ...numbers.slice(0, 7))),
    group(
      "Length",
      el("div", { class: "pairs" }, ...numbers.slice(7)),
      fieldRow(area("stop", 2, "None"), "Stop at", "One text a line; \\n is a line break."),
    ),
    group(
      "Tools",
      fieldRow(area("tools", 5, '[{"name": "get_time", "parameters": {…}}]'), "Declarations", "JSON, as the API takes them."),
      fieldRow(select("tool_choice", CHOICES), "Call them", "Whether an answer may or must call one."),
    ),
  );
  for (const field of fields()) {
    field.addEventListener("input", () => store(field.name, field.value));
  }
  fill();
  byId("reset").addEventListener("click", () => {
    chosen = {};
    store("", "");
    fill();
  });
}

function fill() {
  for (const field of fields()) field.value = chosen[field.name] ?? "";
  store("", "");
}

/** Show the server's defaults (of GET /props) where nothing was chosen. */
export function showDefaults(defaults) {
  for (const { key, also } of NUMBERS) {
    const value = defaults[key] ?? defaults[also];
    const field = byId(`set-${key}`);
    if (typeof value === "number" && !(key === "seed" || (key === "max_tokens" && value < 0))) field.placeholder = String(value);
    else field.placeholder = key === "seed" ? "random" : "default";
  }
}

/** Point at the field that the server named in an error, if the panel has it. */
export function pointAt(param) {
  const field = param ? byId(`set-${param.split(/[.[]/, 1)[0]}`) : null;
  field?.focus();
}
