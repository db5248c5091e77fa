"""The native twin of the paged attention: builds ``attention.cpp`` at first use and calls it through plain C.

The library is compiled for the machine it runs on with the system's compiler ($CXX, g++, clang++ or c++), does not link
against torch and is kept in the user's cache folder under a hash of sources, command, compiler and processor features.
Without a compiler the reference serves, and the log says why, once.
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

import torch
from torch import Tensor

from steeple.errors import ConfigError
from steeple.ops.attention import (
    PagedAttention,
    ReferenceAttention,
    check_attention,
    check_layout,
    check_write,
    paged_attention,
    require,
    write_kv,
)
from steeple.types import KVLayout

SOURCES = ("attention.cpp", "attention_kernel.h", "attention_call.h", "linear.h", "simd.h")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
THIS_MACHINE = ("-march=native",)
SWITCH = "STEEPLE_NATIVE"  # environment: 0 = never native, 1 = native or an error
COMPILE_SECONDS = 300
OUTCOMES = {
    1: "a slot or a block of the layout lies outside the cache",
    2: "there is no memory for the sums",
    3: "cu_rows or cu_blocks is wrong",
}

log = logging.getLogger(__name__)


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


def build(machine: tuple[str, ...] = THIS_MACHINE) -> Build:
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
        path = cache_folder() / f"attention-{key}.so"
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


class NativeAttention:
    """The native ``PagedAttention``. Holds the loaded library.

    Args:
        path: a library from ``build``.

    Raises ``OSError`` if it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._attend = library.steeple_attention
        self._attend.argtypes = [pointer] * 11 + [size] * 10 + [real] * 2 + [ctypes.c_int] * 2 + [size, pointer]
        self._write = library.steeple_write
        self._write.argtypes = [pointer] * 5 + [size] * 7
        self._team = torch_team()
        self._last: tuple[KVLayout | None, tuple[int, ...]] = (None, ())  # all layers of a step share a layout

    def __call__(
        self,
        q_TNH: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: KVLayout,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """See ``PagedAttention``. An odd head dim, which the kernel does not have, goes to the reference."""
        check_attention(q_TNH, keys, values, layout)
        T, N, H = q_TNH.shape
        if H % 2:
            return paged_attention(q_TNH, keys, values, layout, scale=scale, window=window, softcap=softcap)
        known, pointers = self._last
        if known is not layout:
            pointers = _pointers(layout)
            self._last = (layout, pointers)
        out_TNH = q_TNH.new_empty((T, N, H))
        outcome = self._attend(
            q_TNH.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out_TNH.data_ptr(),
            *pointers,
            T,
            q_TNH.stride(0),
            keys.shape[0],
            layout.block_size,
            N,
            keys.shape[1],
            H,
            window,
            scale,
            softcap,
            q_TNH.dtype == torch.bfloat16,
            keys.dtype == torch.bfloat16,
            torch.get_num_threads(),
            self._team,
        )
        require(outcome == 0, OUTCOMES.get(outcome, ""))
        return out_TNH

    def write_kv(self, keys: Tensor, values: Tensor, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """See ``PagedAttention.write_kv``."""
        check_write(keys, values, slots, k_TKH, v_TKH)
        if k_TKH.dtype != keys.dtype or v_TKH.dtype != keys.dtype:
            write_kv(keys, values, slots, k_TKH, v_TKH)
            return
        P, K, S, H = keys.shape
        size = keys.element_size()
        outcome = self._write(
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            k_TKH.data_ptr(),
            v_TKH.data_ptr(),
            k_TKH.stride(0) * size,
            v_TKH.stride(0) * size,
            slots.shape[0],
            P,
            K,
            S,
            H * size,
        )
        require(outcome == 0, OUTCOMES.get(outcome, ""))


def _pointers(layout: KVLayout) -> tuple[int, ...]:
    check_layout(layout)
    fields = (layout.cu_rows, layout.blocks, layout.cu_blocks, layout.prefix, layout.ancestors, layout.text_len)
    addresses = (x.data_ptr() for x in (*fields, layout.positions))
    return (*addresses, layout.text_len.shape[0], layout.blocks.shape[0])


def torch_team() -> int | None:
    """Address of ``GOMP_parallel`` of the OpenMP runtime that torch has loaded, so that both use the same threads."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, TypeError, OSError):
        return None  # another runtime: the library starts threads of its own


@functools.cache
def _load() -> NativeAttention | str:
    """The native attention of this process, or the reason why there is none, which is logged here once."""
    made = build()
    if made.path is None:
        made = build(machine=())  # a compiler that does not know its own machine
    reason = made.reason
    if made.path is not None:
        try:
            return NativeAttention(made.path)
        except OSError as error:
            reason = str(error)
    log.warning("No native attention, the slow reference serves: %s", reason)
    return reason


def library_path(native: bool | None = None) -> Path | None:
    """The compiled library for the CPU; None where it is unwanted or cannot be built. See ``attention_backend``."""
    found = attention_backend("cpu", native)
    return found.path if isinstance(found, NativeAttention) else None


def attention_backend(device: torch.device | str, native: bool | None = None) -> PagedAttention:
    """The attention for ``device``.

    Args:
        device: native attention exists for the CPU; the reference serves anywhere.
        native: always (``True``), never (``False``) or wherever it can be had (``None``). ``None`` heeds the
            environment variable STEEPLE_NATIVE, 1 or 0.

    Raises ``ConfigError`` if native attention is demanded and cannot be had.
    """
    if native is None:
        native = {"0": False, "1": True}.get(os.environ.get(SWITCH, ""))
    if native is False:
        return ReferenceAttention()
    if torch.device(device).type != "cpu":
        if native:
            raise ConfigError(
                f"native = True, but native attention is for the CPU, not for {device}. Give native=None."
            )
        return ReferenceAttention()
    found = _load()
    if isinstance(found, str):
        if native:
            raise ConfigError(f"native = True, but there is no native attention: {found}. Give native=None.")
        return ReferenceAttention()
    return found
