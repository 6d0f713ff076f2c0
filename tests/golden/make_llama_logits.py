"""Makes llama_logits.json: what llama.cpp makes of the real Gemma 3 270M file; gemlax is unused.

Run with an environment that has llama-cpp-python (0.3.36 made the committed file):

    python tests/golden/make_llama_logits.py .cache/gemma-3-270m-q4_k_m.gguf

llama.cpp rounds activations to 8 bits wherever weights are quantised, and keeps keys and values in
float16. So each fact is stored twice: "f32" is from the file with its weights written out as
float32 and a float32 cache, which is free of both, and "q4" from the file as it is. The top-8
logits of both are along the greedy path of f32; q4 has a greedy path of its own beside it. "noise"
compares llama.cpp with itself: the root mean square difference of these logits from those of q4,
after each step's mean is removed.
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
    "story": "Once upon a time, in a small village by the sea, there lived a girl who",
    "python": 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n',
    "json": '{"name": "Alice", "age": 31, "address": {"street": "12 High Street", "city":',
    "list": "Planets of the solar system:\n1. Mercury\n2. Venus\n3. Earth\n4.",
    "french": "La photosynthèse est le processus par lequel les plantes",
    "german": "Im Herbst fallen die Blätter von den Bäumen, weil",
    "chinese": "中国的首都是北京,日本的首都是",
    "dialogue": '"Where have you been?" she asked.\n"At the station," he said. '
    '"The train was late."\n"It is always late," she said.\n"',
    "pattern": "2 4 8 16 32 64 128 256 2 4 8 16 32 64 128 256 2 4 8 16",
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


def along(model: llama_cpp.Llama, case: dict[str, Any]) -> list[list[float]]:
    """Return the logits of the case's top ids before each token of its path."""
    model.reset()
    feed = [case["ids"], *([token] for token in case["tokens"][:-1])]
    steps = [next_logits(model, ids) for ids in feed]
    return [rounded(x[ids]) for x, ids in zip(steps, case["top"], strict=True)]


def greedy(model: llama_cpp.Llama, prompt: Sequence[int], count: int) -> list[np.ndarray]:
    """Return the logits before each token of the greedy path."""
    model.reset()
    steps = [next_logits(model, prompt)]
    while len(steps) < count:
        steps.append(next_logits(model, [int(steps[-1].argmax())]))
    return steps


def float32_path(model: llama_cpp.Llama, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Return the greedy path, and at each step the likeliest ids and their logits."""
    steps = greedy(model, prompt, count)
    top = [np.argsort(-x, kind="stable")[:TOP] for x in steps]
    return {
        "ids": list(prompt),
        "tokens": [int(ids[0]) for ids in top],
        "top": [ids.tolist() for ids in top],
        "f32": [rounded(x[ids]) for x, ids in zip(steps, top, strict=True)],
    }


def add_q4(model: llama_cpp.Llama, case: dict[str, Any]) -> None:
    """Add what q4 says of the same ids on the same path, and the path it takes by itself."""
    case["q4"] = along(model, case)
    own = greedy(model, case["ids"], len(case["tokens"]))
    case["q4_tokens"] = [int(x.argmax()) for x in own]


def log_probabilities(model: llama_cpp.Llama, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probability of each id but the first, all seen in one context."""
    model.reset()
    model.eval(ids)
    logits = model.scores[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(ids) - 1), list(ids[1:])]
    return own - np.log(np.exp(logits).sum(axis=1))


def spread(cases: Sequence[dict[str, Any]], others: Sequence[Any]) -> float:
    """Return the root mean square difference from q4, without each step's mean."""
    found = np.concatenate([case["q4"] for case in cases])
    difference = np.concatenate(others) - found
    difference -= difference.mean(axis=1, keepdims=True)
    return round(float(np.sqrt((difference**2).mean())), 5)


def self_noise(path: Path, cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return `spread` between q4 and q4 under other settings of llama.cpp."""
    settings: dict[str, dict[str, Any]] = {
        "batches of 8": {"n_batch": 8, "n_ubatch": 8},
        "flash attention": {"flash_attn": True},
        "float32 cache": {"type_k": 0, "type_v": 0},
    }
    found = {}
    for name, options in settings.items():
        model = load(path, **options)
        found[name] = spread(cases, [along(model, case) for case in cases])
        model.close()
    return found


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in values]


def main() -> None:
    source = Path(sys.argv[1])
    cases, text = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_float32(source, Path(folder) / "f32.gguf")
        model = load(Path(folder) / "f32.gguf", logits_all=True, type_k=0, type_v=0)
        for name, prompt in PROMPTS.items():
            ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
            cases.append({"name": name, "text": prompt, **float32_path(model, ids, STEPS)})
        ids = model.tokenize(TEXT.read_bytes(), add_bos=True, special=False)
        # The text again, until it is long enough.
        long = float32_path(model, (ids + ids[1:])[:LONG], LONG_STEPS)
        text = {"ids": ids, "f32": rounded(log_probabilities(model, ids))}
        model.close()
    model = load(source, logits_all=True)
    for case in (*cases, long):
        add_q4(model, case)
    text["q4"] = rounded(log_probabilities(model, ids))
    model.close()
    noise = {
        **self_noise(source, cases),
        "float32 weights and cache": spread(cases, [case["f32"] for case in cases]),
        "float32 weights and cache, long": spread([long], [long["f32"]]),
    }
    lines = ",\n".join(json.dumps(case) for case in cases)
    rest = f'"long": {json.dumps(long)},\n"text": {json.dumps(text)},\n"noise": {json.dumps(noise)}'
    OUT.write_text(f'{{"prompts": [\n{lines}\n],\n{rest}}}\n', "utf-8")


if __name__ == "__main__":
    main()
