// What this page asks its server, and what the answers mean in words. Paths are relative, so that
// the page also works below a prefix of a proxy.

const KEY = "gemlax.key";

export class ServerError extends Error {
  constructor(status, message, details = {}) {
    super(message);
    Object.assign(this, { status, ...details });
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function refuse(response) {
  const text = await response.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's page, not ours: the status says enough.
  }
  if (typeof error === "string") error = { message: error };
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  throw new ServerError(response.status, error.message ?? response.statusText, { ...error, status: response.status, retryAfter });
}

async function request(path, options = {}) {
  const response = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
  if (!response.ok) await refuse(response);
  return response;
}

const getJson = async (path) => (await request(path)).json();

/** Yield the JSON of each event of a stream; stop at [DONE]. */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line === "" && data.length) {
          const text = data.join("\n");
          data = [];
          if (text === "[DONE]") return;
          yield JSON.parse(text);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whatever else comes is not wanted
  }
}

/** Ask for an answer; yield its chunks as they come. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  for await (const chunk of readEvents(response.body)) {
    if (chunk.error) throw new ServerError(chunk.error.code ?? 500, chunk.error.message, { ...chunk.error, status: 500 });
    yield chunk;
  }
}

/** Return {id, adapter, context} of each model that requests may name. */
export async function models() {
  const { data } = await getJson("v1/models");
  return data.map((m) => ({ id: m.id, adapter: Boolean(m.parent), context: m.max_model_len ?? m.meta?.n_ctx ?? null }));
}

/** Return {context, defaults}: the tokens a conversation may have, and the settings' defaults. */
export async function props() {
  const all = await getJson("props");
  const generation = all.default_generation_settings ?? {};
  return { context: generation.n_ctx ?? all.n_ctx ?? null, defaults: { ...generation, ...generation.params } };
}

/** Return the sum over all labels of each metric, by name. */
export async function metrics() {
  const text = await (await request("metrics")).text();
  return parseMetrics(text);
}

export function parseMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{.*\})? +(\S+)/.exec(line);
    if (!match) continue;
    const value = Number(match[2]);
    if (Number.isFinite(value)) sums.set(match[1], (sums.get(match[1]) ?? 0) + value);
  }
  return sums;
}

const TITLES = {
  400: "The server refused this request",
  401: "The server wants an API key",
  403: "The server does not allow this",
  404: "The server does not know this",
  413: "This is too long to send",
  422: "The server refused this request",
  429: "The server is busy",
  500: "The server failed",
  503: "The server is not ready",
  529: "The server is busy",
};

/** Say in words what went wrong: {title, text, param}. */
export function explain(error) {
  if (!(error instanceof ServerError)) {
    if (error instanceof TypeError) {
      return { title: "The server cannot be reached", text: "Is it still running? What was answered so far is kept." };
    }
    return { title: "The answer could not be read", text: String(error.message ?? error) };
  }
  let text = error.message ?? "";
  if (error.code === "context_length_exceeded") {
    text += " Begin a new conversation, or shorten an earlier message.";
  } else if (error.retryAfter) {
    text += ` Try again in ${error.retryAfter} s.`;
  }
  return { title: TITLES[error.status] ?? `The server answered ${error.status}`, text, param: error.param ?? null };
}
