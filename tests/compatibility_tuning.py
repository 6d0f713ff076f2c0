"""Cases of docs/compatibility.md: adapters, and data to train on."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from compatibility import Case, Read
from disk import CONFIG, random_weights, write_hf
from safetensors.numpy import save_file
from vocabularies import chat_tokenizer

from gemlax import adapters
from gemlax.adapters.folders import beside
from gemlax.chat import ChatFormat
from gemlax.tune.data import Encoder, read_examples, read_pairs

__all__ = ["CASES"]

ADAPTER, DATA = "Adapters", "Training data"
SAFETENSORS = "the safetensors package"
ROOT = "base_model.model.model."
Arrays = dict[str, np.ndarray]

# Adapters.

SHAPES = {"q_proj": (128, 64), "v_proj": (64, 64)}  # [out, in]


def factors(dtype: Any = np.float32) -> Arrays:
    """Return A and B of two projections of each layer, by module and part."""
    rng = np.random.default_rng(0)
    found = {}
    for i in range(CONFIG.text.num_hidden_layers):
        for name, (rows, columns) in SHAPES.items():
            module = f"layers.{i}.self_attn.{name}"
            for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
                found[f"{module}.lora_{part}"] = rng.normal(size=shape).astype(dtype)
    return found


def write_adapter(folder: Path, tensors: Arrays, said: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config | (said or {})))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def same_factors(folder: Path, expected: Arrays, scale: float = 2.0) -> Read:
    stored = adapters.read_folder(folder, CONFIG.text)
    assert {stored.adapter.scale(module) for module in stored.adapter} == {scale}
    found = {
        f"{module}.lora_{part}": array
        for module, pair in stored.values.items()
        for part, array in zip("AB", pair, strict=True)
    }
    return Read(found, {name: array.astype(np.float32) for name, array in expected.items()})


def peft(
    folder: Path,
    naming: str = ROOT + "{}.weight",
    said: dict[str, Any] | None = None,
    more: Arrays | None = None,
    dtype: Any = np.float32,
    scale: float = 2.0,
) -> Read:
    """Read a folder whose tensors are named as `naming` says."""
    own = factors(dtype)
    tensors = {naming.format(name): array for name, array in own.items()}
    write_adapter(folder, tensors | (more or {}), said)
    return same_factors(folder, own, scale)


def peft_case(kind: str, log: str = "", error: str = "", **how: Any) -> Case:
    verdict, oracle = ("refused", "") if error else ("exact", SAFETENSORS)
    return Case(ADAPTER, kind, partial(peft, **how), verdict, oracle, log, error)


def beside_model(folder: Path) -> Read:
    write_hf(folder, random_weights())
    own = factors()
    write_adapter(folder, {f"{ROOT}{name}.weight": array for name, array in own.items()})
    found = beside(folder)
    assert found is not None
    return same_factors(found, own)


def some_layers(folder: Path) -> Read:
    own = factors()
    said = {"layers_to_transform": [0, 3]}
    write_adapter(folder, {f"{ROOT}{name}.weight": array for name, array in own.items()}, said)
    kept = {n: array for n, array in own.items() if n.startswith(("layers.0.", "layers.3."))}
    return same_factors(folder, kept)


def new_embeddings(folder: Path) -> None:
    (folder / "new_embeddings.safetensors").write_bytes(b"x")
    peft(folder)


def pickled(folder: Path) -> None:
    write_adapter(folder, {"x": np.zeros(1, np.float32)})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    adapters.read_folder(folder, CONFIG.text)


def of_mlx(folder: Path) -> None:
    said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": np.zeros((64, 8), np.float32)},
              folder / "adapters.safetensors")  # fmt: skip
    adapters.read_folder(folder, CONFIG.text)


def of_llama_cpp(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "lora.gguf", "gemma3")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapters.read_folder(folder / "lora.gguf", CONFIG.text)


def run_folder(folder: Path) -> None:
    write_adapter(folder / "checkpoint-500", {"x": np.zeros(1, np.float32)})
    adapters.read_folder(folder, CONFIG.text)


ZERO = np.zeros((2, 2), np.float32)
TOWER = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
TOWERS = {TOWER.format(part): ZERO for part in "AB"}
Q = f"{ROOT}layers.0.self_attn.q_proj"
ADAPTERS = [
    peft_case("peft, text-only"),
    peft_case("peft, of a multimodal base",
              naming="base_model.model.model.language_model.{}.weight"),
    peft_case("of a multimodal base by older transformers",
              naming="base_model.model.language_model.model.{}.weight"),
    peft_case("with the adapter's name in the names", naming=ROOT + "{}.default.weight"),
    peft_case("under torch.compile", naming="base_model.model._orig_mod.model.{}.weight"),
    peft_case("float16", dtype=np.float16),
    peft_case("rank-stabilised", said={"use_rslora": True}, scale=4.0),
    peft_case("`alpha_pattern` as a regular expression", scale=4.0,
              said={"alpha_pattern": {r".*layers\.[0-9]+\..*": 16}}),
    peft_case("keys of newer peft at null, false or empty",
              said={"arrow_config": None, "use_bdlora": False, "target_parameters": []}),
    peft_case("with LoRA of the vision tower", more=TOWERS, log="left aside 2 tensors"),
    Case(ADAPTER, "`layers_to_transform` beside tensors of other layers", some_layers,
         oracle=SAFETENSORS, log="left aside"),
    Case(ADAPTER, "with embeddings in a file of their own", new_embeddings, "refused",
         error="new_embeddings.safetensors"),
    Case(ADAPTER, "beside the weights of its base", beside_model, oracle=SAFETENSORS),
    peft_case("DoRA", said={"use_dora": True}, error="use_dora=True"),
    peft_case("DoRA, by its tensors", more={f"{Q}.lora_magnitude_vector": ZERO}, error="DoRA"),
    peft_case("`modules_to_save` of the text decoder", said={"modules_to_save": ["lm_head"]},
              error="modules_to_save"),
    peft_case("of the table of embeddings", error="embeddings",
              more={f"{ROOT}embed_tokens.lora_embedding_A": ZERO}),
    peft_case("biases", said={"bias": "all"}, error="bias='all'"),
    peft_case("IA3", said={"peft_type": "IA3"}, error="only LORA"),
    peft_case("a part of the modules that the config names", error="lacks",
              said={"target_modules": ["q_proj", "v_proj", "k_proj"]}),
    peft_case("of another size of model", naming=ROOT + "{}.weight",
              more={f"{Q}.lora_A.weight": np.zeros((4, 96), np.float32)}, error="another model"),
    Case(ADAPTER, "pickled (adapter_model.bin)", pickled, "refused", error="is a pickle"),
    Case(ADAPTER, "mlx-lm's", of_mlx, "refused", error="mlx-lm"),
    Case(ADAPTER, "GGUF", of_llama_cpp, "refused", error="is a GGUF file"),
    Case(ADAPTER, "the folder above it", run_folder, "refused", error="checkpoint-500"),
]  # fmt: skip

# Training data.

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
CHAT = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>"
ANSWER, PLAIN = "yes<end_of_turn>", "<bos>hiyes<eos>"
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


def encoder() -> Encoder:
    tokenizer = chat_tokenizer("gemma3")
    return Encoder(tokenizer, ChatFormat(tokenizer))


def shown(example: Any) -> tuple[str, str]:
    """Return the text of an example, and of what is learnt."""
    tokenizer = chat_tokenizer("gemma3")
    learnt = [id for id, own in zip(*example, strict=True) if own]
    texts = (tokenizer.decode(ids, skip_special=False) for ids in (example.ids, learnt))
    return next(texts), next(texts)


def lines(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def examples(folder: Path, data: bytes, name: str, expected: list[tuple[str, str]]) -> Read:
    (folder / name).write_bytes(data)
    found = read_examples(folder / name, encoder(), 512)
    return Read([shown(example) for example in found], expected)


def data_case(kind: str, data: Any, whole: str = CHAT, learnt: str = ANSWER, *, log: str = "",
              error: str = "", name: str = "train.jsonl", count: int = 1) -> Case:  # fmt: skip
    """Return the case of a file of one line, or of these bytes."""
    raw = data if isinstance(data, bytes) else lines(data)
    check = partial(examples, data=raw, name=name, expected=[(whole, learnt)] * count)
    oracle = "" if error else f"learnt: {learnt}"
    return Case(DATA, kind, check, "refused" if error else "loads", oracle, log, error)


def pairs(folder: Path, line: dict[str, Any]) -> Read:
    (folder / "train.jsonl").write_bytes(lines(line))
    ((chosen, rejected),) = read_pairs(folder / "train.jsonl", encoder(), 512)
    return Read((shown(chosen)[1], shown(rejected)[1]), (ANSWER, "no<end_of_turn>"))


def pair_case(kind: str, line: dict[str, Any]) -> Case:
    return Case(DATA, f"--dpo: {kind}", partial(pairs, line=line), "loads",
                "learnt: both answers")  # fmt: skip


def pretty(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


MESSAGES = {"messages": [USER, YES]}
ROW = lines(MESSAGES)
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
ALPACA = {"instruction": "hi", "input": "", "output": "yes"}
DATASET = [
    data_case("messages (OpenAI, TRL)", MESSAGES),
    data_case("ShareGPT", {"conversations": SHAREGPT}),
    data_case("prompt and completion, texts", {"prompt": "hi", "completion": "yes"}, PLAIN,
              "yes<eos>"),
    data_case("prompt and completion, messages", {"prompt": [USER], "completion": [YES]}),
    data_case("Alpaca", ALPACA),
    data_case("Gemini's contents",
              {"contents": [{"role": "user", "parts": [{"text": "hi"}]},
                            {"role": "model", "parts": [{"text": "yes"}]}]}),
    data_case("text", {"text": "hiyes"}, PLAIN, "hiyes<eos>"),
    data_case("text that a chat template wrote", {"text": CHAT + "\n"}, CHAT + "\n<eos>",
              CHAT.removeprefix("<bos>") + "\n<eos>"),
    pair_case("prompt, chosen, rejected", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}),
    pair_case("whole conversations", {"chosen": [USER, YES], "rejected": [USER, NO]}),
    pair_case("LLaMA-Factory's", {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1],
              "rejected": {"from": "gpt", "value": "no"}}),
    pair_case("OpenAI's", {"input": {"messages": [USER]}, "preferred_output": [YES],
              "non_preferred_output": [NO]}),
    Case(DATA, "--dpo: two answers that are the same", verdict="refused", error="are the same",
         check=partial(pairs, line={"prompt": "a", "chosen": "b", "rejected": "b"})),
    data_case("a JSON array", json.dumps([MESSAGES] * 2).encode(), count=2, name="train.json"),
    data_case("a JSON array over several lines", pretty([MESSAGES])),
    data_case("a byte order mark and Windows' line ends", b"\xef\xbb\xbf" + ROW.strip() + b"\r\n"),
    data_case("empty lines between", b"\n" + ROW + b"\n\n" + ROW, count=2),
    data_case("nulls of a table", MESSAGES | {"text": None, "tools": None}),
    data_case("other columns", MESSAGES | {"source": "web", "id": 7}, log="id"),
    data_case("a turn that is not to be learnt",
              {"messages": [USER, NO | {"weight": 0}, USER, YES]},
              CHAT.replace("yes", "no") + "\n" + CHAT.removeprefix("<bos>")),
    data_case("images", MESSAGES | {"images": ["a.png"]}, error="images"),
    data_case("a weight of a line", MESSAGES | {"weight": 0.5}, error="weight"),
    data_case("other keys", {"question": "hi", "answer": "yes"}, error="expected the keys"),
    data_case("a comma after the object", ROW.strip() + b",\n", error="a comma after the object"),
    data_case("an object over several lines", pretty(MESSAGES), error="goes on over several lines"),
    data_case("a Python dict", b"{'text': 'hi'}\n", error="single quotes"),
    data_case("UTF-16", ROW.decode().encode("utf-16"), error="UTF-"),
    data_case("CSV", b"prompt,completion\nhi,yes\n", name="train.csv", error="a table"),
    data_case("Parquet", b"PAR1" + bytes(64), name="train.parquet", error="Parquet"),
    data_case("compressed", gzip.compress(ROW, mtime=0), name="train.jsonl.gz", error="gzip"),
    data_case("an empty file", b"", error="is empty"),
    data_case("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
              error="git lfs pull"),
    data_case("a web page", b"<html><body>", error="a web page"),
]  # fmt: skip

CASES = [*ADAPTERS, *DATASET]
