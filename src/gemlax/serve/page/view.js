// The messages of one conversation. `show` draws the shown path anew; `update` redraws one message,
// at most once a frame, while it grows.

import { byId, copyText, el, formatCount, formatRate, icon, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { hideTip, renderTokens, watchTokens } from "./tokens.js";
import { openCalls, shownPath, siblings } from "./tree.js";

const NAMES = { user: "You", assistant: "Answer", tool: "Tool" };
const ENDS = {
  length: "cut at the most tokens",
  stopped: "stopped",
  running: "broken off",
  abort: "broken off by the server",
  content_filter: "filtered",
};

/**
 * Make the view. `actions`: edit(index, text), regenerate(index), goOn(index), branch(index, step),
 * answer(texts by call id), running(): whether this conversation is being answered,
 * probabilities(): whether tokens are shown.
 */
export function createView(actions) {
  const log = byId("log");
  const scroll = byId("scroll");
  const open = new Set(); // "index kind" of what was unfolded
  let conversation = null;
  let articles = new Map();
  const waiting = new Set();

  const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);

  function fold(index, kind, title, ...content) {
    const key = `${index} ${kind}`;
    const node = el("details", { class: kind.split(" ")[0], open: open.has(key) }, el("summary", {}, icon("chevron"), title), ...content);
    node.addEventListener("toggle", () => (node.open ? open.add(key) : open.delete(key)));
    return node;
  }

  /** Build the frame of a message once; `fill` puts the parts in that change. */
  function makeArticle(index) {
    const { role } = conversation.nodes[index];
    const parts = { thinking: null, thought: null, calls: el("div", { class: "calls" }) };
    parts.who = el("p", { class: "who" });
    parts.body = el("div", { class: "body" });
    parts.error = el("div", { class: "error", role: "alert", hidden: true });
    parts.foot = el("footer");
    const article = el("article", { class: `message ${role}`, tabindex: "0", "data-index": index });
    article.append(parts.who, parts.body, parts.calls, parts.error, parts.foot);
    article.parts = parts;
    fill(article, index);
    return article;
  }

  function fill(article, index) {
    const node = conversation.nodes[index];
    const { parts } = article;
    const live = node.finish === "running" && actions.running();
    const name = node.role === "tool" ? node.name || "Tool" : NAMES[node.role];
    parts.who.textContent = node.role === "assistant" && node.model ? node.model : name;
    article.setAttribute("aria-label", node.role === "tool" ? `Answer of the tool ${name}` : name);
    article.classList.toggle("live", live);
    fillThinking(article, index, live);
    fillBody(parts.body, node, live);
    fillCalls(parts.calls, node, index);
    fillError(parts.error, node, index);
    if (!live || !parts.foot.childElementCount) parts.foot.replaceChildren(...footer(index, live));
    else parts.foot.querySelector(".stats").textContent = statsText(node, live);
  }

  function fillThinking({ parts }, index, live) {
    const { reasoning, content, stats } = conversation.nodes[index];
    if (!reasoning) return;
    if (!parts.thinking) {
      parts.thought = el("div", { class: "thought" });
      parts.label = el("span");
      parts.thinking = fold(index, "thinking", parts.label, parts.thought);
      parts.body.before(parts.thinking);
    }
    const size = stats?.reasoning ? ` · ${formatCount(stats.reasoning)} tokens` : "";
    parts.label.textContent = live && !content ? "Thinking …" : `Thoughts${size}`;
    renderMarkdown(parts.thought, reasoning);
  }

  function fillBody(body, node, live) {
    const asTokens = node.tokens?.length > 0 && actions.probabilities();
    const kind = asTokens ? "tokens" : node.role === "assistant" ? "markdown" : "plain";
    if (body.kind !== kind) {
      body.replaceChildren();
      body.blocks = body.tokens = undefined;
      body.className = `body ${kind}`;
      body.kind = kind;
    }
    if (kind === "tokens") renderTokens(body, node.tokens);
    else if (kind === "markdown") renderMarkdown(body, node.content);
    else body.textContent = node.content;
    body.classList.toggle("waiting", live && !node.content && !node.reasoning && !node.calls?.length);
  }

  function fillCalls(box, node, index) {
    const calls = node.calls ?? [];
    for (let i = box.childElementCount; i < calls.length; i++) {
      box.append(fold(index, `call ${i}`, el("span"), el("pre", { tabindex: "0", "aria-label": "Arguments" }, el("code"))));
    }
    calls.forEach((call, i) => {
      box.children[i].querySelector("summary span").textContent = `Called ${call.name}`;
      box.children[i].querySelector("code").textContent = pretty(call.arguments);
    });
  }

  function fillError(box, node, index) {
    box.hidden = !node.error;
    if (!node.error) return;
    const again = el("button", { type: "button", onclick: () => actions.regenerate(index) }, "Try again");
    box.replaceChildren(el("strong", {}, node.error.title), el("p", {}, node.error.text), again);
    if (node.error.param) {
      box.append(el("p", { class: "hint" }, "It concerns ", el("code", {}, node.error.param), "."));
    }
  }

  function footer(index, live) {
    const node = conversation.nodes[index];
    const all = siblings(conversation, index);
    const position = all.indexOf(index) + 1;
    const parts = [];
    if (all.length > 1) {
      const group = el("div", { class: "branches", role: "group", "aria-label": `Version ${position} of ${all.length}` });
      group.append(
        iconButton("left", "Earlier version (←)", () => actions.branch(index, -1), { disabled: position === 1 }),
        el("span", {}, `${position}/${all.length}`),
        iconButton("right", "Later version (→)", () => actions.branch(index, 1), { disabled: position === all.length }),
      );
      parts.push(group);
    }
    parts.push(el("span", { class: "stats" }, statsText(node, live)));
    const failed = node.error && !node.content && !node.calls;
    if (!live && !failed) {
      const disabled = actions.running();
      parts.push(iconButton("copy", "Copy", () => copyText(node.content), { class: "copy-message" }));
      parts.push(iconButton("edit", "Edit (E)", () => edit(index), { class: "edit", disabled }));
      if (node.role === "assistant") {
        parts.push(iconButton("again", "Answer again (R)", () => actions.regenerate(index), { class: "regenerate", disabled }));
        if (["length", "stopped", "error", "running"].includes(node.finish) && node.content && !node.calls) {
          parts.push(iconButton("more", "Go on", () => actions.goOn(index), { class: "go-on", disabled }));
        }
      }
    }
    return parts;
  }

  function edit(index) {
    const article = articles.get(index);
    const { content, role } = conversation.nodes[index];
    const area = el("textarea", { "aria-label": "New text", rows: Math.min(16, content.split("\n").length + 1) });
    area.value = content;
    const close = () => {
      form.replaceWith(article.parts.body);
      article.parts.foot.hidden = false;
      article.focus();
    };
    const save = (event) => {
      event.preventDefault();
      if (area.value === content && role !== "user") return close();
      return actions.edit(index, area.value);
    };
    const form = el(
      "form",
      { class: "editor", onsubmit: save },
      area,
      el(
        "div",
        { class: "buttons" },
        el("button", { type: "submit", class: "primary" }, role === "user" ? "Send" : "Save"),
        el("button", { type: "button", onclick: close }, "Cancel"),
      ),
    );
    area.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save(event);
    });
    article.parts.body.replaceWith(form);
    article.parts.foot.hidden = true;
    area.focus();
  }

  /** A box for the answer of each call that has none yet. */
  function answerForm() {
    const calls = actions.running() ? [] : openCalls(conversation);
    if (!calls.length) return null;
    const areas = calls.map((call) => [call, el("textarea", { rows: 3, id: `answer-${call.id}`, placeholder: '{"result": …}', spellcheck: "false" })]);
    const submit = (event) => {
      event.preventDefault();
      actions.answer(areas.map(([call, area]) => ({ call: call.id, name: call.name, content: area.value })));
    };
    return el(
      "form",
      { class: "answers", onsubmit: submit },
      ...areas.flatMap(([call, area]) => [el("label", { for: area.id }, "What did ", el("code", {}, call.name), " answer?"), area]),
      el("button", { type: "submit", class: "primary" }, calls.length > 1 ? "Send the answers" : "Send the answer"),
    );
  }

  function onKey(event) {
    const article = event.target;
    if (!article.matches?.("article.message") || event.ctrlKey || event.metaKey || event.altKey) return;
    const index = Number(article.dataset.index);
    const act = {
      ArrowLeft: () => actions.branch(index, -1),
      ArrowRight: () => actions.branch(index, 1),
      ArrowUp: () => article.previousElementSibling?.focus(),
      ArrowDown: () => (article.nextElementSibling ?? byId("input")).focus(),
      e: () => actions.running() || edit(index),
      r: () => actions.running() || (conversation.nodes[index].role === "assistant" && actions.regenerate(index)),
      c: () => copyText(conversation.nodes[index].content),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  log.addEventListener("keydown", onKey);
  watchTokens(log);
  scroll.addEventListener("scroll", () => (byId("to-end").hidden = atEnd()), { passive: true });
  byId("to-end").addEventListener("click", toEnd);

  return {
    toEnd,
    focus: (index) => articles.get(index)?.focus(),
    show(next) {
      const same = conversation === next;
      const top = scroll.scrollTop;
      const stay = same && !atEnd();
      hideTip();
      if (!same) open.clear();
      conversation = next;
      const path = shownPath(conversation);
      articles = new Map(path.map((index) => [index, makeArticle(index)]));
      const form = answerForm();
      log.replaceChildren(...articles.values(), ...(form ? [form] : []));
      document.body.classList.toggle("empty", path.length === 0);
      scroll.scrollTop = stay ? top : scroll.scrollHeight;
      byId("to-end").hidden = atEnd();
    },
    update(index) {
      if (!waiting.size) requestAnimationFrame(draw);
      waiting.add(index);
    },
  };

  function draw() {
    const follow = atEnd();
    for (const index of waiting) if (articles.has(index)) fill(articles.get(index), index);
    waiting.clear();
    if (follow) toEnd();
    byId("to-end").hidden = atEnd();
  }
}

function statsText(node, live) {
  const { stats } = node;
  const parts = [];
  if (stats) {
    parts.push(`${formatCount(stats.completion)} tokens`);
    if (stats.rate) parts.push(`${formatRate(stats.rate)} tok/s`);
    if (!live && stats.wait) parts.push(`first after ${stats.wait.toFixed(stats.wait < 10 ? 2 : 0)} s`);
    if (stats.cached) parts.push(`${formatCount(stats.cached)} of ${formatCount(stats.prompt)} cached`);
  }
  if (!live && ENDS[node.finish]) parts.push(ENDS[node.finish]);
  return parts.join(" · ");
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still on its way
  }
}
