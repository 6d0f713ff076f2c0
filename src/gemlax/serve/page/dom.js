// Small helpers that make DOM nodes. Text is always set as text, never parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** Make an element; a property that begins with "on" is a listener, the rest are attributes. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Copy the icon template of index.html and point it at one of its symbols. */
export function icon(name) {
  const node = byId("icon").content.firstElementChild.cloneNode(true);
  node.firstElementChild.setAttribute("href", `#icon-${name}`);
  return node;
}

/** Make a button that shows an icon; its label is read aloud and shown as a hint. */
export function iconButton(name, label, onclick, props = {}) {
  const kind = props.class ? `icon-button ${props.class}` : "icon-button";
  return el(
    "button",
    { type: "button", title: label, "aria-label": label, onclick, ...props, class: kind },
    icon(name),
  );
}

/** Say something to those who listen instead of looking. */
export function announce(text) {
  byId("live").textContent = text;
}

/** Show a short note for a while, with one action if given. */
export function toast(text, action = null) {
  const note = el("div", { class: "toast" }, el("span", {}, text));
  const timer = setTimeout(() => note.remove(), action ? 9000 : 4000);
  if (action) {
    const act = () => {
      clearTimeout(timer);
      note.remove();
      action.run();
    };
    note.append(el("button", { type: "button", class: "link", onclick: act }, action.label));
  }
  byId("toasts").append(note);
  announce(text);
}

/** Put text on the clipboard; outside https and loopback only the old way works. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "sr", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
}

export const formatCount = (value) => Number(value).toLocaleString("en");

/** Write a rate with as many digits as it deserves. */
export const formatRate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
