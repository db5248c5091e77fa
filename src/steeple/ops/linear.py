"""Packed linear layers: weights laid out once in the order in which the native kernel reads them.

``torch.nn.functional.linear`` over the unpacked weight is the slow twin. The kernel reads a weight once for all rows,
comes near the processor's arithmetic peak where there are many, and sums every output in the order of the input,
whatever the number of rows: a pass over k + 1 tokens gives bit for bit what k + 1 passes give.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steeple.errors import ConfigError
from steeple.ops.memory import zeros
from steeple.ops.native import team_size, torch_team

WORD = 4  # bytes


class Matrix(ctypes.Structure):
    """``forward::Matrix`` of the native library."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "bias", "scales")),
        *((name, ctypes.c_int64) for name in ("outputs", "words", "panels", "sections")),
    ]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight of int8 ``values [outputs, inputs]`` times float32 ``scales [outputs]``, and the tensor it came as."""

    weight: Tensor
    values: Tensor
    scales: Tensor


def quantised(weight: Tensor) -> Quantised | None:
    """What torchao's tensor of int8 with a scale per output is made of; None for a plain tensor."""
    values, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if not isinstance(values, Tensor) or not isinstance(scale, Tensor):
        return None
    if values.dtype != torch.int8 or scale.numel() != weight.shape[0]:
        raise ConfigError(
            f"a weight quantised to {values.dtype} with {scale.numel()} scales for {weight.shape[0]} outputs is not "
            "supported; quantise to int8 with one scale per output."
        )
    return Quantised(weight, values, scale.reshape(-1).float().contiguous())


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight ``[outputs, inputs]`` as panels of ``panel`` outputs, word after word of the input.

    data: ``[sections * panels, words, panel, elements of a word]``; each of ``sections`` equal parts of the outputs
    begins with a panel of its own, and the last panel of a part is filled up with zeros. dtype: of inputs and outputs.
    source: where the data are int8, the quantised weight, whose scale they are to be multiplied with.
    """

    data: Tensor
    dtype: torch.dtype
    outputs: int
    sections: int
    library: LinearLibrary
    source: Quantised | None = None

    @property
    def inputs(self) -> int:
        return self.data.shape[1] * self.data.shape[3]

    def unpack(self) -> Tensor:
        """The weight ``[outputs, inputs]``."""
        if self.source is not None:
            return self.source.weight
        rows = self.data.transpose(1, 2).reshape(self.sections, -1, self.inputs)
        return rows[:, : self.outputs // self.sections].reshape(self.outputs, -1).contiguous()

    def matrix(self, bias: Tensor | None = None) -> Matrix:
        """What the native library is given; ``self`` and ``bias`` must outlive it."""
        panels, words = self.data.shape[:2]
        scales = None if self.source is None else self.source.scales
        pointers = (None if x is None else x.data_ptr() for x in (bias, scales))
        return Matrix(self.data.data_ptr(), *pointers, self.outputs, words, panels, self.sections)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x ``[..., inputs]`` -> ``[..., outputs]`` in the dtype of the weight."""
        return self.library.multiply(self, x, bias)


class LinearLibrary:
    """Packs weights and multiplies by them. Args: path: a library from ``steeple.ops.native``."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.steeple_panel.restype = ctypes.c_int64
        self.panel: int = library.steeple_panel()
        self._linear = library.steeple_linear
        pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._linear.argtypes = [pointer, flag, pointer, size, size, pointer, size, flag, size, pointer, pointer]
        self._linear.restype = None
        self._team = (torch_team(), team_size())

    def pack(self, weight: Tensor, sections: int = 1) -> PackedWeight | None:
        """``weight [outputs, inputs]``, packed; None for what the kernel does not have (other dtypes, odd inputs)."""
        outputs, inputs = weight.shape
        elements = {torch.float32: 1, torch.bfloat16: 2}.get(weight.dtype, 0)
        if not elements or inputs % elements or weight.device.type != "cpu":
            return None
        source = quantised(weight)
        values = weight.detach() if source is None else source.values
        words, part = inputs // elements, outputs // sections
        panels = -(-part // self.panel)
        data = zeros((sections * panels, words, self.panel, elements), values.dtype, values.device)
        for section in range(sections):
            rows = values[section * part : (section + 1) * part].view(part, words, elements)
            whole, rest = divmod(part, self.panel)
            to = data[section * panels : (section + 1) * panels]
            to[:whole] = rows[: whole * self.panel].view(whole, self.panel, words, elements).transpose(1, 2)
            if rest:
                to[whole, :, :rest] = rows[whole * self.panel :].transpose(0, 1)
        return PackedWeight(data, weight.dtype, outputs, sections, self, source)

    def multiply(self, weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ``PackedWeight.__call__``."""
        dtype = weight.dtype
        rows = x.to(dtype).reshape(-1, weight.inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = rows.new_empty((rows.shape[0], weight.outputs))
        self._linear(
            ctypes.byref(weight.matrix(bias)),
            dtype == torch.bfloat16,
            rows.data_ptr(),
            rows.shape[0],
            rows.stride(0) * dtype.itemsize,
            out.data_ptr(),
            weight.outputs * dtype.itemsize,
            False,
            torch.get_num_threads(),
            *self._team,
        )
        return out.view(*x.shape[:-1], weight.outputs)
