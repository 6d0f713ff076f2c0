// What the server is doing: its figures from GET /metrics, polled while the page is looked at.

import { metrics } from "./api.js";
import { byId, formatRate } from "./dom.js";

const EVERY_MS = 2000;
const POINTS = 40;

let last = null; // tokens made, and when
let rates = [];

const first = (sums, ...names) => names.map((name) => sums.get(name)).find((value) => value !== undefined);

function show(id, value) {
  byId(`metric-${id}`).textContent = value ?? "–";
}

const percent = (part) => (part === undefined || Number.isNaN(part) ? undefined : `${Math.round(100 * part)} %`);

function draw(sums) {
  const now = performance.now();
  const made = first(sums, "vllm:generation_tokens_total", "llamacpp:tokens_predicted_total");
  if (made !== undefined) {
    if (last) rates.push(Math.max(0, (made - last.made) / ((now - last.now) / 1000)));
    last = { now, made };
    rates = rates.slice(-POINTS);
  }
  show("running", first(sums, "vllm:num_requests_running", "llamacpp:requests_processing"));
  show("waiting", first(sums, "vllm:num_requests_waiting", "llamacpp:requests_deferred"));
  show("rate", rates.length ? formatRate(rates.at(-1)) : undefined);
  show("cache", percent(first(sums, "vllm:kv_cache_usage_perc")));
  const asked = sums.get("vllm:prefix_cache_queries_total");
  show("hits", asked ? percent(sums.get("vllm:prefix_cache_hits_total") / asked) : undefined);
  const highest = Math.max(1, ...rates);
  const points = rates.map((rate, i) => `${((i + POINTS - rates.length) * 100) / (POINTS - 1)},${23 - (22 * rate) / highest}`);
  byId("spark").setAttribute("points", points.join(" "));
}

/** Poll for ever, while the page is visible and its section unfolded; call once. */
export function watchMetrics() {
  const section = byId("server");
  let timer = null;
  const poll = async () => {
    timer = null;
    if (document.hidden || !section.open) return;
    try {
      draw(await metrics());
      section.classList.remove("off");
    } catch {
      section.classList.add("off"); // shown as such; the next look tries again
      last = null;
    }
    timer ??= setTimeout(poll, EVERY_MS);
  };
  const wake = () => timer === null && poll();
  section.addEventListener("toggle", wake);
  document.addEventListener("visibilitychange", wake);
  wake();
}
