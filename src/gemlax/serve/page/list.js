// The list of conversations: search, rename, delete with undo, export and import.

import { byId, el, iconButton, toast } from "./dom.js";
import * as store from "./store.js";
import { checkConversation, newConversation } from "./tree.js";

const FORMAT = "gemlax-conversations";
const DAY = 24 * 3600 * 1000;

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  return time >= midnight - 6 * DAY ? "This week" : "Earlier";
}

/** Make the list. `actions`: open(id), current(): its id, changed(id): it was renamed or removed. */
export function createList(actions) {
  const list = byId("list");
  const find = byId("find");

  let asked = 0; // only the latest draw counts: an earlier search may take longer

  async function draw() {
    const turn = ++asked;
    const words = find.value.trim();
    let heads;
    try {
      const hits = words ? await store.search(words) : null;
      heads = (await store.heads()).filter((head) => !hits || hits.has(head.id));
    } catch {
      list.replaceChildren(el("li", { class: "none" }, "This browser does not let the page keep anything"));
      return;
    }
    if (turn === asked) drawRows(heads, words);
  }

  function drawRows(heads, words) {
    const nodes = [];
    let group = null;
    for (const head of heads) {
      if (groupOf(head.updated) !== group) {
        group = groupOf(head.updated);
        nodes.push(el("li", { class: "group" }, el("h3", {}, group)));
      }
      nodes.push(row(head));
    }
    if (!heads.length) nodes.push(el("li", { class: "none" }, words ? "Nothing found" : "No conversations yet"));
    const focused = document.activeElement?.closest?.("#list li")?.dataset.id;
    list.replaceChildren(...nodes);
    if (focused) list.querySelector(`[data-id="${focused}"] .open`)?.focus();
  }

  function row(head) {
    const title = head.title || "Untitled";
    const current = head.id === actions.current();
    const open = el("button", { type: "button", class: "open", "aria-current": current ? "true" : null, onclick: () => actions.open(head.id) }, title);
    return el(
      "li",
      { class: current ? "row current" : "row", "data-id": head.id },
      open,
      el(
        "span",
        { class: "tools" },
        iconButton("edit", `Rename ${title}`, () => rename(head), { class: "rename" }),
        iconButton("out", `Export ${title}`, () => exportOne(head.id), { class: "export" }),
        iconButton("bin", `Delete ${title}`, () => remove(head), { class: "delete" }),
      ),
    );
  }

  function rename(head) {
    const input = el("input", { type: "text", maxlength: 120, "aria-label": "New title" });
    input.value = head.title;
    let ended = false;
    const end = async (keep) => {
      if (ended) return;
      ended = true;
      if (keep && input.value.trim()) {
        const conversation = await store.load(head.id);
        await store.save({ ...conversation, title: input.value.trim() });
        await actions.changed(head.id);
      }
      await draw();
      list.querySelector(`[data-id="${head.id}"] .open`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") end(false);
    });
    input.addEventListener("blur", () => end(true));
    list.querySelector(`[data-id="${head.id}"]`).replaceChildren(input);
    input.select();
  }

  async function remove(head) {
    const conversation = await store.load(head.id);
    await store.remove(head.id);
    await actions.changed(head.id);
    await draw();
    const undo = async () => {
      await store.save(conversation);
      await actions.changed(head.id);
      await draw();
    };
    toast(`Deleted “${head.title || "Untitled"}”`, { label: "Undo", run: undo });
    (list.querySelector(".open") ?? find).focus();
  }

  const exportOne = async (id) => download([await store.load(id)]);

  async function importFile(file) {
    const added = [];
    try {
      const value = JSON.parse(await file.text());
      if (value?.format !== FORMAT || !Array.isArray(value.conversations)) throw new Error("This file was not exported from this page");
      const ids = new Set((await store.heads()).map((head) => head.id));
      for (const conversation of value.conversations.map(checkConversation)) {
        if (ids.has(conversation.id)) conversation.id = newConversation().id;
        await store.save(conversation);
        added.push(conversation);
      }
      toast(added.length === 1 ? "Imported one conversation" : `Imported ${added.length} conversations`);
    } catch (error) {
      toast(`Not imported: ${error.message}`);
    }
    await draw();
    if (added.length) actions.open(added.at(-1).id);
  }

  find.addEventListener("input", draw);
  byId("export").addEventListener("click", async () => {
    const all = await store.all();
    if (all.length) download(all);
    else toast("There is nothing to export");
  });
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) await importFile(file);
    event.target.value = "";
  });
  list.addEventListener("keydown", (event) => {
    const rows = [...list.querySelectorAll(".open")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const place = rows.indexOf(event.target);
    if (!step || place < 0) return;
    event.preventDefault();
    rows[place + step]?.focus();
  });
  return { draw };
}

function download(conversations) {
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const day = new Date().toISOString().slice(0, 10);
  el("a", { href: url, download: `gemlax-${day}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
