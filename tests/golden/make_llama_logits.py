"""Makes llama_logits.json: what llama.cpp makes of the real Gemma 3 270M file; gemlax is unused.

Run with an environment that has llama-cpp-python (0.3.36 made the committed file):

    python tests/golden/make_llama_logits.py .cache/gemma-3-270m-q4_k_m.gguf

llama.cpp rounds activations to 8 bits wherever weights are quantised, and keeps keys and values in
float16. So each fact is stored twice: from the file as it is ("q4"), and from the file with its
weights written out as float32 and a float32 cache ("f32"), which is free of both. All follow the
greedy path of q4. "noise" compares llama.cpp with itself: the root mean square difference of the
top-8 logits after removing each step's mean.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from ctypes import byref
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

OUT = Path(__file__).with_name("llama_logits.json")
TEXT = Path(__file__).with_name("text.txt")
THREADS = 2
CONTEXT = 2048
TOP = 8
STEPS = 16
LONG, LONG_STEPS = 1500, 24

PROMPTS = {
    "fact": "The capital of France is",
    "water": "Water boils at 100 degrees Celsius at sea level. At the top of a high mountain, it boils",
    "story": "Once upon a time, in a small village by the sea, there lived a girl who",
    "python": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n',
    "json": '{"name": "Alice", "age": 31, "address": {"street": "12 High Street", "city":',
    "list": "Planets of the solar system:\n1. Mercury\n2. Venus\n3. Earth\n4.",
    "french": "La photosynthèse est le processus par lequel les plantes",
    "german": "Im Herbst fallen die Blätter von den Bäumen, weil",
    "chinese": "中国的首都是北京,日本的首都是",
    "dialogue": '"Where have you been?" she asked.\n"At the station," he said. "The train was late."\n'
    '"It is always late," she said.\n"',
    "pattern": "2 4 8 16 32 64 128 256 512 1024 2 4 8 16 32 64 128 256 512 1024 2 4 8 16",
}


def load(path: Path, **options: Any) -> llama_cpp.Llama:
    settings = {"n_ctx": CONTEXT, "n_threads": THREADS, "n_threads_batch": THREADS}
    return llama_cpp.Llama(str(path), verbose=False, **settings, **options)


def write_float32(source: Path, target: Path) -> None:
    """Write the file anew with every quantised weight as float32."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    params.nthread = THREADS
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), byref(params)
    )
    assert not failed, f"llama_model_quantize returned {failed}"


def next_logits(model: llama_cpp.Llama, ids: Sequence[int]) -> np.ndarray:
    """Feed ids and return the logits after the last."""
    model.eval(ids)
    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),)).copy()


def along(model: llama_cpp.Llama, prompt: Sequence[int], path: Sequence[int]) -> list[np.ndarray]:
    """Return the logits before each token of `path`."""
    model.reset()
    steps = [list(prompt), *([token] for token in path[:-1])]
    return [next_logits(model, ids) for ids in steps]


def greedy(model: llama_cpp.Llama, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Return the greedy path, and at each step the likeliest ids and their logits."""
    model.reset()
    tokens, top, values, feed = [], [], [], list(prompt)
    for _ in range(count):
        logits = next_logits(model, feed)
        best = np.argsort(-logits, kind="stable")[:TOP]
        top.append(best.tolist())
        values.append(rounded(logits[best]))
        tokens.append(int(best[0]))
        feed = tokens[-1:]
    return {"ids": list(prompt), "tokens": tokens, "top": top, "q4": values}


def add_float32(case: dict[str, Any], model: llama_cpp.Llama) -> None:
    """Add what the float32 model says of the same ids, and which it would have taken."""
    steps = along(model, case["ids"], case["tokens"])
    case["f32"] = [rounded(x[ids]) for x, ids in zip(steps, case["top"], strict=True)]
    case["f32_argmax"] = [int(x.argmax()) for x in steps]


def log_probabilities(model: llama_cpp.Llama, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probability of each id but the first, all seen in one context."""
    model.reset()
    model.eval(ids)
    logits = model.scores[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(ids) - 1), list(ids[1:])]
    return own - np.log(np.exp(logits).sum(axis=1))


def spread(cases: Sequence[dict[str, Any]], others: Sequence[Sequence[Any]]) -> float:
    """Return the root mean square difference from q4, without each step's mean."""
    found = np.concatenate([np.array(case["q4"]) for case in cases])
    difference = np.concatenate([np.array(other) for other in others]) - found
    difference -= difference.mean(axis=1, keepdims=True)
    return round(float(np.sqrt((difference**2).mean())), 5)


def other_settings(path: Path, cases: Sequence[dict[str, Any]], **options: Any) -> float:
    """Return `spread` between q4 and q4 under other settings of llama.cpp."""
    model = load(path, **options)
    found = []
    for case in cases:
        steps = along(model, case["ids"], case["tokens"])
        found.append([x[ids] for x, ids in zip(steps, case["top"], strict=True)])
    model.close()
    return spread(cases, found)


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in values]


def main() -> None:
    source = Path(sys.argv[1])
    model = load(source)
    cases = []
    for name, text in PROMPTS.items():
        ids = model.tokenize(text.encode(), add_bos=True, special=False)
        cases.append({"name": name, "text": text, **greedy(model, ids, STEPS)})
    ids = model.tokenize(TEXT.read_bytes(), add_bos=True, special=False)
    # The text again, until it is long enough.
    long = greedy(model, (ids + ids[1:])[:LONG], LONG_STEPS)
    model.close()
    noise = {
        "batches of 8": other_settings(source, cases, n_batch=8, n_ubatch=8),
        "flash attention": other_settings(source, cases, flash_attn=True),
        "float32 cache": other_settings(source, cases, type_k=0, type_v=0),
    }
    scorer = load(source, logits_all=True)
    text = {"ids": ids, "q4": rounded(log_probabilities(scorer, ids))}
    scorer.close()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "f32.gguf"
        write_float32(source, plain)
        model = load(plain, logits_all=True, type_k=0, type_v=0)
        for case in (*cases, long):
            add_float32(case, model)
        text["f32"] = rounded(log_probabilities(model, ids))
        model.close()
    noise["float32 weights and cache"] = spread(cases, [case["f32"] for case in cases])
    for key in ("q4", "f32"):
        text[f"{key}_sum"] = round(float(np.sum(text[key])), 3)
    lines = ",\n".join(json.dumps(case) for case in cases)
    rest = f'"long": {json.dumps(long)},\n"text": {json.dumps(text)},\n"noise": {json.dumps(noise)}'
    OUT.write_text(f'{{"prompts": [\n{lines}\n],\n{rest}}}\n', "utf-8")


if __name__ == "__main__":
    main()
