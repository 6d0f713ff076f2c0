// Markdown as models write it, made into DOM nodes. A block whose source did not change since the
// last call keeps its nodes, so that a growing answer costs only its last block.
// Images become links: the page asks no host but its own.

import { copyText, el, icon } from "./dom.js";

const MAX_DEPTH = 8; // of quotes, lists and emphasis in each other
const MAX_SPAN = 4000; // characters that emphasis or a link's text may span
const SAFE = new Set(["http:", "https:", "mailto:"]);

/** Show `text` in `container`, replacing only what changed since it was last called with it. */
export function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.split("\n"));
  const shown = container.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && blocks[same].source === shown[same]) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(makeBlock(block, 0));
  container.blocks = blocks.map((block) => block.source);
}

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*)|)$/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

const isTable = (lines, i) => lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && DIVIDER.test(lines[i + 1]);
const beginsBlock = (lines, i) =>
  FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || QUOTE.test(lines[i]) || isTable(lines, i);

/** Cut lines into blocks {kind, lines, source}. */
function splitBlocks(lines) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const first = i;
    const kind = kindOf(lines, i);
    i = endOf(kind, lines, i);
    const inner = lines.slice(first, i);
    blocks.push({ kind, lines: inner, source: `${kind}\n${inner.join("\n")}` });
  }
  return blocks;
}

function kindOf(lines, i) {
  if (FENCE.test(lines[i])) return "code";
  if (HEADING.test(lines[i])) return "heading";
  if (RULE.test(lines[i])) return "rule";
  if (QUOTE.test(lines[i])) return "quote";
  if (ITEM.test(lines[i])) return "list";
  return isTable(lines, i) ? "table" : "paragraph";
}

function endOf(kind, lines, i) {
  const first = i++;
  if (kind === "code") {
    const mark = FENCE.exec(lines[first])[2];
    const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
    while (i < lines.length && !closes(lines[i])) i++;
    return Math.min(i + 1, lines.length);
  }
  if (kind === "quote") while (i < lines.length && QUOTE.test(lines[i])) i++;
  if (kind === "table") while (i < lines.length && lines[i].includes("|")) i++;
  if (kind === "list") return endOfList(lines, i);
  if (kind === "paragraph") {
    while (i < lines.length && lines[i].trim() && !beginsBlock(lines, i) && !ITEM.test(lines[i])) i++;
  }
  return i;
}

// A list goes on over blank lines while items or indented lines follow.
function endOfList(lines, i) {
  const ordered = /\d/.test(ITEM.exec(lines[i - 1])[2]);
  const outer = ITEM.exec(lines[i - 1])[1].length;
  for (; i < lines.length; i++) {
    const line = lines[i];
    const after = line.trim() ? line : lines[i + 1] ?? "";
    const item = RULE.test(after) ? null : ITEM.exec(after);
    if (item && (item[1].length > outer || /\d/.test(item[2]) === ordered)) continue;
    if (/^\s{2,}\S/.test(after)) continue;
    if (line.trim() && lines[i - 1].trim() && !item && !beginsBlock(lines, i)) continue;
    break;
  }
  while (!lines[i - 1].trim()) i--;
  return i;
}

function makeBlock({ kind, lines }, depth) {
  if (depth > MAX_DEPTH) return el("p", {}, lines.join("\n"));
  if (kind === "code") return makeCode(lines);
  if (kind === "rule") return el("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    // The page has its own h1 and h2.
    return el(`h${Math.min(6, marks.length + 2)}`, { class: `level-${marks.length}` }, ...inline(text));
  }
  if (kind === "quote") return el("blockquote", {}, ...inner(lines.map((line) => line.replace(QUOTE, "")), depth));
  if (kind === "list") return makeList(lines, depth);
  if (kind === "table") return makeTable(lines);
  return el("p", {}, ...inline(lines.join("\n")));
}

const inner = (lines, depth) => splitBlocks(lines).map((block) => makeBlock(block, depth + 1));

