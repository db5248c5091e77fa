"""A witness of memory that knows none of the formulas: live bytes of tensors and numpy arrays, and the process' own."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes at once of tensors made by torch, and of numpy arrays, since it was entered."""

    def __enter__(self) -> Any:
        self.peak = 0
        self._foreign: dict[int, StorageWeakRef] = {}
        self._mine: dict[int, tuple[StorageWeakRef, int]] = {}
        tracemalloc.start()
        self._before = tracemalloc.get_traced_memory()[0]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            self._note(tensor, mine=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            self._note(tensor, mine=True)
        # what numpy made lies in tensors too, but tracemalloc has counted it
        self.peak = max(self.peak, self.live + tracemalloc.get_traced_memory()[0] - self._before)
        return out

    def _note(self, tensor: object, *, mine: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._foreign.get(key) or self._mine.get(key, (None, 0))[0]
        if known is not None and not known.expired():
            return
        self._foreign.pop(key, None)
        self._mine.pop(key, None)
        if mine:
            self._mine[key] = (StorageWeakRef(storage), storage.nbytes())
        else:
            self._foreign[key] = StorageWeakRef(storage)

    @property
    def live(self) -> int:
        """Bytes of the tensors made since it was entered that are still there."""
        for key in [key for key, (storage, _) in self._mine.items() if storage.expired()]:
            del self._mine[key]
        return sum(size for _, size in self._mine.values())


def resident_bytes() -> int:
    """Bytes of this process in memory, of its own (files that are only mapped left out)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
