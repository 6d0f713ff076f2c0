"""transformers chats from a folder that gemlax saved: the same prompt, the same answer."""

import json

import adapters
import pytest
from reference.toys import toy
from test_chat import TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import chat_tokenizer

import gemlax
from gemlax.chat import ChatFormat

MESSAGES = [
    {"role": "system", "content": "be terse"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "how are you"},
]
# A turn of Gemma 4 without tools or thinking, in our own words.
TEMPLATE_4 = """
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
    {{- message.content | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""


@pytest.mark.parametrize(
    ("size", "family", "template"),
    [("gemma-3-270m", "gemma3", TEMPLATE), ("gemma-4-e2b", "gemma4", TEMPLATE_4)],
)
def test_transformers_chats_from_the_saved_folder(size, family, template, tmp_path):
    case = toy(size)
    decoder = adapters.build(case.config, case.weights, "index")
    ours = gemlax.Model(case.config, decoder, chat_tokenizer(family), chat_template=template)
    gemlax.save(ours, tmp_path / "saved")
    message = ours.chat(MESSAGES, max_new_tokens=12)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    asked = ours.chat_format.encode(MESSAGES, None, None)
    assert prompt["input_ids"][0].tolist() == asked
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    out = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    assert out[len(asked) :] == message.tokens
    assert len(message.tokens) > 3
    again = gemlax.load(tmp_path / "saved", layers="scan").chat(MESSAGES, max_new_tokens=12)
    assert again == message


def test_templates_get_the_tokens_that_the_settings_name(tmp_path):
    chat_tokenizer("gemma3").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = {"sot_token": "<start_of_turn>", "extra_special_tokens": {"eot": "<end_of_turn>"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    template = "{{ bos_token }}{{ sot_token }}{{ messages[0].content }}{{ eot }}{{ mask_token }}"
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, chat_template=template)
    asked = theirs.apply_chat_template(MESSAGES[1:2], return_dict=True)["input_ids"]
    ours = gemlax.load_tokenizer(tmp_path)
    assert ChatFormat(ours, template).encode(MESSAGES[1:2]) == asked
    assert ours.id_of("<start_of_turn>") in asked and ours.id_of("<end_of_turn>") in asked


@pytest.mark.parametrize(
    "tools", [[{"name": "f", "description": "d"}], [{"type": "function", "function": {}}]]
)
def test_templates_get_tools_and_empty_fields_as_transformers_gives_them(tools, tmp_path):
    chat_tokenizer("gemma3").save(tmp_path)
    template = "{{ bos_token }}{{ messages | tojson }}{{ tools | tojson }}"
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, chat_template=template)
    messages = [*MESSAGES[1:2], {"role": "assistant", "content": None, "name": None}, MESSAGES[3]]
    asked = theirs.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert ChatFormat(gemlax.load_tokenizer(tmp_path), template).encode(messages, tools) == asked
