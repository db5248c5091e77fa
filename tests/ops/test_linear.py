"""The native linear layer equals torch's, and rounds a row alike whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from steeple.ops.kernels import kernels
from steeple.ops.linear import NativeLinear
from steeple.ops.native import library_path

SHAPES = [(512, 3072), (1408, 512), (64, 10), (34, 7), (130, 33), (16, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def native() -> NativeLinear:
    path = library_path()
    if path is None:
        pytest.skip("no compiler: there is no native kernel")
    return NativeLinear(path, most_rows={torch.float32: 1000, torch.bfloat16: 1000})


def operands(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(rows * 7 + inputs)
    x = torch.randn(rows, inputs, generator=made).to(dtype)
    w = torch.randn(outputs, inputs, generator=made).to(dtype)
    return x, w, torch.randn(outputs, generator=made).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13])
def test_equals_torch(native: NativeLinear, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(rows, inputs, outputs, dtype)
    exact = F.linear(x.double(), w.double())
    for given in (None, bias):
        wanted = exact if given is None else exact + given.double()
        error = (native(x, w, given).double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_is_rounded_alike_in_any_batch(
    native: NativeLinear, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x, w, bias = operands(13, inputs, outputs, dtype)
    whole = native(x, w, bias)
    for begin, end in ((0, 1), (3, 8), (12, 13), (1, 13)):
        assert torch.equal(native(x[begin:end], w, bias), whole[begin:end])


@torch.inference_mode()
def test_strided_rows_are_read_in_place(native: NativeLinear) -> None:
    x, w, _ = operands(5, 130, 33, torch.float32)
    wide = torch.cat((x, x + 1), dim=1)
    assert torch.equal(native(wide[:, :130], w), native(x, w))


def test_gradients_flow_through_torch(native: NativeLinear) -> None:
    x, w, _ = operands(3, 64, 10, torch.float32)
    w.requires_grad_(True)
    native(x, w).sum().backward()
    assert w.grad is not None


@torch.inference_mode()
def test_switched_off_means_torch() -> None:
    assert kernels("cpu", native=False).linear is F.linear
