"""Makes llama_tokens.json: ids and bytes that llama.cpp gives for the real Gemma 3 270M file.

Run with an environment that has llama-cpp-python (0.3.36 made the committed file):

    python tests/golden/make_llama_tokens.py .cache/gemma-3-270m-q4_k_m.gguf

The ids are without BOS. Left out, because gemlax differs on purpose: <start_of_image> and
<end_of_image> (user-defined pieces in this file, markers for gemlax) and U+2581 next to itself or
to a space (gemlax and SentencePiece read it as a space).
"""

import json
import random
import sys
from pathlib import Path

import llama_cpp

OUT = Path(__file__).with_name("llama_tokens.json")

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog; it's 3.14159 and 1,234,567.",
    " leading and trailing ",
    "   three before, four after    ",
    "a  b   c    d     e",
    "x" + " " * 40 + "y" + " " * 70,
    "def f(x):\n    if x > 0:\n\treturn x ** 2\n\t\t# tab\n\n\nclass A:\n        pass\n",
    "\t\tindented\t\t\ttabs\t",
    "\n",
    "\n\n",
    "\n" * 31 + "a" + "\n" * 32 + "b" + "\n" * 75,
    "line\r\nline\r\n",
    " \n \n  \n",
    "你好\uff0c世界。今天天气怎么样\uff1f",
    "日本語のテキスト、カタカナとひらがな。",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Привет, мир! Ёлка",
    "안녕하세요 세계",
    "e\u0301 ñ ü ß Ǆ ﬁ",
    "😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "ᚠᛇᚻ 𐎀𐎁 𒀀𒈗 \U0001f9ff \ue000",
    "\u0378\u2fff\U000e0001",
    "nul \x00 and \x07 bell \x7f \x1b[0m",
    "\ufeffbyte order mark",
    "zero\u200bwidth\u200djoiner\u2060",
    "one▁two",
    "<b>bold</b> <table><tr><td>1</td></tr></table> <p>none</p>",
    "<h1>a</h1><code>x</code><blockquote><a><em>",
    "<0x0A><0x41>",
    "[multimodal] [ multimodal ]",
    "<bos>",
    "<bos>Hi<eos>",
    "a<bos><bos>b",
    "<pad><unk><mask>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    " <end_of_turn> ",
    "<end_of_turn",
    "<end_of_turn><end_of_turn>",
    "<<start_of_turn>>",
    "<unused0><unused98><unused6241>",
    "<|turn>user<turn|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "hahahahahahahaha hahaha",
    "=" * 100 + "-" * 77 + "." * 50,
    "https://arxiv.org/path?query=1&other=%20#fragment",
    "$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$",
    "SELECT * FROM t WHERE a='b' -- comment",
]


def main() -> None:
    model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
    ids = [
        {
            "text": text,
            "ordinary": model.tokenize(text.encode(), add_bos=False, special=False),
            "parsed": model.tokenize(text.encode(), add_bos=False, special=True),
        }
        for text in TEXTS
    ]
    random.seed(0)
    # Normal pieces, byte pieces, and control pieces, which llama.cpp skips.
    choices = [range(238, 494), range(236743, 255968), range(500, 230000), [0, 1, 2, 4, 105, 106]]
    lists = [[random.choice(random.choice(choices)) for _ in range(24)] for _ in range(20)]
    lists += [[random.choice(choices[0]) for _ in range(24)] for _ in range(10)]
    lists = [[500, *ids] for ids in lists]  # the binding strips a space after a first BOS
    decoded = [{"ids": ids, "bytes": model.detokenize(ids).hex()} for ids in lists]
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in ids)
    more = ",\n".join(json.dumps(case) for case in decoded)
    OUT.write_text(f'{{"encode": [\n{lines}\n], "decode": [\n{more}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
