// A conversation is a tree of messages in one list: `nodes[i].parent` is the index of an earlier
// node, or -1. `picked` of a node (and of the conversation) is the child that is shown. Editing and
// regenerating add a sibling; nothing is overwritten.

const ROLES = ["user", "assistant", "tool"];
const MAX_TITLE = 120;

export function newConversation() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? randomId(), title: "", created: now, updated: now, picked: -1, nodes: [] };
}

// crypto.randomUUID is missing on plain http other than loopback.
function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const holder = (conversation, index) => (index < 0 ? conversation : conversation.nodes[index]);

/** Return the indices of the shown messages, from the first to the last. */
export function shownPath(conversation) {
  const path = [];
  for (let index = conversation.picked; index >= 0; index = conversation.nodes[index].picked) {
    path.push(index);
  }
  return path;
}

/** Return the indices from the first message down to this one. */
export function pathTo(conversation, index) {
  const path = [];
  for (; index >= 0; index = conversation.nodes[index].parent) path.unshift(index);
  return path;
}

export function siblings(conversation, index) {
  const { parent } = conversation.nodes[index];
  return conversation.nodes.flatMap((node, i) => (node.parent === parent ? [i] : []));
}

/** Add a message below `parent` (-1: a first one), show it, and return its index. */
export function addNode(conversation, parent, node) {
  const index = conversation.nodes.length;
  conversation.nodes.push({ content: "", ...node, parent, picked: -1, created: Date.now() });
  holder(conversation, parent).picked = index;
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return index;
}

export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** Show the sibling `step` places further, round the ends not; return the index now shown. */
export function stepBranch(conversation, index, step) {
  const all = siblings(conversation, index);
  const next = all[all.indexOf(index) + step];
  if (next === undefined) return index;
  holder(conversation, conversation.nodes[index].parent).picked = next;
  return next;
}

/** Return the calls at the end of the shown path that have no answer yet. */
export function openCalls(conversation) {
  const path = shownPath(conversation);
  const answered = new Set();
  while (path.length && conversation.nodes[path.at(-1)].role === "tool") {
    answered.add(conversation.nodes[path.pop()].call);
  }
  const last = path.length ? conversation.nodes[path.at(-1)] : null;
  return (last?.calls ?? []).filter((call) => !answered.has(call.id));
}

/** Return the messages of a path as the API takes them. */
export function apiMessages(conversation, path, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const index of path) {
    const { role, content, reasoning, calls, call, name } = conversation.nodes[index];
    const message = { role, content };
    if (role === "tool") Object.assign(message, { tool_call_id: call, name });
    if (reasoning) message.reasoning_content = reasoning;
    if (calls?.length) {
      message.tool_calls = calls.map((c) => ({
        id: c.id,
        type: "function",
        function: { name: c.name, arguments: c.arguments },
      }));
      if (!content) message.content = null;
    }
    messages.push(message);
  }
  return messages;
}

/** Return a conversation made of what a file holds, or throw an Error that says what is wrong. */
export function checkConversation(value) {
  const fail = (what) => {
    throw new Error(`Not a conversation of this page: ${what}`);
  };
  if (typeof value !== "object" || value === null || !Array.isArray(value.nodes)) fail("no messages");
  const text = (v) => (typeof v === "string" ? v : "");
  const time = (v) => (Number.isFinite(v) ? v : Date.now());
  const nodes = value.nodes.map((node, index) => {
    if (typeof node !== "object" || node === null) fail(`message ${index} is no object`);
    if (!ROLES.includes(node.role)) fail(`message ${index} has the role ${node.role}`);
    const { parent } = node;
    if (!Number.isInteger(parent) || parent < -1 || parent >= index) fail(`message ${index} hangs nowhere`);
    const kept = { role: node.role, content: text(node.content), parent, picked: -1, created: time(node.created) };
    for (const key of ["reasoning", "model", "finish", "call", "name"]) {
      if (typeof node[key] === "string") kept[key] = node[key];
    }
    if (Array.isArray(node.calls)) {
      kept.calls = node.calls.map((c) => ({ id: text(c?.id), name: text(c?.name), arguments: text(c?.arguments) }));
    }
    if (Array.isArray(node.tokens)) kept.tokens = node.tokens.filter(isToken);
    if (typeof node.stats === "object" && node.stats !== null) {
      kept.stats = Object.fromEntries(Object.entries(node.stats).filter(([, v]) => Number.isFinite(v)));
    }
    return kept;
  });
  const pick = (picked, parent) => {
    if (Number.isInteger(picked) && nodes[picked]?.parent === parent) return picked;
    return nodes.findLastIndex((node) => node.parent === parent);
  };
  nodes.forEach((node, index) => {
    node.picked = pick(value.nodes[index].picked, index);
  });
  const { id, title, created, updated } = { ...newConversation(), ...value };
  return {
    id: /^[\w-]{1,64}$/.test(id) ? id : randomId(),
    title: text(title).slice(0, MAX_TITLE),
    created: time(created),
    updated: time(updated),
    picked: pick(value.picked, -1),
    nodes,
  };
}

function isToken(token) {
  const pair = (v) => Array.isArray(v) && typeof v[0] === "string" && Number.isFinite(v[1]);
  return pair(token) && Array.isArray(token[2]) && token[2].every(pair);
}
