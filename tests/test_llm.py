"""The offline API on tiny models: order, streams, seeds, stops, bad requests beside good ones."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from steeple import LLM, ConfigError, EngineConfig, ModelError, RequestError, SamplingParams, Task
from steeple.draft.ngram import NGramConfig

PROMPTS = ["def area(width):", "class Box:\n", "for index in", "print('of', 10)\n" * 3]
FREE = SamplingParams(max_tokens=14, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(target_folder: Path) -> LLM:
    return LLM(str(target_folder), kv_tokens=4096)


@pytest.fixture(scope="module", params=["ngram", "small"])
def drafted(request: pytest.FixtureRequest, target_folder: Path, draft_folder: Path) -> LLM:
    name = {"ngram": "ngram", "small": f"small_lm:{draft_folder}"}[request.param]
    return LLM(str(target_folder), name, kv_tokens=4096, step_tokens=24)


def test_outputs_are_transformers_own(plain: LLM, drafted: LLM, target_folder: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(target_folder).eval()
    for llm in (plain, drafted):
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, FREE), strict=True):
            ids = torch.tensor([llm.tokenizer.encode(prompt)])
            oracle = model.generate(ids, max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert output.prompt_token_ids == ids[0].tolist()
            assert output.token_ids == oracle[0, ids.shape[1] :].tolist()
            assert output.text == llm.tokenizer.decode(output.token_ids)
        llm.engine.check_integrity()


def test_outputs_come_in_the_order_of_the_prompts(plain: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5, 2)]
    outputs = plain.generate(PROMPTS, params)
    assert [len(o.token_ids) for o in outputs] == [9, 1, 5, 2]
    assert [o.prompt_token_ids for o in outputs] == [plain.tokenizer.encode(p) for p in PROMPTS]
    assert plain.generate([], FREE) == []
    one = plain.generate(plain.tokenizer.encode(PROMPTS[0]), params[0])
    assert [o.token_ids for o in one] == [outputs[0].token_ids]


@pytest.mark.parametrize("params", [FREE, SamplingParams(max_tokens=20, temperature=1.0, seed=4, stop=("e", "10"))])
def test_a_stream_adds_up_to_what_generate_gives(drafted: LLM, params: SamplingParams) -> None:
    outputs = drafted.generate(PROMPTS, params)
    texts: dict[str, str] = {}
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, str | None] = {}
    for event in drafted.stream(PROMPTS, params):
        assert reasons.get(event.id) is None, "an event after the last"
        texts[event.id] = texts.get(event.id, "") + event.text
        tokens.setdefault(event.id, []).extend(event.token_ids)
        reasons[event.id] = event.finish_reason
    order = sorted(texts, key=lambda name: int(name.rsplit("-", 1)[1]))
    assert [texts[name] for name in order] == [o.text for o in outputs]
    assert [tokens[name] for name in order] == [o.token_ids for o in outputs]
    assert [reasons[name] for name in order] == [o.outputs[0].finish_reason for o in outputs]


def test_closing_a_stream_gives_back_its_blocks(drafted: LLM) -> None:
    events = drafted.stream(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True))
    next(events)
    assert drafted.engine.cache.pool.held > 0
    events.close()
    assert drafted.engine.cache.pool.held == 0
    drafted.engine.check_integrity()


def test_two_open_iterators_are_refused_by_name(plain: LLM) -> None:
    events = plain.stream(PROMPTS, FREE)
    next(events)
    with pytest.raises(RequestError, match="another run or stream of this LLM is still open; finish it or close"):
        plain.generate(PROMPTS[:1], FREE)
    list(events)
    assert len(plain.generate(PROMPTS[:1], FREE)) == 1


def test_n_outputs_differ_and_repeat_with_their_seed(plain: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, n=4, seed=11, ignore_eos=True)
    one, two = (plain.generate(PROMPTS[:1], params)[0] for _ in range(2))
    assert [c.token_ids for c in one.outputs] == [c.token_ids for c in two.outputs]
    assert len({tuple(c.token_ids) for c in one.outputs}) == 4
    assert [c.index for c in one.outputs] == [0, 1, 2, 3]
    alone = plain.generate(PROMPTS[:1], SamplingParams(max_tokens=12, temperature=1.0, seed=11, ignore_eos=True))[0]
    assert alone.token_ids == one.outputs[0].token_ids, "the first output is the one that n = 1 gives"
    greedy = plain.generate(PROMPTS[:1], SamplingParams(max_tokens=5, n=3))[0]
    assert len({tuple(c.token_ids) for c in greedy.outputs}) == 1


def test_stop_strings_and_stop_ids_end_an_output(drafted: LLM) -> None:
    whole = drafted.generate(PROMPTS[:1], SamplingParams(max_tokens=30, ignore_eos=True))[0]
    text = whole.text
    # A stop string over the border of two tokens: its first character must not be shown before the second is known.
    texts = [drafted.tokenizer.decode(whole.token_ids[:i]) for i in range(2, 31)]
    before, after = next(
        (a, b)
        for a, b in itertools.pairwise(texts)
        if b.startswith(a) and "\ufffd" not in a[-1] + b[len(a) : len(a) + 1]
    )
    stop = before[-1] + after[len(before)]
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,))
    output = drafted.generate(PROMPTS[:1], params)[0]
    assert output.text == text[: text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < len(whole.token_ids)
    assert "".join(event.text for event in drafted.stream(PROMPTS[:1], params)) == output.text
    token = whole.token_ids[6]
    output = drafted.generate(PROMPTS[:1], SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(token,)))[0]
    first = whole.token_ids.index(token)
    assert output.token_ids == whole.token_ids[: first + 1]
    assert output.text == drafted.tokenizer.decode(whole.token_ids[:first])


def test_the_end_of_text_token_ends_unless_ignored(plain: LLM) -> None:
    # The token that greedy decoding writes third is declared the end of text.
    whole = plain.generate(PROMPTS[:1], FREE)[0].token_ids
    end = whole[2]
    plain.engine._eos = frozenset({end})
    try:
        ended, ignored = (
            plain.generate(PROMPTS[:1], SamplingParams(max_tokens=14, ignore_eos=go_on))[0] for go_on in (False, True)
        )
    finally:
        plain.engine._eos = frozenset({0})
    assert ended.token_ids == whole[: whole.index(end) + 1]
    assert ended.outputs[0].finish_reason == "stop"
    assert ignored.token_ids == whole


def test_logprobs_stand_beside_their_tokens(drafted: LLM) -> None:
    output = drafted.generate(PROMPTS[:1], SamplingParams(max_tokens=8, logprobs=3, ignore_eos=True))[0]
    entries = output.outputs[0].logprobs
    assert [e.token_id for e in entries] == output.token_ids
    assert all(e.top[0] == (e.token_id, pytest.approx(e.logprob)) for e in entries), "greedy tokens are the likeliest"
    assert drafted.generate(PROMPTS[:1], FREE)[0].outputs[0].logprobs is None


BAD = {
    "empty text": ("", "the prompt is empty"),
    "no tokens": ([], "the prompt is empty"),
    "too long": ([3] * 256, "leaves no room to write in a context of 256"),
    "unknown token": ([3, 4000], "token ids outside"),
    "huge token": ([3, 2**70], "neither text nor a list of token ids"),
    "not whole": ([1.5, 2.0], "neither text nor a list of token ids"),
    "nothing": (None, "neither text nor a list of token ids"),
    "words": (["a", "b"], "neither text nor a list of token ids"),
    "ragged": ([[1], [2, 3]], "neither text nor a list of token ids|unequal parts"),
    "half a character": ("a \ud800 b", "half a surrogate pair"),
}


def test_bad_requests_are_answered_and_disturb_nobody(drafted: LLM) -> None:
    good = [o.token_ids for o in drafted.generate(PROMPTS, FREE)]
    mixed = [
        x for pair in itertools.zip_longest(PROMPTS, (p for p, _ in BAD.values()), fillvalue="class") for x in pair
    ]
    tasks = [Task(f"t{i}", prompt, FREE) for i, prompt in enumerate(mixed)]
    outputs = {o.id: o for o in drafted.run(tasks)}
    assert outputs.keys() == {t.id for t in tasks}
    assert [outputs[f"t{i}"].token_ids for i in range(0, 8, 2)] == good
    for i, (name, (_, message)) in enumerate(BAD.items()):
        output = outputs[f"t{2 * i + 1}"]
        assert output.outputs[0].finish_reason == "error", name
        assert re.search(message, output.error), (name, output.error)
        assert (output.text, output.token_ids) == ("", [])
    drafted.engine.check_integrity()


def test_a_bad_request_in_a_stream_is_an_event(plain: LLM) -> None:
    events = list(plain.stream(["", "ok"], SamplingParams(max_tokens=2, ignore_eos=True)))
    assert [e.finish_reason for e in events if e.id == events[0].id] == ["error"]
    assert events[-1].finish_reason == "length"


def test_ids_must_differ_while_they_run(plain: LLM) -> None:
    outputs = list(plain.run([Task("a", "x", FREE), Task("a", "y", FREE), Task("b", "z", FREE)]))
    assert sorted((o.id, o.error is None) for o in outputs) == [("a", False), ("a", True), ("b", True)]
    assert "'a' is in use" in next(o.error for o in outputs if o.error)


def test_prompts_and_parameters_must_match(plain: LLM) -> None:
    with pytest.raises(RequestError, match="3 prompts but 2 sampling parameters; give one, or one for each"):
        plain.generate(PROMPTS[:3], [FREE, FREE])


def test_tasks_are_read_lazily(target_folder: Path) -> None:
    llm = LLM(str(target_folder), batch_size=2, kv_tokens=1024)
    read = []

    def source() -> object:
        for i in range(50):
            read.append(i)
            yield Task(f"t{i}", "class", SamplingParams(max_tokens=2))

    outputs = llm.run(source())
    next(outputs)
    assert len(read) <= 8
    outputs.close()
    llm.engine.check_integrity()


def test_two_engines_in_one_process(plain: LLM, drafted: LLM) -> None:
    one, two = plain.stream(PROMPTS, FREE), drafted.stream(PROMPTS, FREE)
    texts = ["", ""]
    for events in itertools.zip_longest(one, two):
        for i, event in enumerate(events):
            texts[i] += event.text if event is not None and event.id.endswith("0") else ""
    assert [o.token_ids for o in plain.generate(PROMPTS, FREE)] == [
        o.token_ids for o in drafted.generate(PROMPTS, FREE)
    ]


def test_chat_needs_a_template_and_uses_it(plain: LLM) -> None:
    messages = [{"role": "user", "content": "area"}]
    output = plain.chat(messages, SamplingParams(max_tokens=3))
    assert output.error is None
    assert output.prompt_token_ids == plain.apply_chat_template(messages)
    template = plain.tokenizer.chat_template
    try:
        plain.tokenizer.chat_template = None
        with pytest.raises(RequestError, match="no chat template; give a prompt"):
            plain.apply_chat_template(messages)
        plain.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(RequestError, match="chat template refuses these messages: roles must alternate"):
            plain.apply_chat_template(messages)
    finally:
        plain.tokenizer.chat_template = template


def test_settings_that_contradict_are_refused(target_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"k = 3 and NGramConfig.* were both given"):
        LLM(str(target_folder), NGramConfig(), k=3)
    for config in (None, EngineConfig()):
        with pytest.raises(ConfigError, match=r"no field 'blocksize'\. Did you mean 'block_size'"):
            LLM(str(target_folder), config=config, blocksize=3)
    with pytest.raises(ConfigError, match="Unknown drafter 'ngramm'"):
        LLM(str(target_folder), "ngramm")
    with pytest.raises(ModelError, match="no such folder"):
        LLM("./no/such/model")
    both = LLM(str(target_folder), config=EngineConfig(kv_tokens=64, batch_size=3), batch_size=2)
    assert (both.config.kv_tokens, both.config.batch_size) == (64, 2)


CLEAN = """
import logging, os, random, sys
before = os.getcwd(), dict(os.environ), logging.root.handlers[:], logging.root.level, random.getstate()
import torch
threads = torch.get_num_threads(), torch.get_num_interop_threads(), torch.initial_seed(), torch.is_grad_enabled()
dtype = torch.get_default_dtype()
hook = sys.excepthook
import steeple
assert (os.getcwd(), logging.root.handlers, logging.root.level, random.getstate()) == (before[0], *before[2:])
assert not logging.getLogger("steeple").handlers
changed = {k for k in {*os.environ, *before[1]} if os.environ.get(k) != before[1].get(k)}
assert not {k for k in changed if not k.startswith(("KMP_", "TORCH", "TRITON", "PYTORCH"))}, changed
assert threads == (
    torch.get_num_threads(), torch.get_num_interop_threads(), torch.initial_seed(), torch.is_grad_enabled()
)
assert torch.get_default_dtype() == dtype and sys.excepthook is hook
assert not any(name.startswith("matplotlib") for name in sys.modules), "drawing is not for everybody"
"""


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CLEAN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
