"""The main job: a file of prompts in, a file of completions out, whatever happens in between."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from steeple.engine.stats import EngineStats
from steeple.errors import RequestError, SteepleError
from steeple.evidence.environment import environment
from steeple.jobs import records
from steeple.jobs.config import GenerateConfig
from steeple.jobs.journal import SCHEMA_VERSION, Journal
from steeple.jobs.lines import Line, read_lines
from steeple.llm import LLM, RequestOutput, Task
from steeple.request import FinishReason

log = logging.getLogger(__name__)


class JobInterrupted(KeyboardInterrupt):
    """Ctrl-C during a job. The message says what is on disk and how to go on."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands. ``stats`` is the engine's own and lives on; ``begun`` is in ``perf_counter`` seconds."""

    total: int
    done: int
    errors: int
    stats: EngineStats
    begun: float


@dataclass(slots=True)
class _Tally:
    """What this run did. ``resumed``: requests that an earlier run had finished."""

    resumed: int = 0
    done: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, record: dict[str, Any]) -> None:
        self.done += 1
        self.errors += record["finish_reason"] == FinishReason.ERROR.value
        self.prompt_tokens += record["usage"]["prompt_tokens"]
        self.completion_tokens += record["usage"]["completion_tokens"]


@dataclass(frozen=True, slots=True)
class _Survey:
    """The file at a glance: number and key of each line, and the numbers of those still to be answered."""

    lines: list[tuple[int, str]]
    pending: frozenset[int]
    repeated: dict[int, int]  # line -> the earlier line with its id


