"""Writes gemma-3-270m-gguf.json: what the gguf package reads in the file of the `demo` extra.

Run as `python tests/golden/make_gguf_270m.py FILE.gguf`; it takes a minute. For every tensor: type,
shape, and the CRC-32 of the dequantised float32 values. llama.cpp's converter adds 1 to the weights
whose names end in norm.weight; it is taken off again here.
"""

import json
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np


def main(path: str) -> None:
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)
        crc = zlib.crc32(np.ascontiguousarray(values, np.float32))
        tensors[tensor.name] = [tensor.tensor_type.name, list(values.shape), crc]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in tensors.items())
    Path(__file__).with_name("gemma-3-270m-gguf.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
