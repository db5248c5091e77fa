"""Bytes of the tensors that an object holds, found by walking through it: what was allocated, not what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor

LEAVES = (type, ModuleType, str, bytes, int, float, bool, type(None), torch.dtype, torch.device, np.ndarray)


def held_bytes(root: object, known: dict[int, int], skip: Iterable[object] = ()) -> int:
    """Bytes of all tensors that ``root`` reaches through attributes, containers and closures.

    Args:
        known: storages that are counted already (address -> bytes); those found are added, so nothing counts twice.
        skip: objects not to walk into.
    """
    seen = {id(item) for item in skip}
    before = sum(known.values())
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, LEAVES):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            _note(item, known)
        waiting.extend(_parts(item))
    return sum(known.values()) - before


def _note(tensor: Tensor, known: dict[int, int]) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return  # a tensor made of others, which are its attributes
    storage = tensor.untyped_storage()
    if storage.nbytes():
        known[storage.data_ptr()] = max(known.get(storage.data_ptr(), 0), storage.nbytes())


def _parts(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple | set | frozenset):
        # Lists of numbers may be long, and hold nothing.
        if not (isinstance(item, list) and item and isinstance(item[0], int)):
            yield from item
    elif isinstance(item, FunctionType):
        yield from (cell.cell_contents for cell in item.__closure__ or () if cell.cell_contents is not item)
    elif isinstance(item, MethodType):
        yield item.__self__
    else:
        yield from getattr(item, "__dict__", {}).values()
        for kind in type(item).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(item, name, None)