function makeCode(lines) {
  const [, indent, mark, info] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark) && !lines.at(-1).trim().replaceAll(mark[0], "");
  const body = lines.slice(1, closed ? -1 : undefined);
  const text = body.map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
  const copy = el("button", { type: "button", class: "copy", onclick: () => copyCode(copy, text) }, icon("copy"), el("span", {}, "Copy"));
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, info.trim().split(/\s/, 1)[0] || "text"), copy),
    el("pre", { tabindex: "0", "aria-label": "Code" }, el("code", {}, text)),
  );
}

async function copyCode(button, text) {
  await copyText(text);
  button.lastElementChild.textContent = "Copied";
  setTimeout(() => (button.lastElementChild.textContent = "Copy"), 1500);
}

function makeList(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const outer = first[1].length;
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= outer) {
      items.push({ indent: line.length - (match[3] ?? "").length, lines: [match[3] ?? ""] });
    } else {
      const { indent, lines: own } = items.at(-1);
      const space = line.length - line.trimStart().length;
      own.push(line.slice(Math.min(space, indent)));
    }
  }
  const ordered = /\d/.test(first[2]);
  const start = ordered ? parseInt(first[2], 10) : 1;
  return el(
    ordered ? "ol" : "ul",
    { start: ordered && start !== 1 ? start : null },
    ...items.map((item) => makeItem(item.lines, depth)),
  );
}

function makeItem(lines, depth) {
  const task = /^\[([ xX])\]\s+/.exec(lines[0]);
  if (task) lines = [lines[0].slice(task[0].length), ...lines.slice(1)];
  const nodes = inner(lines, depth);
  // A tight item shows its text without a paragraph's margins.
  if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
  if (!task) return el("li", {}, ...nodes);
  const box = el("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "open" : "done" });
  return el("li", { class: "task" }, box, ...nodes);
}

function splitRow(line) {
  const cells = [""];
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") cells[cells.length - 1] += text[++i];
    else if (text[i] === "|") cells.push("");
    else cells[cells.length - 1] += text[i];
  }
  return cells.map((cell) => cell.trim());
}

function makeTable(lines) {
  const head = splitRow(lines[0]);
  const sides = splitRow(lines[1]).map((mark) => {
    if (mark.endsWith(":")) return mark.startsWith(":") ? "middle" : "right";
    return null;
  });
  const row = (cells, tag) => el("tr", {}, ...head.map((_, i) => el(tag, { class: sides[i] }, ...inline(cells[i] ?? ""))));
  return el(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, ...lines.slice(2).map((line) => row(splitRow(line), "td")))),
  );
}

// What may begin something other than plain text.
const SPECIAL = /[\\`*_~[!<\n]|https?:/g;

/** Return the nodes of one paragraph's text. */
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
  };
  let i = 0;
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const special = SPECIAL.exec(text);
    const next = special ? special.index : text.length;
    plain += text.slice(i, next);
    i = next;
    if (i >= text.length) break;
    const span = depth > MAX_DEPTH ? null : spanAt(text, i, depth);
    if (span === null) {
      plain += text[i++];
    } else {
      if (span.node) push(span.node);
      else plain += span.text;
      i = span.end;
    }
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

function spanAt(text, i, depth) {
  const c = text[i];
  if (c === "\n") return { node: el("br"), end: i + 1 };
  if (c === "\\") {
    if (text[i + 1] === "\n") return { node: el("br"), end: i + 2 };
    return /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? { text: text[i + 1], end: i + 2 } : null;
  }
  if (c === "`") return codeSpan(text, i);
  if (c === "*" || c === "_" || c === "~") return emphasis(text, i, depth);
  if (c === "[") return link(text, i, depth);
  if (c === "!") return text[i + 1] === "[" ? link(text, i + 1, depth) : null;
  if (c === "<") {
    const auto = /^<((?:https?:|mailto:)[^\s<>]{1,2000})>/.exec(text.slice(i, i + 2010));
    return auto ? { node: anchor(auto[1], [auto[1]]), end: i + auto[0].length } : null;
  }
  return bareLink(text, i);
}