def run_generate(config: GenerateConfig, progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Complete every prompt of ``config.prompts`` and write the records to ``config.output``, in input order.

    A job that was stopped goes on where it was: requests whose record is on disk are not run again, those answered
    with an error are. Bad lines get an error record. ``progress`` is called after each request.

    Returns:
        The summary of this run: tokens_per_second (tokens written per second of generation, loading apart), tau,
        acceptance_by_position, requests, resumed, errors, prompt_tokens, completion_tokens, seconds, load_seconds,
        draft_seconds, verify_seconds, drafter, k, model, dtype, memory (bytes predicted and allocated, what was
        sacrificed to a budget), batch_size, temperature, output, environment.

    Raises:
        ConfigError: the settings are wrong, or differ from those an unfinished output was begun with.
        StorageError: prompts cannot be read or the output cannot be written; what was finished stays on disk.
        ModelError, CapacityError: the model cannot be used.
        JobInterrupted: Ctrl-C.
    """
    with Journal(config.output, config.settings(), overwrite=config.overwrite) as journal:
        survey = _survey(config, journal)
        started = time.perf_counter()
        job = _Job(config, journal, survey, progress) if survey.pending else None
        load_seconds = time.perf_counter() - started
        if job is not None:
            with _advice(journal):
                job.run()
        journal.publish(survey.lines)
    return _summary(config, survey, job, load_seconds)


def _survey(config: GenerateConfig, journal: Journal) -> _Survey:
    lines: list[tuple[int, str]] = []
    first: dict[str, int] = {}
    repeated: dict[int, int] = {}
    pending = set()
    for line in read_lines(config.prompts, config.sampling):
        lines.append((line.number, line.key))
        if first.setdefault(line.key, line.number) != line.number:
            repeated[line.number] = first[line.key]
        if line.number in repeated or not journal.has(line):
            pending.add(line.number)
    return _Survey(lines, frozenset(pending), repeated)


class _Job:
    """The part of a job that needs a model."""

    def __init__(
        self, config: GenerateConfig, journal: Journal, survey: _Survey, progress: Callable[[Progress], None] | None
    ) -> None:
        self.config, self._journal, self._survey, self._progress = config, journal, survey, progress
        self.llm = LLM(config.model, config.drafter, k=config.k, config=config.engine)
        self.tally = _Tally(resumed=len(survey.lines) - len(survey.pending))
        self.seconds = 0.0
        self._running: dict[str, Line] = {}

    @property
    def nodes(self) -> int:
        """Tokens drafted per round, at most; 0 without a drafter."""
        drafter = self.llm.engine.drafter
        return drafter.needs.nodes if drafter is not None else 0

    def run(self) -> None:
        """Answer every pending line."""
        self._journal.begin()
        begun = time.perf_counter()
        self._tell(begun)
        with contextlib.closing(self.llm.run(self._tasks())) as outputs:
            for output in outputs:
                self._keep(output)
                self._tell(begun)
        self.seconds = time.perf_counter() - begun

    def _tasks(self) -> Iterator[Task]:
        for line in read_lines(self.config.prompts, self.config.sampling):
            if line.number not in self._survey.pending:
                continue
            try:
                prompt = self._prompt(line)
            except RequestError as error:
                self._store(line, records.refusal(line, str(error)))
                continue
            # ids are the user's and may look like anything; the engine gets names of the job's own
            task = Task(f"line {line.number}", prompt, line.params)
            self._running[task.id] = line
            yield task

    def _prompt(self, line: Line) -> str | list[int]:
        if line.error is not None:
            raise RequestError(line.error)
        if line.number in self._survey.repeated:
            raise RequestError(
                f"id {line.id!r} was given in line {self._survey.repeated[line.number]} already; give another."
            )
        if line.messages is not None:
            return self.llm.apply_chat_template(line.messages)
        assert line.prompt is not None  # a line has a prompt, messages or an error
        return line.prompt

    def _keep(self, output: RequestOutput) -> None:
        line = self._running.pop(output.id)
        self._store(line, records.answer(line, output))

    def _store(self, line: Line, record: dict[str, Any]) -> None:
        self._journal.append(line, record)
        self.tally.add(record)
        if "error" in record:
            log.warning("%s, line %d: %s", self.config.prompts.name, line.number, record["error"])

    def _tell(self, begun: float) -> None:
        if self._progress is not None:
            tally = self.tally
            done = tally.done + tally.resumed
            self._progress(Progress(len(self._survey.lines), done, tally.errors, self.llm.engine.stats, begun))


@contextlib.contextmanager
def _advice(journal: Journal) -> Iterator[None]:
    """Whatever stops a job, say what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise JobInterrupted(f"Interrupted. {_kept(journal)}") from error
    except SteepleError as error:
        error.add_note(_kept(journal))
        raise


def _kept(journal: Journal) -> str:
    return f"{journal.kept} finished requests are kept in {journal.partial}; run the same command again to go on."


def _summary(config: GenerateConfig, survey: _Survey, job: _Job | None, load_seconds: float) -> dict[str, Any]:
    tally = job.tally if job is not None else _Tally(resumed=len(survey.lines))
    stats = job.llm.engine.stats if job is not None else EngineStats()
    seconds = job.seconds if job is not None else 0.0
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens_per_second": tally.completion_tokens / seconds if seconds else None,
        **records.speculation(stats.speculation),
        "requests": len(survey.lines),
        "resumed": tally.resumed,
        "errors": tally.errors,
        **records.usage(tally.prompt_tokens, tally.completion_tokens),
        "seconds": seconds,
        "load_seconds": load_seconds,
        "prompt_seconds": stats.prompt_seconds,
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "other_seconds": stats.other_seconds,
        "preemptions": stats.preemptions,
        "drafter": config.drafter,
        "k": job.nodes if job is not None else config.k,
        "model": config.model,
        "dtype": config.engine.dtype,
        "memory": job.llm.engine.memory.as_dict() if job is not None and job.llm.engine.memory is not None else None,
        "batch_size": job.llm.engine.parts.batch_size if job is not None else config.engine.batch_size,
        "temperature": config.sampling.temperature,
        "output": str(config.output),
        "environment": environment(job.llm.model) if job is not None else None,
    }
