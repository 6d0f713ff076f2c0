// One answer on its way: the request's body, and the node that grows with each chunk.

import { explain, streamChat } from "./api.js";

const TOP = 5;

/** Return the body of POST v1/chat/completions. `settings` come last: they are what was chosen. */
export function requestBody({ model, messages, settings, probabilities, goOn }) {
  return {
    ...(model ? { model } : {}),
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(probabilities ? { logprobs: true, top_logprobs: TOP } : {}),
    ...(goOn ? { continue_final_message: true, add_generation_prompt: false } : {}),
    ...settings,
  };
}

/**
 * Stream an answer into `node`, calling `changed()` after each chunk. Never throws: what ended the
 * answer is in `node.finish`, and in `node.error` if it failed. Returns the error, or null.
 */
export async function generate(node, body, signal, changed) {
  const begun = performance.now();
  const clock = { begun, first: null, before: null };
  // Tokens that cover a part of the text only are not kept.
  const collect = body.logprobs && (!node.content || node.tokens?.length > 0);
  if (!collect) delete node.tokens;
  const decoder = new TextDecoder();
  delete node.error;
  node.finish = "running";
  node.model = body.model;
  let failure = null;
  try {
    for await (const chunk of streamChat(body, signal)) {
      takeChunk(node, chunk, clock, collect ? decoder : null);
      changed();
    }
    if (node.finish === "running") {
      node.finish = "error";
      node.error = { title: "The connection broke off", text: "The server ended the stream before the answer was complete." };
    }
  } catch (error) {
    if (signal.aborted) {
      node.finish = "stopped";
    } else {
      failure = error;
      node.finish = "error";
      node.error = explain(error);
    }
  }
  changed();
  return failure;
}

function takeChunk(node, chunk, clock, decoder) {
  const choice = chunk.choices?.[0];
  if (choice) {
    takeDelta(node, choice.delta ?? {}, clock);
    const items = decoder ? choice.logprobs?.content : null;
    for (const item of items ?? []) takeToken(node, item, choice.delta ?? {}, decoder);
    if (choice.finish_reason) node.finish = choice.finish_reason;
  }
  if (chunk.usage) takeUsage(node, chunk, clock);
}

function takeDelta(node, delta, clock) {
  const thought = delta.reasoning_content ?? delta.reasoning;
  if (clock.first === null && (delta.content || thought || delta.tool_calls)) clock.first = performance.now();
  if (thought) node.reasoning = (node.reasoning ?? "") + thought;
  if (delta.content) node.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    node.calls ??= [];
    node.calls[part.index] ??= { id: part.id ?? "", name: "", arguments: "" };
    const call = node.calls[part.index];
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
}

// Tokens are kept for the text alone. A character that is split over tokens shows at its last one.
function takeToken(node, item, delta, decoder) {
  if (delta.reasoning_content || delta.reasoning || delta.tool_calls) return;
  const text = item.bytes ? decoder.decode(new Uint8Array(item.bytes), { stream: true }) : item.token;
  if (!text && !item.bytes?.length) return;
  const top = (item.top_logprobs ?? []).slice(0, TOP).map((other) => [other.token, other.logprob]);
  (node.tokens ??= []).push([text, item.logprob, top]);
}

function takeUsage(node, chunk, clock) {
  const { usage, timings } = chunk;
  const now = performance.now();
  const completion = usage.completion_tokens ?? 0;
  if (completion) clock.before ??= chunk.choices?.length ? completion : 1;
  const seconds = clock.first === null ? 0 : (now - clock.first) / 1000;
  // The first chunk's tokens came out of the prefill (one, if only the end told a number); the
  // rest took the time since.
  const measured = seconds > 0 ? (completion - clock.before) / seconds : 0;
  node.stats = {
    prompt: usage.prompt_tokens ?? 0,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    completion,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
    wait: ((clock.first ?? now) - clock.begun) / 1000,
    rate: timings?.predicted_per_second ?? measured,
  };
}