function codeSpan(text, i) {
  const mark = /^`+/.exec(text.slice(i, i + 40))[0];
  let end = text.indexOf(mark, i + mark.length);
  while (end >= 0 && text[end + mark.length] === "`") {
    while (text[end] === "`") end++;
    end = text.indexOf(mark, end);
  }
  if (end < 0) return { text: mark, end: i + mark.length };
  const code = text.slice(i + mark.length, end).replaceAll("\n", " ");
  return { node: el("code", {}, /^ .*\S.* $/.test(code) ? code.slice(1, -1) : code), end: end + mark.length };
}

const TAGS = { "***": "strong", "___": "strong", "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

function emphasis(text, i, depth) {
  const run = /^(\*{1,3}|_{1,3}|~~)/.exec(text.slice(i, i + 3))?.[0];
  if (!run || /\s/.test(text[i + run.length] ?? " ")) return null;
  const inWord = run[0] === "_";
  if (inWord && /\w/.test(text[i - 1] ?? "")) return null;
  const limit = Math.min(text.length, i + MAX_SPAN);
  for (let end = text.indexOf(run, i + run.length); end >= 0 && end < limit; end = text.indexOf(run, end + 1)) {
    if (/\s/.test(text[end - 1]) || text[end - 1] === "\\" || end === i + run.length) continue;
    // `*a **b** c*` ends at its own single star.
    if (run.length < 3 && run[0] !== "~" && text[end + run.length] === run[0] && text[end + run.length + 1] === run[0]) {
      end += run.length + 1;
      continue;
    }
    if (run.length === 1 && (text[end + 1] === run || text[end - 1] === run)) {
      while (text[end + 1] === run) end++;
      continue;
    }
    if (inWord && /\w/.test(text[end + run.length] ?? "")) continue;
    const nodes = inline(text.slice(i + run.length, end), depth + 1);
    const node = el(TAGS[run], {}, ...(run.length === 3 ? [el("em", {}, ...nodes)] : nodes));
    return { node, end: end + run.length };
  }
  return { text: run, end: i + run.length };
}

function link(text, i, depth) {
  const part = text.slice(i, i + MAX_SPAN);
  let close = -1;
  for (let k = 1, open = 1; k < part.length; k++) {
    if (part[k] === "\\") k++;
    else if (part[k] === "[") open++;
    else if (part[k] === "]" && --open === 0) {
      close = k;
      break;
    }
    if (open > MAX_DEPTH) return null;
  }
  if (close < 0 || part[close + 1] !== "(") return null;
  const target = /^\(\s*<?((?:[^\s()<>]|\([^\s()]*\)){1,2000})>?(?:\s+["'][^\n]{0,300}?["'])?\s*\)/.exec(part.slice(close + 1));
  if (!target) return null;
  const nodes = inline(part.slice(1, close), depth + 1);
  return { node: anchor(target[1], nodes), end: i + close + 1 + target[0].length };
}

function bareLink(text, i) {
  if (/\w/.test(text[i - 1] ?? "")) return null;
  const match = /^https?:\/\/[^\s<>"`]{1,2000}/.exec(text.slice(i, i + 2010));
  if (!match) return null;
  let url = match[0].replace(/[.,;:!?*_~'\]]+$/, "");
  if (url.endsWith(")") && !url.includes("(")) url = url.slice(0, -1);
  return { node: anchor(url, [url]), end: i + url.length };
}

/** A link of a safe kind opens elsewhere and is told nothing; any other stays text. */
function anchor(target, nodes) {
  let url = null;
  try {
    url = new URL(target);
  } catch {
    // Relative, or no address at all.
  }
  if (!url || !SAFE.has(url.protocol)) return el("span", {}, ...nodes);
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, ...nodes);
}
