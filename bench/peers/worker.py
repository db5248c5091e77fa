"""One contestant's process: started, asked, put to sleep and woken by the driver."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker answered with an error, died, or took too long."""


class Worker:
    """An adapter in its own interpreter. It is stopped (``SIGSTOP``) whenever nothing is asked of it.

    Args:
        interpreter, script: what to run. environment: its variables. log: where its standard error goes.
    """

    def __init__(self, interpreter: Path, script: Path, environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(interpreter), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                process_group=0,  # a group of its own: whatever it starts sleeps and dies with it
            )
        self._rest = b""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to ``question``. ``WorkerError`` if it is an error or does not come in time; the latter kills."""
        try:
            self._signal(signal.SIGCONT)
            answer: dict[str, Any] = json.loads(self._exchange(question, seconds))
        except (OSError, ValueError, WorkerError) as error:
            code = self._process.poll()
            self.close()
            died = f"the worker ended with code {code}; " if code is not None else ""
            raise WorkerError(f"{died}{error or type(error).__name__}; see {self._log.name}") from error
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _exchange(self, question: dict[str, Any], seconds: float) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise WorkerError(f"no answer within {seconds:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                self._process.wait(timeout=5)
                raise WorkerError("it closed its output")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself, and all that it had started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what could not be written to the dead
                    pipe.close()
