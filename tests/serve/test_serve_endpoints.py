"""The endpoints: what they answer equals what the offline API gives, in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Running, Start, events

from steeple import LLM, SamplingParams, __version__

PROMPTS = ["def area(", "class Box:", "for index in range(10):\n"]
GREEDY = {"temperature": 0.0, "max_tokens": 24}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "user", "content": "print the index"}]


def texts(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_greedy_completions_equal_the_offline_ones(server: Running, offline: LLM) -> None:
    expected = [out.text for out in offline.generate(PROMPTS, SamplingParams(max_tokens=24))]
    answer = server.post(COMPLETIONS, {"model": "tiny", "prompt": PROMPTS, **GREEDY})
    assert texts(answer) == expected
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    read = sum(len(offline.tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert body["usage"] == {"prompt_tokens": read, "completion_tokens": 72, "total_tokens": read + 72}
    assert server.engine.stats.speculation.accepted > 0


@pytest.mark.parametrize("prompt", ["def area(", [5, 9, 200], [[5, 9, 200], [31, 7]], ["for", "class"]])
def test_prompts_of_every_kind(server: Running, offline: LLM, prompt: Any) -> None:
    expected = [out.text for out in offline.generate(prompt, SamplingParams(max_tokens=24))]
    assert texts(server.post(COMPLETIONS, {"prompt": prompt, **GREEDY})) == expected


def test_seeds_repeat_and_equal_the_offline_ones(server: Running, start: Start, offline: LLM) -> None:
    """Without drafts the very same draws; with drafts the same law, and the same text twice."""
    plain = start(drafter="none")
    body = {"prompt": PROMPTS[0], "max_tokens": 16, "seed": 11, "n": 3, "temperature": 0.8, "top_p": 0.9, "min_p": 0.01}
    params = SamplingParams(max_tokens=16, seed=11, n=3, temperature=0.8, top_p=0.9, min_p=0.01)
    own = texts(plain.post(COMPLETIONS, body))
    assert own == [choice.text for choice in offline.generate(PROMPTS[0], params)[0].outputs]
    assert len(set(own)) == 3
    drafted = texts(server.post(COMPLETIONS, body))
    assert drafted == texts(server.post(COMPLETIONS, body))
    assert texts(server.post(COMPLETIONS, {**body, "seed": 12})) != drafted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 1.5),
        ("frequency_penalty", -1.0),
        ("repetition_penalty", 1.4),
        ("stop_token_ids", [66, 67, 75, 258]),
        ("ignore_eos", True),
    ],
)
def test_sampling_fields_reach_the_engine(server: Running, offline: LLM, field: str, value: Any) -> None:
    body = {"prompt": PROMPTS[0], **GREEDY, "max_tokens": 60}
    expected = offline.generate(PROMPTS[0], SamplingParams(max_tokens=60, **{field: value})).pop().text
    assert texts(server.post(COMPLETIONS, {**body, field: value})) == [expected]


def test_top_k_of_one_is_greedy(server: Running) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 1.0}
    greedy = texts(server.post(COMPLETIONS, {**body, "temperature": 0.0}))
    assert texts(server.post(COMPLETIONS, {**body, "top_k": 1})) == greedy
    assert texts(server.post(COMPLETIONS, {**body, "min_p": 1.0})) == greedy
    assert texts(server.post(COMPLETIONS, {**body, "top_k": -1, "seed": 1})) != greedy


def test_stop_strings_end_before_themselves(server: Running, offline: LLM) -> None:
    whole = offline.generate(PROMPTS[0], SamplingParams(max_tokens=24)).pop().text
    stop = whole[8:10]
    answer = server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "stop": [stop, "nowhere"]})
    assert texts(answer) == [whole[: whole.index(stop)]]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert texts(server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "stop": stop})) == texts(answer)


def test_a_bias_forbids_and_forces(server: Running) -> None:
    free = server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "logprobs": 0}).json()["choices"][0]
    forced = server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "logit_bias": {"75": 100}})
    assert texts(forced) == ["k" * 24]
    name = free["logprobs"]["tokens"][0]
    first = server.service.texts.tokenizer.convert_tokens_to_ids(name)
    forbidden = texts(server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "logit_bias": {str(first): -100}}))
    assert free["text"].startswith(name)
    assert name not in forbidden[0]


def test_a_least_length_is_kept(server: Running) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0.0, "logit_bias": {"0": 100}}
    short = server.post(COMPLETIONS, body).json()
    assert short["usage"]["completion_tokens"] == 1
    longer = server.post(COMPLETIONS, {**body, "min_tokens": 9}).json()
    assert longer["usage"]["completion_tokens"] == 10
    assert longer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_of_completions(server: Running, offline: LLM) -> None:
    expected = offline.generate(PROMPTS[0], SamplingParams(max_tokens=24, logprobs=3)).pop().outputs[0].logprobs
    answer = server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "logprobs": 3}).json()
    told = answer["choices"][0]["logprobs"]
    assert expected is not None
    assert told["token_logprobs"] == pytest.approx([token.logprob for token in expected])
    for best, token in zip(told["top_logprobs"], expected, strict=True):
        assert list(best.values())[:3] == pytest.approx([value for _, value in token.top])
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"])
    none = server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY, "logprobs": 0}).json()
    assert none["choices"][0]["logprobs"]["top_logprobs"] is None
    assert server.post(COMPLETIONS, {"prompt": "a", **GREEDY}).json()["choices"][0]["logprobs"] is None


def test_what_was_drawn_is_among_the_best(server: Running) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 2.0, "seed": 3, "logprobs": 1}
    told = server.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert all(name in best for name, best in zip(told["tokens"], told["top_logprobs"], strict=True))
    assert max(map(len, told["top_logprobs"])) == 2


def test_logprobs_of_chats(server: Running) -> None:
    body = {"messages": TALK, **GREEDY, "logprobs": True, "top_logprobs": 2}
    choice = server.post(CHAT, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 24
    raw = b"".join(bytes(token["bytes"]) for token in content)
    assert raw.decode(errors="replace") == choice["message"]["content"]
    for token in content:
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # greedy: the best is what was taken
        assert len(token["top_logprobs"]) == 2


def test_chats_equal_the_offline_ones(server: Running, offline: LLM) -> None:
    expected = offline.chat(TALK, SamplingParams(max_tokens=24)).text
    answer = server.post(CHAT, {"model": "tiny", "messages": TALK, **GREEDY}).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "length"
    parts = [{"role": "user", "content": [{"type": "text", "text": TALK[0]["content"]}]}]
    newer = {"messages": parts, "temperature": 0, "max_completion_tokens": 24}
    assert server.post(CHAT, newer).json()["choices"] == answer["choices"]


def test_a_chat_may_use_all_of_the_context(server: Running) -> None:
    usage = server.post(CHAT, {"messages": TALK, "temperature": 0, "ignore_eos": True}).json()["usage"]
    assert usage["total_tokens"] == server.service.context == 256


def test_a_tokenizer_without_template_gets_a_plain_one(server: Running) -> None:
    server.service.texts.tokenizer.chat_template = None
    told = server.post("/tokenize", {"messages": [{"role": "system", "content": "Be."}, *TALK]}).json()
    text = server.post("/detokenize", {"tokens": told["tokens"]}).json()["prompt"]
    assert text == "system: Be.\nuser: print the index\nassistant:"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept(server: Running, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["width", "height"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["size", "n"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "box", "schema": schema, "strict": True}}
    body = {"messages": TALK, "temperature": temperature, "seed": 5, "n": 3, "response_format": form}
    answer = server.post(CHAT, {**body, "max_tokens": 100}).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        told = json.loads(choice["message"]["content"])
        assert told["size"] in ("width", "height")
        assert 0 <= told["n"] <= 99
        assert set(told) == {"size", "n"}
    plain = server.post(CHAT, {**body, "max_tokens": 100, "speculative": {"k": 0}}).json()
    if temperature == 0.0:
        assert plain["choices"] == answer["choices"]
    server.settle()


def test_any_object_begins_with_a_brace(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 20, "seed": 1, "response_format": {"type": "json_object"}}
    assert texts(server.post(COMPLETIONS, body))[0].startswith("{")


def test_speculation_of_one_request(server: Running) -> None:
    body = {"prompt": PROMPTS[0], **GREEDY, "metrics": True}
    told = {
        k: server.post(COMPLETIONS, {**body, "speculative": {"k": k}}).json()["metrics"]["speculative_decoding"]
        for k in (0, 1, 3)
    }
    assert told[0]["num_draft_tokens"] == 0
    assert told[0]["mean_acceptance_length"] is None
    assert told[1]["num_draft_tokens"] == told[1]["num_spec_steps"] > 0
    assert told[3]["num_draft_tokens"] > told[1]["num_draft_tokens"]
    none = server.post(COMPLETIONS, {**body, "speculative": {"drafter": "none"}}).json()
    assert none["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    same = server.post(COMPLETIONS, {**body, "speculative": {"drafter": "small_lm", "k": 2}}).json()
    assert same["choices"] == none["choices"]


def test_metrics_of_one_request_add_up(server: Running) -> None:
    body = {"prompt": PROMPTS, "max_tokens": 60, "temperature": 0, "metrics": "detailed"}
    told = server.post(COMPLETIONS, body).json()["metrics"]["speculative_decoding"]
    steps = [accepted for one in told["per_step_accepted"] for accepted in one]
    assert len(told["per_step_accepted"]) == 3
    assert told["num_spec_steps"] == len(steps) == sum(told["acceptance_histogram"])
    assert told["num_accepted_draft_tokens"] == sum(steps) > 0
    assert told["acceptance_histogram"] == [steps.count(j) for j in range(max(steps) + 1)]
    assert told["mean_acceptance_length"] == pytest.approx(1 + sum(steps) / len(steps))
    assert told["draft_acceptance_rate"] == pytest.approx(sum(steps) / told["num_draft_tokens"])
    assert told["num_spec_tokens"] == 3
    assert "metrics" not in server.post(COMPLETIONS, {**body, "metrics": False}).json()
    by_header = server.post(COMPLETIONS, {"prompt": "a", **GREEDY}, headers={"X-Steeple-Metrics": "1"}).json()
    assert "speculative_decoding" in by_header["metrics"]


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("extra", [{}, {"n": 3, "seed": 1, "temperature": 1.0}, {"stop": ["x", "e"]}, {"logprobs": 2}])
def test_a_stream_joins_to_the_same_text(server: Running, extra: dict[str, Any]) -> None:
    body = {"prompt": PROMPTS, **GREEDY, **extra}
    whole = server.post(COMPLETIONS, body).json()
    answer = server.post(COMPLETIONS, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"]
        if "logprobs" in extra:
            for part in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [item for c in own for item in c["logprobs"][part]] == choice["logprobs"][part]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_holds_back_what_a_stop_string_may_take(server: Running, offline: LLM) -> None:
    whole = offline.generate(PROMPTS[0], SamplingParams(max_tokens=24)).pop().text
    for start in range(0, len(whole) - 12, 5):
        stop = whole[start : start + 6]
        body = {"prompt": PROMPTS[0], **GREEDY, "stop": stop, "stream": True}
        chunks = events(server.post(COMPLETIONS, body).text)
        told = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        assert told == whole[: whole.index(stop)]


def test_a_chat_streams_its_role_first(server: Running) -> None:
    body = {"messages": TALK, **GREEDY, "n": 2}
    whole = server.post(CHAT, body).json()
    chunks = events(server.post(CHAT, {**body, "stream": True}).text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in deltas[1:])
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == whole["choices"][index]["message"]["content"]


def test_usage_comes_at_the_end_of_a_stream(server: Running) -> None:
    body = {"prompt": PROMPTS[0], **GREEDY, "stream": True, "metrics": True}
    whole = server.post(COMPLETIONS, {"prompt": PROMPTS[0], **GREEDY}).json()
    chunks = events(server.post(COMPLETIONS, {**body, "stream_options": {"include_usage": True}}).text)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0
    always = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server.post(COMPLETIONS, {**body, "stream_options": always}).text)
    written = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert written == sorted(written)
    assert written[-1] == 24


def test_a_stream_may_say_how_tokens_came(server: Running) -> None:
    body = {"prompt": PROMPTS[0], **GREEDY, "max_tokens": 80, "stream": True, "speculative": {"origins": True}}
    chunks = events(server.post(COMPLETIONS, body).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    tokens = [token for choice in choices for token in choice["speculative"]["tokens"]]
    assert len(tokens) == 80
    kinds = [token["origin"] for token in tokens]
    assert kinds[0] == "plain"
    assert {"accepted", "recovered"} <= set(kinds) <= {"plain", "accepted", "recovered", "bonus"}
    # what a stream cannot show yet, at its end, are bytes of half a character
    assert "".join(choice["text"] for choice in choices).startswith("".join(token["text"] for token in tokens))
    plain = events(server.post(COMPLETIONS, {**body, "speculative": {"origins": True, "k": 0}}).text)
    told = [t for chunk in plain for c in chunk["choices"] for t in c["speculative"]["tokens"]]
    assert {token["origin"] for token in told} == {"plain"}
    assert [token["id"] for token in told] == [token["id"] for token in tokens]


# ---------------------------------------------------------------------- the rest


def test_models(server: Running) -> None:
    listing = server.get("/v1/models").json()
    assert [model["id"] for model in listing["data"]] == ["tiny"]
    assert listing["data"][0]["max_model_len"] == 256
    assert server.get("/v1/models/tiny").json() == listing["data"][0]


def test_tokens_there_and_back(server: Running, offline: LLM) -> None:
    text = "def area(width):\n    return 'ü'"
    told = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == offline.tokenizer.encode(text)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 256
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": TALK}).json()["tokens"]
    assert chat == offline.apply_chat_template(TALK)
    open_ = server.post("/tokenize", {"messages": TALK, "add_generation_prompt": False}).json()["tokens"]
    assert len(open_) < len(chat)


def test_long_texts_are_encoded_beside_the_loop(server: Running, offline: LLM) -> None:
    text = "width * height\n" * 1000
    assert server.post("/tokenize", {"prompt": text}).json()["tokens"] == offline.tokenizer.encode(text)


def test_state(server: Running) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.get("/version").json() == {"version": __version__}
    server.loop.drain(10.0)
    assert server.get("/ready").status_code == 503
    assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 503
