"""Every way a line of the prompts file can be right or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steeple.errors import StorageError
from steeple.jobs.lines import Line, read_lines
from steeple.types import SamplingParams

DEFAULTS = SamplingParams(max_tokens=9, temperature=0.5)


def parse(folder: Path, *lines: str | bytes | dict[str, Any], name: str = "prompts.jsonl") -> list[Line]:
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path = folder / name
    path.write_bytes(b"\n".join(raw))
    return list(read_lines(path, DEFAULTS))


def error(folder: Path, line: str | bytes | dict[str, Any]) -> str:
    (only,) = parse(folder, line)
    assert only.error is not None
    assert only.prompt is None
    assert only.messages is None
    return only.error


def batch(url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": "x", "method": "POST", "url": url, "body": body}


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    lines = parse(tmp_path, b"\xef\xbb\xbffirst\r", "", "  indented ", "   ", "last", name="p.txt")
    assert [(x.number, x.id, x.prompt) for x in lines] == [
        (1, "line-1", "first"),
        (3, "line-3", "  indented "),
        (5, "line-5", "last"),
    ]
    assert all(x.params == DEFAULTS for x in lines)


def test_a_line_wins_over_the_defaults(tmp_path: Path) -> None:
    a, b, c = parse(
        tmp_path,
        {"prompt": "a", "id": 7, "max_tokens": 3, "stop": ["x", "y"], "top_p": None},
        {"prompt": [1, 2], "id": "b", "temperature": 0, "logprobs": 0},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
    )
    assert (a.id, a.key, a.prompt) == (7, "7", "a")
    assert a.params == SamplingParams(max_tokens=3, temperature=0.5, stop=("x", "y"))
    assert b.prompt == [1, 2]
    assert b.params == SamplingParams(max_tokens=9, temperature=0, logprobs=0)
    assert c.messages == [{"role": "user", "content": "hi"}]
    assert c.id == "line-3"


def test_digest_follows_the_line(tmp_path: Path) -> None:
    same, other = {"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}
    digests = [x.digest for x in parse(tmp_path, same, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x"', "the line is no JSON"),
        ("[" * 100_000, "the line is no JSON"),
        ('["prompt"]', "the line is list, not a JSON object"),
        (b'{"prompt": "\xff"}', "no UTF-8 at byte 12"),
        ({"id": "a"}, "neither prompt nor messages"),
        ({"prompt": "a", "messages": []}, "prompt and messages"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": 5}, "prompt is int; give a string or a list of token ids"),
        ({"prompt": ["a", "b"]}, "several prompts a line each"),
        ({"prompt": [1, True]}, "no token id"),
        ({"prompt": [2**40]}, "token ids outside"),
        ('{"prompt": "half \\ud800"}', "half of a surrogate pair at character 5"),
        ({"prompt": "a", "id": ""}, "id = '' is no id"),
        ({"prompt": "a", "id": [1]}, "id = [1] is no id"),
        ({"prompt": "a", "id": True}, "id = True is no id"),
        ({"promt": "a"}, "'promt' is no field of a request. Did you mean 'prompt'?"),
        ({"prompt": "a", "temprature": 1}, "Did you mean 'temperature'?"),
        ('{"prompt": "a", "temperature": NaN}', "temperature = nan is out of range"),
        ('{"prompt": "a", "temperature": Infinity}', "temperature = inf is out of range"),
        ({"prompt": "a", "top_p": 1.5}, "top_p = 1.5 is out of range; give a value from 1e-06 to 1.0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens = 0 is out of range"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens = 'many' is not an integer"),
        ({"prompt": "a", "n": 1.5}, "n = 1.5 is not an integer"),
        ({"prompt": "a", "stop": 5}, "stop = 5 is not a list"),
        ({"messages": []}, "messages is no list of messages, or an empty one"),
        ({"messages": ["hi"]}, "messages[0] = 'hi' is no object"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role = None is no role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content = None is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is supported"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [1]}]}, "messages[0].tool_calls is not supported"),
    ],
)
def test_a_bad_line_says_why(tmp_path: Path, line: Any, says: str) -> None:
    assert says in error(tmp_path, line)


def test_a_bad_line_keeps_its_id_and_harms_no_other(tmp_path: Path) -> None:
    bad, broken, good = parse(tmp_path, {"id": "a", "prompt": 5}, "{", {"id": "b", "prompt": "p"})
    assert (bad.id, broken.id, good.id) == ("a", "line-2", "b")
    assert good.error is None
    assert good.prompt == "p"


def test_batch_lines_become_requests(tmp_path: Path) -> None:
    chat, text = parse(
        tmp_path,
        batch(
            "/v1/chat/completions",
            model="gpt",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=4,
            stop="\n",
            top_p=0.5,
            seed=3,
            n=2,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            logprobs=True,
            top_logprobs=5,
            user="me",
            stream=False,
            tools=None,
            response_format={"type": "text"},
        ),
        batch(prompt="p", max_tokens=5, temperature=0, logprobs=3, stop=["a", "b"], best_of=1),
    )
    assert chat.id == "x"
    assert chat.error is None
    assert chat.messages == [{"role": "user", "content": "hi"}]
    assert chat.params == SamplingParams(
        max_tokens=4,
        temperature=0.5,
        stop=("\n",),
        top_p=0.5,
        seed=3,
        n=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logprobs=5,
    )
    assert text.prompt == "p"
    assert text.params == SamplingParams(max_tokens=5, logprobs=3, stop=("a", "b"))


def test_chat_logprobs_without_a_number_report_the_token_alone(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "hi"}]
    with_, without = parse(
        tmp_path,
        batch("/v1/chat/completions", messages=message, logprobs=True),
        batch("/v1/chat/completions", messages=message, logprobs=False),
    )
    assert with_.params.logprobs == 0
    assert without.params.logprobs is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"body": {"prompt": "p"}}, "custom_id is missing"),
        ({"custom_id": "x"}, "body is missing"),
        ({**batch(prompt="p"), "method": "GET"}, "method = 'GET' is not supported"),
        ({**batch(prompt="p"), "metod": "POST"}, "Did you mean 'method'?"),
        (batch("/v1/completion", prompt="p"), "Did you mean '/v1/completions'?"),
        ({**batch(prompt="p"), "url": ["x"]}, "url = ['x'] is not supported"),
        (batch("/v1/chat/completions", prompt="p"), "body has no 'messages'"),
        (batch(prompt="p", stream=True), "body.stream = True is not supported"),
        (batch(prompt="p", logit_bias={"5": 1}), "body.logit_bias = {'5': 1} is not supported"),
        (batch(prompt="p", temprature=1), "body.temprature = 1 is not supported; leave it out. Did you mean"),
        (batch(prompt="p", max_tokens=3, max_completion_tokens=4), "max_completion_tokens = 4 differ"),
        (batch("/v1/chat/completions", messages=[], top_logprobs=2), "top_logprobs needs logprobs = true"),
        (batch("/v1/chat/completions", messages=[], logprobs=2), "logprobs = 2 is not true or false"),
        (batch(prompt="p", temperature=-1), "temperature = -1 is out of range"),
    ],
)
def test_a_batch_field_is_honoured_or_refused_by_name(tmp_path: Path, line: Any, says: str) -> None:
    assert says in error(tmp_path, line)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.txt cannot be read \(No such file"):
        list(read_lines(tmp_path / "nowhere.txt", DEFAULTS))
