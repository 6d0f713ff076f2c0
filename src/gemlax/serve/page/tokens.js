// Tokens coloured by their probability, and the likeliest five of each on hover or focus.

import { byId, el } from "./dom.js";

const BOUNDS = [0.9, 0.6, 0.3, 0.1]; // classes p0 (nearly sure) to p4

const probability = (logprob) => Math.exp(Math.min(0, logprob));
const percent = (p) => (p >= 0.1 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toPrecision(2)} %`);
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

function bucket(p) {
  const index = BOUNDS.findIndex((bound) => p >= bound);
  return index < 0 ? BOUNDS.length : index;
}

/** Show a node's tokens in `container`; only new ones are added if it showed the first already. */
export function renderTokens(container, tokens) {
  if (container.tokens !== tokens) {
    container.replaceChildren();
    container.tokens = tokens;
  }
  for (let i = container.childElementCount; i < tokens.length; i++) {
    const [text, logprob] = tokens[i];
    const kind = `token p${bucket(probability(logprob))}`;
    container.append(el("span", { class: kind, tabindex: i === 0 ? "0" : "-1", "data-token": i }, text || "·"));
  }
}

function showTip(span) {
  const [text, logprob, top] = span.parentNode.tokens[Number(span.dataset.token)];
  const tip = byId("tip");
  const rows = top.map(([other, value]) => {
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--part", probability(value));
    const kind = other === text && value === logprob ? "chosen" : null;
    return el("tr", { class: kind }, el("td", {}, el("code", {}, visible(other))), el("td", {}, bar), el("td", {}, percent(probability(value))));
  });
  tip.replaceChildren(
    el("p", {}, el("code", {}, visible(text)), ` has ${percent(probability(logprob))}`),
    el("table", {}, el("tbody", {}, ...rows)),
  );
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const above = box.top - height - 8;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${above > 8 ? above : box.bottom + 8}px`);
  span.setAttribute("aria-describedby", "tip");
}

export function hideTip() {
  byId("tip").hidden = true;
}

/** Listen for tokens being pointed at, within `log`; call once. */
export function watchTokens(log) {
  log.addEventListener("mouseover", (event) => {
    if (event.target.matches(".token")) showTip(event.target);
    else hideTip();
  });
  log.addEventListener("mouseleave", hideTip);
  log.addEventListener("focusin", (event) => event.target.matches(".token") && showTip(event.target));
  log.addEventListener("focusout", hideTip);
  byId("scroll").addEventListener("scroll", hideTip, { passive: true });
  log.addEventListener("keydown", (event) => {
    const token = event.target;
    if (!token.matches(".token")) return;
    const next = { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    if (next === null) return;
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
