"""The description of the API: whole, JSON, and without a reference to nowhere."""

import json
import re

import pytest

from gemlax.serve.body import convert
from gemlax.serve.openai_chat import ChatBody
from gemlax.serve.openapi import openapi
from gemlax.serve.work import ServeError


def test_the_description_is_json_and_each_reference_in_it_leads_somewhere():
    text = json.dumps(openapi())
    description = json.loads(text)
    assert {"/v1/chat/completions", "/v1/completions", "/health"} <= set(description["paths"])
    names = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert names and names <= set(description["components"]["schemas"])


def test_a_part_of_a_body_that_is_wrong_is_named_as_in_the_whole():
    with pytest.raises(ServeError, match="messages") as caught:
        convert({"messages": "hello"}, ChatBody)
    assert caught.value.status == 400
