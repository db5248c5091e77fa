"""The native library: built from the sources beside this file at first use, and called through plain C.

The library is compiled for the best instruction set of the processor (``LEVELS``) with the system's compiler ($CXX,
g++, clang++ or c++), does not link against torch and is kept in the user's cache folder under a hash of sources,
command and compiler. Without a compiler the reference serves, and the log says why, once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from steeple.errors import ConfigError

SOURCES = (
    "library.cpp",
    "attention.cpp",
    "attention.h",
    "attention_call.h",
    "attention_kernel.h",
    "attention_tile.h",
    "dense.h",
    "forward.h",
    "rounds.h",
    "gemm.h",
    "norm.h",
    "sampling.h",
    "simd.h",
    "team.h",
)
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
LEVEL = "STEEPLE_LEVEL"  # environment: a name in LEVELS, to run code for a lesser processor
SWITCH = "STEEPLE_NATIVE"  # environment: 0 = never native, 1 = native or an error
COMPILE_SECONDS = 300

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Level:
    """What a processor can do, and how the compiler is told. ``needs``: names of its features in /proc/cpuinfo."""

    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()


_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
LEVELS = {
    "avx512bf16": Level(("-march=x86-64-v4", "-mavx512bf16"), (*_AVX512, "avx512_bf16")),
    "avx512": Level(("-march=x86-64-v4",), _AVX512),
    "avx2": Level(("-march=x86-64-v3",), ("avx2", "fma", "f16c", "bmi2")),
    "x86-64": Level((), ("sse2",)),
    "native": Level(("-march=native",)),  # other architectures: whatever the compiler makes of this machine
}
"""The best that the processor has is chosen when the library is first used."""


def level() -> str:
    """The first of ``LEVELS`` that this processor can run, or the one that STEEPLE_LEVEL names.

    Raises ``ConfigError`` if that is unknown or beyond the processor.
    """
    features = _features()
    able = [name for name, level in LEVELS.items() if set(level.needs) <= features]
    wanted = os.environ.get(LEVEL)
    if not wanted:
        return able[0]
    if wanted not in able:
        raise ConfigError(f"{LEVEL} = {wanted!r} is not possible here; give one of {', '.join(able)}.")
    return wanted


def _features() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


@dataclass(frozen=True, slots=True)
class Build:
    """A compiled library, or the reason why there is none."""

    path: Path | None
    reason: str = ""


def compiler() -> tuple[str, ...]:
    """Command of the C++ compiler: $CXX, else the first of g++, clang++ and c++ in PATH; empty if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = shutil.which(named[0]) if named else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return (found, *named[1:]) if found else ()


def cache_folder() -> Path:
    """Where this user's compiled libraries lie, by the platform's custom."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "steeple"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "steeple"
    return Path.home() / ".cache" / "steeple"


def build(machine: tuple[str, ...]) -> Build:
    """Compile the kernels with the flags ``machine``, unless the cache folder has them already."""
    command = (*compiler(), *FLAGS, *machine)
    if command[0] == FLAGS[0]:
        return Build(None, "there is no C++ compiler; install g++ or set CXX")
    here = Path(__file__).parent
    try:
        # All predefined macros: version of the compiler and every processor feature it will use.
        macros = _run((*command[: -len(FLAGS) - len(machine)], *machine, "-dM", "-E", "-x", "c++", os.devnull))
        parts = [*command, macros, *((here / name).read_text() for name in SOURCES)]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        path = cache_folder() / f"steeple-{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # A folder of its own and a rename: processes that build at the same time do not meet.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                fresh = Path(folder) / path.name
                _run((*command, str(here / SOURCES[0]), "-o", str(fresh)))
                fresh.replace(path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Build(None, str(error))
    return Build(path)


def _run(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def torch_team() -> int | None:
    """Address of ``GOMP_parallel`` of the OpenMP runtime that torch has loaded, so that both use the same threads."""
    return _address("GOMP_parallel")


def team_size() -> int | None:
    """Address of ``omp_get_num_threads``: a team may be smaller than it was asked to be."""
    return _address("omp_get_num_threads")


def _address(name: str) -> int | None:
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    except (AttributeError, TypeError, OSError):
        return None  # another runtime: the library starts threads of its own


@functools.cache
def _load() -> Path | str:
    """The library of this process, loaded once; or the reason why there is none, which is logged here once."""
    made = build(LEVELS[level()].flags)
    if made.path is None:
        made = build(())  # a compiler that does not know this processor
    reason = made.reason
    if made.path is not None:
        try:
            ctypes.CDLL(str(made.path))
            return made.path
        except OSError as error:
            reason = str(error)
    log.warning("No native kernels, the slow reference serves: %s", reason)
    return reason


def library_path(device: str = "cpu", native: bool | None = None) -> Path | None:
    """The compiled library for ``device``; None where it is unwanted or cannot be built.

    Args:
        device: type of the device; native kernels exist for the CPU.
        native: always (``True``), never (``False``) or wherever they can be had (``None``). ``None`` heeds the
            environment variable STEEPLE_NATIVE, 1 or 0.

    Raises ``ConfigError`` if native kernels are demanded and cannot be had.
    """
    if native is None:
        native = {"0": False, "1": True}.get(os.environ.get(SWITCH, ""))
    if native is False:
        return None
    if device != "cpu":
        if native:
            raise ConfigError(f"native = True, but native kernels are for the CPU, not for {device}. Give native=None.")
        return None
    found = _load()
    if isinstance(found, str):
        if native:
            raise ConfigError(f"native = True, but there are no native kernels: {found}. Give native=None.")
        return None
    return found
