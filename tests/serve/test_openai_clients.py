"""The official OpenAI client before a real server with a toy model."""

import asyncio

import openai
import pytest
from serve.running import idle, serving, wait_until

from gemlax.serve.security import Gate

pytestmark = pytest.mark.deep

USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def address(kitchen):
    with serving(kitchen, Gate(["right"])) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(address, kitchen):
    with openai.OpenAI(base_url=address, api_key="right", max_retries=0, timeout=20) as client:
        yield client
    wait_until(lambda: idle(kitchen), "free slots")


def test_a_chat_is_answered_as_the_model_answers_it(client, kitchen):
    done = client.chat.completions.create(model="toy", messages=USER, max_tokens=12, seed=3)
    message = kitchen.model.chat(USER, max_new_tokens=12, seed=3)
    (choice,) = done.choices
    assert choice.message.content == message.content
    assert choice.message.tool_calls is None
    assert "tool_calls" not in choice.message.model_dump(exclude_unset=True)
    assert choice.finish_reason == "length"
    assert done.usage.completion_tokens == 12 == len(message.tokens)
    assert done.usage.prompt_tokens == len(kitchen.model.chat_format.encode(USER))
    assert done.model == "toy"


def test_a_stream_gives_the_same_text_and_usage_only_when_asked(client):
    ask = {"model": "toy", "messages": USER, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    options = {"include_usage": True}
    last = list(client.chat.completions.create(**ask, stream=True, stream_options=options))[-1]
    assert last.choices == []
    assert last.usage.model_dump() == whole.usage.model_dump()


def test_the_stream_helper_takes_several_choices(client):
    with client.chat.completions.stream(
        model="toy",
        messages=USER,
        n=3,
        seed=1,
        temperature=1,
        stop=list("abcdefghijklmnop"),
        extra_body={"include_stop_str_in_output": True},
    ) as stream:
        for _ in stream:
            pass
        done = stream.get_final_completion()
    texts = [choice.message.content for choice in done.choices]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len(set(texts)) == 3


def test_choices_of_one_seed_differ_and_are_those_of_the_seeds_after_it(client):
    """Breakage 26 (serving: n > 1 with one seed, identical)."""
    ask = {"model": "toy", "messages": USER, "max_tokens": 6, "temperature": 1}
    both = client.chat.completions.create(**ask, n=2, seed=7)
    second = client.chat.completions.create(**ask, seed=8)
    texts = [choice.message.content for choice in both.choices]
    assert texts[0] != texts[1] == second.choices[0].message.content


def test_without_a_seed_answers_differ_and_any_seed_is_taken(client):
    """Breakage 27 (no seed, identical for ever)."""
    ask = {"model": "toy", "messages": USER, "max_tokens": 8, "temperature": 1}
    texts = {client.chat.completions.create(**ask).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3
    seeds = [-1, 2**32 - 1]
    same = [client.chat.completions.create(**ask, seed=seed).choices[0] for seed in seeds]
    assert same[0].message.content == same[1].message.content


def test_the_asynchronous_client_gets_the_same(address, client):
    ask = {"model": "toy", "messages": USER, "max_tokens": 8, "seed": 3}

    async def both():
        async with openai.AsyncOpenAI(base_url=address, api_key="right") as other:
            whole, stream = await asyncio.gather(
                other.chat.completions.create(**ask),
                other.chat.completions.create(**ask, stream=True),
            )
            chunks = [chunk async for chunk in stream]
        return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    whole, text = asyncio.run(both())
    assert text == whole.choices[0].message.content
    assert text == client.chat.completions.create(**ask).choices[0].message.content


def test_closing_a_stream_frees_its_slot(client, kitchen):
    """Breakages 1 and 3 (disconnects not noticed)."""
    stream = client.chat.completions.create(model="toy", messages=USER, max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: idle(kitchen), "a free slot")
    assert kitchen.worker.admission.num_places == 0


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs"),
        ({"n": 5}, openai.BadRequestError, "n"),
        ({"extra_body": {"guided_json": {}}}, openai.BadRequestError, "guided_json"),
        ({"extra_body": {"mirostat": 2}}, openai.BadRequestError, "mirostat"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "modalities"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_field(client, changes, error, param):
    """Breakages 29 and 32 (absurd values clamped or accepted in silence)."""
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "toy", "messages": USER, **changes})
    assert caught.value.param == param
    assert param in str(caught.value)


def test_what_is_unknown_or_null_changes_nothing(client):
    ask = {"model": "toy", "messages": USER, "max_tokens": 6, "seed": 3}
    whole = client.chat.completions.create(**ask)
    more = {"unheard_of": {"x": 1}, "top_p": None, "stop": None, "best_of": 1, "min_p": None}
    other = client.chat.completions.create(**ask, user="me", metadata={"a": "b"}, extra_body=more)
    assert other.choices[0].message.content == whole.choices[0].message.content


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client):
    """Breakage 29 (too long a prompt shortened in silence)."""
    long = [{"role": "user", "content": "a " * 100}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.body["n_ctx"] == 128
    assert caught.value.body["n_prompt_tokens"] > 128
    clipped = client.chat.completions.create(model="toy", messages=USER, max_tokens=100_000)
    assert clipped.choices[0].finish_reason == "length"
    assert clipped.usage.total_tokens == 128


def test_a_stop_string_ends_the_text_and_is_reported(client):
    """Breakage 31 (stop strings ignored when streaming)."""
    ask = {"model": "toy", "messages": USER, "max_tokens": 40, "seed": 3}
    text = client.chat.completions.create(**ask).choices[0].message.content
    stop = text[5:7]
    for options in ({}, {"include_stop_str_in_output": True}):
        expected = text[: text.index(stop) + (2 if options else 0)]
        done = client.chat.completions.create(**ask, stop=stop, extra_body=options)
        assert done.choices[0].message.content == expected
        assert done.choices[0].finish_reason == "stop"
        assert done.choices[0].model_extra["stop_reason"] == stop
        chunks = client.chat.completions.create(**ask, stop=stop, stream=True, extra_body=options)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_a_stop_id_of_the_caller_ends_the_text_and_is_reported(client, kitchen):
    ask = {"model": "toy", "messages": USER, "max_tokens": 40, "seed": 3}
    tokens = kitchen.model.chat(USER, max_new_tokens=40, seed=3).tokens
    done = client.chat.completions.create(**ask, extra_body={"stop_token_ids": [tokens[4]]})
    assert done.choices[0].model_extra["stop_reason"] == tokens[4]
    assert done.usage.completion_tokens == tokens.index(tokens[4]) + 1


def test_log_probabilities_have_the_shape_of_the_api(client):
    done = client.chat.completions.create(
        model="toy", messages=USER, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = done.choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 3
    assert b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace") == (
        done.choices[0].message.content
    )


def test_a_wrong_key_is_refused_and_health_is_open(address):
    other = openai.OpenAI(base_url=address, api_key="wrong", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_models_are_listed_and_found(client):
    (model,) = client.models.list().data
    assert model.id == "toy"
    assert client.models.retrieve("toy").model_extra["max_model_len"] == 128
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_there_are_no_embeddings(client):
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model="toy", input="x")


def test_completions_echo_a_prompt_with_its_log_probabilities(client, kitchen):
    """What lm-eval asks for; breakage 32 (log-probabilities in the shape of chats)."""
    ids = [2, *range(300, 340)]
    done = client.completions.create(
        model="toy", prompt=[ids, ids[:9]], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    for choice, prompt in zip(done.choices, (ids, ids[:9]), strict=True):
        shown = choice.logprobs
        assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
        assert len(shown.tokens) == len(prompt) + 1 == len(shown.text_offset)
        score = kitchen.model.score([prompt])[0].log_likelihood
        assert abs(sum(shown.token_logprobs[1:-1]) - score) < 1e-4
        greedy = kitchen.model.logits([prompt])[0].argmax(-1)
        for place, (own, top) in enumerate(
            zip(shown.token_logprobs[1:-1], shown.top_logprobs[1:-1], strict=True)
        ):
            assert (max(top.values()) == own) == (int(greedy[place]) == prompt[place + 1])
        assert shown.token_logprobs[-1] == max(shown.top_logprobs[-1].values())


def test_an_echo_alone_generates_nothing(client):
    done = client.completions.create(model="toy", prompt="abc def", max_tokens=0, echo=True)
    assert done.choices[0].text == "abc def"
    assert done.usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="toy", prompt="abc def", max_tokens=0)


def test_completions_of_several_prompts_are_in_order(client, kitchen):
    prompts = ["hello", "some other words", "a"]
    done = client.completions.create(model="toy", prompt=prompts, max_tokens=5, n=2, seed=1)
    assert [choice.index for choice in done.choices] == list(range(6))
    for index, prompt in enumerate(prompts):
        for choice in range(2):
            alone = kitchen.model.generate(prompt, max_new_tokens=5, seed=1 + choice)
            assert done.choices[2 * index + choice].text == alone.text


def test_nothing_was_compiled_after_the_warm_up(client, kitchen):
    before = kitchen.model.programs.counters.programs
    client.chat.completions.create(
        model="toy", messages=USER, max_tokens=5, logprobs=True, logit_bias={"300": 1},
        presence_penalty=1, stop=["xyz"], temperature=1, n=3,
        extra_body={"min_tokens": 3, "bad_words": ["ab", "cd"], "repetition_penalty": 1.1},
    )  # fmt: skip
    client.completions.create(model="toy", prompt=["a " * size for size in (5, 30, 50)])
    assert kitchen.model.programs.counters.programs == before
