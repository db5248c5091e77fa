"""The offline API: text or token ids in, text and token ids out."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from steeple.config import from_dict
from steeple.draft import drafter_config
from steeple.draft.base import DrafterConfig
from steeple.engine import Committed, Engine, EngineConfig, LoadedModel, build_engine, load_model
from steeple.errors import CapacityError, ConfigError, RequestError
from steeple.ops.rng import derive_seed
from steeple.request import FinishReason, Request, SpeculationStats, TokenLogprob
from steeple.types import SamplingParams

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One output of a request. ``text`` ends before a stop string; ``token_ids`` holds every token written."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request: its ``n`` completions, and what speculation did for them. Times in seconds."""

    id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    stats: SpeculationStats
    seconds: float = 0.0
    first_token_seconds: float | None = None
    preemptions: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def error(self) -> str | None:
        """The first error among the outputs."""
        return next((o.error for o in self.outputs if o.error is not None), None)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt with its own id and sampling parameters."""

    id: str
    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """New text of one output; ``finish_reason`` comes with the last event."""

    id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


@dataclass(slots=True)
class _Family:
    """The requests of one task, and which of them are still running."""

    task: Task
    requests: list[Request]
    texts: dict[str, str]


class LLM:
    """A model with a drafter.

    Args:
        model: folder, hub name, ``demo`` (the embedded model), or a model that is already loaded.
        drafter: ``none``, ``ngram``, ``small_lm[:DIR]``, ``sparse_self``, ``spire[:DIR]``, ``auto-k``, or a
            method's settings, e.g. ``NGramConfig(k=8)``.
        k: nodes per round, instead of the method's default.
        config: engine settings; single fields may be given as keywords instead, e.g. ``dtype="bfloat16"``.

    Raises ``ConfigError``, ``ModelError``, ``CapacityError``. A bad request never raises: its output carries an
    ``error`` and ``finish_reason`` "error", and the others are finished.
    """

    def __init__(
        self,
        model: str | LoadedModel = "demo",
        drafter: str | DrafterConfig | None = None,
        *,
        k: int | None = None,
        config: EngineConfig | None = None,
        **settings: Any,
    ) -> None:
        given = {f.name: getattr(config, f.name) for f in fields(config)} if config is not None else {}
        self.config = from_dict(EngineConfig, {**given, **settings})
        if k is not None and drafter is not None and not isinstance(drafter, str):
            raise ConfigError(f"k = {k} and {drafter!r} were both given; set k there, or name the drafter by a string.")
        method = drafter_config(drafter, k=k) if isinstance(drafter, str) else drafter
        self.model = load_model(model, self.config) if isinstance(model, str) else model
        self.tokenizer = self.model.tokenizer
        self.engine: Engine = build_engine(self.model, self.config, method)
        self._names = itertools.count()
        self._running = False

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete all prompts; outputs in the order of the prompts."""
        tasks = self._tasks(prompts, params)
        finished = {output.id: output for output in self.run(tasks)}
        return [finished[task.id] for task in tasks]

    def chat(self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """Complete one conversation with the model's own chat template."""
        return self.generate([self.apply_chat_template(messages)], params)[0]

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation; ``RequestError`` if the tokenizer has no template or refuses the messages."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("messages were given, but the model's tokenizer has no chat template; give a prompt.")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # A template is a program of the model's author and may raise anything.
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def run(self, tasks: Iterable[Task]) -> Generator[RequestOutput]:
        """Complete tasks, read lazily, and yield each as it finishes. Closing the iterator cancels what is left."""
        source = iter(tasks)
        families: dict[str, _Family] = {}
        owner: dict[str, str] = {}
        ahead = 2 * self.engine.parts.batch_size
        self._begin()
        try:
            while True:
                for task in itertools.islice(source, max(0, ahead - len(owner))):
                    family = self._submit(task, families, stream=False)
                    if isinstance(family, RequestOutput):
                        yield family
                    else:
                        owner.update({r.id: task.id for r in family.requests})
                        # Members may have been refused one by one; then nothing is left to wait for.
                        yield from self._collect(families, owner, [r for r in family.requests if r.finished])
                if not owner:
                    return
                done = [c for c in self.engine.step() if c.request.finished]
                for committed in done:
                    self._keep_text(families[owner[committed.request.id]], committed)
                yield from self._collect(families, owner, [c.request for c in done])
        finally:
            self._running = False
            for request_id in list(owner):
                self.engine.abort(request_id)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[StreamEvent]:
        """Complete all prompts and yield text as it becomes certain. Closing the iterator cancels what is left."""
        families: dict[str, _Family] = {}
        owner: dict[str, tuple[str, int]] = {}
        sent: dict[str, int] = {}
        self._begin()
        try:
            for task in self._tasks(prompts, params):
                family = self._submit(task, families, stream=True)
                if isinstance(family, RequestOutput):
                    yield StreamEvent(task.id, 0, family.error or "", (), FinishReason.ERROR.value)
                else:
                    owner.update({r.id: (task.id, i) for i, r in enumerate(family.requests)})
            while owner:
                for committed in self.engine.step():
                    request = committed.request
                    task_id, index = owner[request.id]
                    if request.finished:
                        del owner[request.id]
                    yield self._event(committed, task_id, index, sent)
        finally:
            self._running = False
            for request_id in list(owner):
                self.engine.abort(request_id)

    def _begin(self) -> None:
        """One iterator at a time drives the engine: two would take each other's tokens."""
        if self._running:
            raise RequestError("another run or stream of this LLM is still open; finish it or close its iterator.")
        self._running = True

    def _event(self, committed: Committed, task_id: str, index: int, sent: dict[str, int]) -> StreamEvent:
        request, text = committed.request, committed.text
        assert text is not None  # every request of ``stream`` was added with a text stream
        whole = self._final_text(request, text.text if text.stopped else None) if request.finished else text.text
        end = len(whole) if request.finished else text.safe_length()
        start = sent.get(request.id, 0)
        sent[request.id] = max(start, end)
        reason = request.finish_reason.value if request.finish_reason is not None else None
        return StreamEvent(task_id, index, whole[start:end], committed.tokens, reason)

    def _tasks(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Task]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Sequence[Any] = [prompts] if single else prompts
        if params is None:
            params = SamplingParams()
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise RequestError(f"{len(many)} prompts but {len(each)} sampling parameters; give one, or one for each.")
        return [Task(f"request-{next(self._names)}", p, q) for p, q in zip(many, each, strict=True)]

    def _submit(self, task: Task, families: dict[str, _Family], *, stream: bool) -> _Family | RequestOutput:
        """Queue the n requests of a task, or answer it with an error."""
        prompt: list[int] = []
        requests: list[Request] = []
        try:
            if task.id in families:
                raise RequestError(f"request id {task.id!r} is in use; give every request an id of its own.")
            prompt = self._encode(task.prompt)
            first = Request(task.id, prompt, task.params)
            for index in range(task.params.n):
                # The base seed is drawn once, so that outputs of one request differ but repeat with its seed.
                params = replace(task.params, seed=derive_seed(first.seed, index), n=1)
                request = Request(task.id if task.params.n == 1 else f"{task.id}#{index}", prompt, params)
                self.engine.add(request, stream=stream)
                requests.append(request)
        except (RequestError, CapacityError) as error:
            for request in requests:
                self.engine.abort(request.id)
            answer = Completion(0, "", [], FinishReason.ERROR.value, error=str(error))
            return RequestOutput(task.id, prompt, [answer], SpeculationStats())
        families[task.id] = _Family(task, requests, {})
        return families[task.id]

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            try:
                return list(self.tokenizer.encode(prompt))
            except TypeError as error:
                raise RequestError("the prompt is no valid text: it holds half a surrogate pair; remove it.") from error
        try:
            tokens = np.asarray(prompt)
        except ValueError as error:
            raise RequestError(f"the prompt is a list of unequal parts ({error}); give text or token ids.") from error
        if tokens.ndim != 1 or (tokens.size and not (np.issubdtype(tokens.dtype, np.integer))):
            raise RequestError(f"the prompt {reprlib.repr(prompt)} is neither text nor a list of token ids; give one.")
        return [int(t) for t in tokens]

    def _keep_text(self, family: _Family, committed: Committed) -> None:
        if committed.text is not None and committed.text.stopped:
            family.texts[committed.request.id] = committed.text.text

    def _collect(
        self, families: dict[str, _Family], owner: dict[str, str], finished: Sequence[Request]
    ) -> Iterator[RequestOutput]:
        for request in finished:
            task_id = owner.pop(request.id)
            family = families.get(task_id)  # gone if a sibling ended in the same step
            if family is not None and all(r.finished for r in family.requests):
                del families[task_id]
                yield self._output(family)

    def _output(self, family: _Family) -> RequestOutput:
        stats = SpeculationStats()
        outputs = []
        for index, request in enumerate(family.requests):
            stats.merge(request.stats)
            reason = request.finish_reason or FinishReason.CANCELLED
            outputs.append(
                Completion(
                    index,
                    self._final_text(request, family.texts.get(request.id)),
                    request.output.tolist(),
                    reason.value,
                    request.logprobs if request.params.logprobs is not None else None,
                    request.error,
                )
            )
        first = family.requests[0]
        times = [r.first_token_at for r in family.requests if r.first_token_at is not None]
        return RequestOutput(
            family.task.id,
            first.tokens[: first.prompt_len].tolist(),
            outputs,
            stats,
            max(r.finished_at or first.arrived for r in family.requests) - first.arrived,
            min(times) - first.arrived if times else None,
            sum(r.preemptions for r in family.requests),
        )

    def _final_text(self, request: Request, stopped: str | None) -> str:
        """The text before a stop string, or all of it without the token that ended it."""
        if stopped is not None:
            return stopped
        output = request.output
        if request.finish_reason is FinishReason.STOP:
            output = output[:-1]
        # Clean-up would take away spaces that a stream has already shown.
        return str(self.tokenizer.decode(output.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
