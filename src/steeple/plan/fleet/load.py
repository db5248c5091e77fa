"""The load of a fleet: when requests arrive, and how many tokens they bring and ask for.

A trace is a CSV file in the form of the Azure LLM inference traces (Patel et al. 2024, arXiv 2311.18677): a time, the
tokens of the prompt and the tokens of the output per line, under the names in ``COLUMNS``.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steeple.errors import ConfigError, StorageError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """Requests in the order in which they arrive: seconds ``[N]``, prompt tokens ``[N]``, output tokens ``[N]``."""

    arrival: Floats
    prompt: Ints
    output: Ints

    def __post_init__(self) -> None:
        if not len(self.arrival) == len(self.prompt) == len(self.output):
            raise ConfigError("Load: arrival, prompt and output differ in length; give one of each per request.")
        if not len(self.arrival):
            raise ConfigError("Load: there is no request in it; give at least one.")
        if self.prompt.min() < 1 or self.output.min() < 1:
            raise ConfigError("Load: a request has no prompt or no output token; every request needs one of each.")
        if not np.all(np.isfinite(self.arrival)) or np.any(np.diff(self.arrival) < 0):
            raise ConfigError("Load: arrivals are not finite or not in order; sort the requests by their time.")

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Requests per second between the first and the last arrival; inf where all come at once."""
        span = float(self.arrival[-1] - self.arrival[0])
        return (len(self) - 1) / span if span > 0 else float("inf")

    def at_rate(self, rate: float) -> Load:
        """The same requests in the same order with time stretched so that ``rate`` of them come per second.

        Bursts keep their shape. ``ConfigError`` where all requests come at once.
        """
        own = self.rate
        if not np.isfinite(own) or own <= 0:
            raise ConfigError("Load: all requests arrive at one moment, so they have no rate; give more of the trace.")
        return Load((self.arrival - self.arrival[0]) * (own / rate), self.prompt, self.output)

    def first(self, count: int) -> Load:
        """``count`` requests; the load is repeated, one mean gap after its end, where it has fewer."""
        times = -(-count // len(self))
        period = (self.arrival[-1] - self.arrival[0]) * len(self) / max(1, len(self) - 1)
        shift = np.repeat(np.arange(times) * period, len(self))[:count]
        arrival = np.tile(self.arrival, times)[:count] + shift
        return Load(arrival, np.tile(self.prompt, times)[:count], np.tile(self.output, times)[:count])


def poisson(rate: float, count: int, rng: np.random.Generator) -> Floats:
    """``count`` arrival times in seconds with independent exponential gaps of mean ``1 / rate``."""
    return np.cumsum(rng.exponential(1.0 / rate, count))


def fixed(value: float, count: int) -> Ints:
    """``count`` times the same length, at least 1."""
    return np.full(count, max(1, round(value)), dtype=np.int64)


def lognormal(mean: float, sigma: float, count: int, rng: np.random.Generator) -> Ints:
    """Lengths of a lognormal law of this mean; ``sigma`` is the deviation of the logarithm. At least 1 token each."""
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(1, np.rint(drawn)).astype(np.int64)


def drawn_from(lengths: Load, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Prompt and output lengths of ``count`` requests of the trace, drawn with replacement, pairs kept together."""
    picked = rng.integers(0, len(lengths), count)
    return lengths.prompt[picked], lengths.output[picked]


def read_trace(path: Path) -> Load:
    """The requests of a CSV trace; arrivals count from the first. Requests without output are left out.

    Raises:
        StorageError: the file cannot be read, or a line is not what its header says.
        ConfigError: a column is missing.
    """
    arrival: list[float] = []
    prompt: list[int] = []
    output: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path}: there is no column {', '.join(missing)}; a trace has {', '.join(COLUMNS)}.")
            for row in rows:
                arrival.append(_seconds(row[COLUMNS[0]]))
                prompt.append(int(row[COLUMNS[1]]))
                output.append(int(row[COLUMNS[2]]))
    except OSError as error:
        raise StorageError(f"The trace {path} cannot be read ({error.strerror}); give a CSV file.") from error
    except (ValueError, TypeError) as error:
        raise StorageError(f"{path}, line {len(output) + 2}: {error}; give a time and two whole numbers.") from error
    counts = np.array([prompt, output], dtype=np.int64).reshape(2, -1)
    keep = np.all(counts >= 1, axis=0)
    if not keep.any():
        raise StorageError(f"{path} holds no request with a prompt and an output; give another trace.")
    times = np.array(arrival)[: counts.shape[1]][keep]
    order = np.argsort(times, kind="stable")
    return Load(times[order] - times[order][0], counts[0][keep][order], counts[1][keep][order])


def _seconds(text: str) -> float:
    """A time stamp, or plain seconds, as seconds."""
    try:
        return float(text)
    except ValueError:
        # the traces give seven decimals of a second, one more than fromisoformat of Python 3.11 is sure to take
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")
