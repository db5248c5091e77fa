"""Streams of requests whose texts differ in how easily they are guessed: named workloads of real prompts, by seed.

A *kind* is what the requests of a stream are told apart by: a category of Spec-Bench, or how a text continues. A
*stream* is a list of prompts in the order of arrival, and the kind of each. Its prompts are a pure function of the
source's text, the tokenizer and ``StreamConfig``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steeple.config import check_range
from steeple.errors import ConfigError, did_you_mean
from steeple.evidence.lengths import draw_lengths
from steeple.evidence.prompts import PromptCutter, Source, read_source
from steeple.evidence.texts import functions, parsed, prose, questions, renamed
from steeple.request import Request
from steeple.types import SamplingParams

SHORTEST = 16  # tokens of a prompt
RUN = 4  # tokens that count as a repetition
OPEN_ENDED = 96  # requests of a stream whose source has more than anybody wants
BEGUN = 0.25  # of the second function of a pair stands in the prompt
REPEATS, CODE, PROSE = "code that repeats", "code that does not", "prose"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How many requests a stream has, and how long they are."""

    count: int = field(default=0, metadata={"help": "requests; 0: all of a file of prompts, or 96"})
    max_tokens: int = field(default=64, metadata={"help": "tokens that each request writes"})
    longest: int = field(default=512, metadata={"help": "most tokens of a prompt"})
    seed: int = field(default=0, metadata={"help": "decides which texts, and their order"})
    data: str = field(default="", metadata={"help": "folder of the outside data, where the stream reads any"})
    chat: bool = field(default=False, metadata={"help": "put questions into the tokenizer's chat template"})

    def __post_init__(self) -> None:
        check_range("StreamConfig", "count", self.count, 0, 1 << 20)
        check_range("StreamConfig", "max_tokens", self.max_tokens, 1, 1 << 20)
        check_range("StreamConfig", "longest", self.longest, SHORTEST, 1 << 24)
        check_range("StreamConfig", "seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Requests in their order.

    Args:
        name: of the stream. source: where its text is from. kinds: names. prompts: token ids.
        kind_of_each: number of the kind of each prompt. max_tokens: that each request writes.
        sha256: of the source's text. shortened: prompts that lost their beginning because they were too long.
        seed: that the requests' own seeds come from.
    """

    name: str
    source: str
    kinds: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    kind_of_each: tuple[int, ...]
    max_tokens: int
    sha256: str
    shortened: int = 0
    seed: int = 0

    @property
    def prompts_sha256(self) -> str:
        """Of all token ids: equal for equal prompts in equal order."""
        whole = hashlib.sha256()
        for prompt in self.prompts:
            whole.update(np.array([len(prompt), *prompt], dtype="<i8").tobytes())
        return whole.hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and what is written behind it."""
        return max(map(len, self.prompts)) + self.max_tokens

    def places(self, kind: str) -> list[int]:
        """Places of the prompts of a kind. ``ConfigError`` for an unknown one."""
        if kind not in self.kinds:
            raise ConfigError(f"stream {self.name} has no kind {kind!r}. {did_you_mean(kind, self.kinds)}")
        number = self.kinds.index(kind)
        return [place for place, own in enumerate(self.kind_of_each) if own == number]

    def requests(self, temperature: float = 0.0) -> list[Request]:
        """Fresh requests, always the same: all write ``max_tokens`` whatever they write."""
        draws = np.random.default_rng((self.seed, len(self.prompts))).integers(2**62, size=len(self.prompts))
        return [
            Request(
                f"{self.name}-{place}",
                prompt,
                SamplingParams(
                    temperature=temperature, max_tokens=self.max_tokens, ignore_eos=True, seed=int(draws[place])
                ),
            )
            for place, prompt in enumerate(self.prompts)
        ]

    def as_dict(self) -> dict[str, Any]:
        """What a result's JSON says of it: everything but the prompts themselves."""
        lengths = list(map(len, self.prompts))
        counts = np.bincount(np.array(self.kind_of_each), minlength=len(self.kinds)).tolist()
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "prompts_sha256": self.prompts_sha256,
            "requests": len(self.prompts),
            "kinds": dict(zip(self.kinds, counts, strict=True)),
            "prompt_tokens": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
            "max_tokens": self.max_tokens,
            "shortened": self.shortened,
        }


def spec_bench(config: StreamConfig, tokenizer: Any) -> Stream:
    """The first turns of Spec-Bench's questions, 13 categories, as many of each as the file's shares give.

    ``config.data`` is the folder of ``question.jsonl``. A prompt above ``longest`` keeps its end, where the
    question is.

    Raises:
        StorageError: the file is not there.
    """
    source, found = questions(config.data)
    kinds = tuple(dict.fromkeys(question.category for question in found))
    order = np.random.default_rng((config.seed, len(found))).permutation(len(found))
    chosen = [found[place] for place in order[: config.count or len(found)].tolist()]
    whole = [_encode(tokenizer, question.turns[0], config.chat) for question in chosen]
    return Stream(
        name="spec_bench",
        source=source.name,
        kinds=kinds,
        prompts=tuple(tuple(tokens[-config.longest :]) for tokens in whole),
        kind_of_each=tuple(kinds.index(question.category) for question in chosen),
        max_tokens=config.max_tokens,
        sha256=source.digest,
        shortened=sum(len(tokens) > config.longest for tokens in whole),
        seed=config.seed,
    )


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer.encode(text, verbose=False))
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("StreamConfig.chat = True, but the model's tokenizer has no chat template; leave chat off.")
    message = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(written, add_special_tokens=False, verbose=False))


def mixed_difficulty(config: StreamConfig, tokenizer: Any) -> Stream:
    """A third of the requests each: code that repeats its prompt, code that does not, and prose; in random order.

    The first quotes a function and begins the same one with other names; the second is cut out of held-out files, twice
    as many windows as are wanted, of which those stay that repeat themselves least (tables do); the third is prose, out
    of ``config.data`` (a folder of texts) or what the Python distribution has of it.

    Raises:
        ConfigError: the text does not suffice for so many requests of this length.
    """
    count = config.count or OPEN_ENDED
    if count < 3:
        raise ConfigError(f"StreamConfig.count = {count}, but mixed_difficulty has three kinds; give 3 or more, or 0.")
    shares = [len(range(kind, count, 3)) for kind in range(3)]
    code = read_source()
    files = parsed(code.texts)
    text, own = prose(files, config.data), functions(files)
    parts = [
        _begun(own, config, tokenizer, shares[0]),
        _least_repeating(PromptCutter(code, tokenizer, config.seed).cut(config.longest, 2 * shares[1]), shares[1]),
        PromptCutter(text, tokenizer, config.seed).cut(config.longest, shares[2]),
    ]
    sources = Source(f"{code.name}; {text.name}", (code.digest, text.digest))
    return _interleaved("mixed_difficulty", (REPEATS, CODE, PROSE), parts, sources, config)


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of ``RUN`` tokens that stood in the text before."""
    runs = [tuple(tokens[place : place + RUN]) for place in range(len(tokens) - RUN + 1)]
    return 1.0 - len(set(runs)) / len(runs)


def _least_repeating(prompts: list[list[int]], count: int) -> list[list[int]]:
    best = sorted(range(len(prompts)), key=lambda place: repetition(prompts[place]))[:count]
    return [prompts[place] for place in sorted(best)]


def _begun(texts: Sequence[str], config: StreamConfig, tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts of a function and the beginning of the same one with other names; what follows is long enough to copy."""
    start: list[int] = list(tokenizer.encode(""))
    found: list[list[int]] = []
    for place in np.random.default_rng((config.seed, len(texts))).permutation(len(texts)).tolist():
        if len(found) == count:
            break
        text = texts[place]
        first = tokenizer.encode(f"{text}\n\n", add_special_tokens=False, verbose=False)
        again = renamed(text) if config.max_tokens < len(first) < config.longest else None
        if again is None:
            continue
        second = tokenizer.encode(again, add_special_tokens=False, verbose=False)
        begun = int(len(second) * BEGUN)
        length = len(start) + len(first) + begun
        if SHORTEST <= length <= config.longest and len(second) - begun >= config.max_tokens:
            found.append([*start, *first, *second[:begun]])
    if len(found) < count:
        raise ConfigError(
            f"stream mixed_difficulty: {count} functions to repeat are needed, whose prompt has at most "
            f"{config.longest} tokens and whose rest has {config.max_tokens}; there are {len(found)}. Raise longest, "
            "or lower count or max_tokens."
        )
    return found


def _interleaved(
    name: str, kinds: tuple[str, ...], parts: Sequence[Sequence[Sequence[int]]], source: Source, config: StreamConfig
) -> Stream:
    flat = [(tuple(prompt), kind) for kind, prompts in enumerate(parts) for prompt in prompts]
    order = np.random.default_rng((config.seed, len(flat), 1)).permutation(len(flat)).tolist()
    return Stream(
        name=name,
        source=source.name,
        kinds=kinds,
        prompts=tuple(flat[place][0] for place in order),
        kind_of_each=tuple(flat[place][1] for place in order),
        max_tokens=config.max_tokens,
        sha256=source.digest,
        seed=config.seed,
    )


def azure_lengths(trace: str, config: StreamConfig, tokenizer: Any) -> Stream:
    """Held-out code in prompts as long as those of a published trace, scaled to ``longest``; see ``draw_lengths``."""
    count = config.count or OPEN_ENDED
    source = read_source(config.data)
    lengths = draw_lengths(trace, count, config.longest, SHORTEST, config.seed)
    texts = PromptCutter(source, tokenizer, config.seed).cut(config.longest, count)
    prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    return Stream(
        name=f"azure_{trace}",
        source=f"{source.name}; lengths of the Azure trace {trace}",
        kinds=(trace,),
        prompts=tuple(map(tuple, prompts)),
        kind_of_each=(0,) * count,
        max_tokens=config.max_tokens,
        sha256=source.digest,
        seed=config.seed,
    )


def _azure_code(config: StreamConfig, tokenizer: Any) -> Stream:
    return azure_lengths("code", config, tokenizer)


def _azure_conversation(config: StreamConfig, tokenizer: Any) -> Stream:
    return azure_lengths("conversation", config, tokenizer)


Loader = Callable[[StreamConfig, Any], Stream]

STREAMS: Mapping[str, Loader] = {
    "spec_bench": spec_bench,
    "mixed_difficulty": mixed_difficulty,
    "azure_code": _azure_code,
    "azure_conversation": _azure_conversation,
}


def load_stream(name: str, config: StreamConfig, tokenizer: Any) -> Stream:
    """The stream called ``name``. ``ConfigError`` for an unknown name."""
    loader = STREAMS.get(name)
    if loader is None:
        raise ConfigError(f"there is no stream {name!r}. {did_you_mean(name, STREAMS)}")
    return loader(config, tokenizer)
