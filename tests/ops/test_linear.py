"""The packed linear layer equals torch's, and rounds a row alike whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steeple.model.layers import Linear
from steeple.ops.kernels import kernels, leave
from steeple.ops.linear import LinearLibrary, PackedWeight
from steeple.ops.native import library_path

SHAPES = [(512, 320), (1408, 64), (64, 10), (34, 70), (130, 33), (16, 1), (600, 130)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROWS = [1, 2, 5, 6, 7, 13, 25, 100, 200]


@pytest.fixture(scope="module")
def library() -> LinearLibrary:
    path = library_path()
    if path is None:
        pytest.skip("no compiler: there is no native kernel")
    return LinearLibrary(path)


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(rows * 7 + inputs)
    x = torch.randn(rows, inputs, generator=made).to(dtype)
    w = torch.randn(outputs, inputs, generator=made).to(dtype)
    return x, w, torch.randn(outputs, generator=made).to(dtype)


def packed(library: LinearLibrary, weight: Tensor, sections: int = 1) -> PackedWeight:
    found = library.pack(weight, sections)
    assert found is not None
    return found


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_torch(library: LinearLibrary, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(rows, inputs, outputs, dtype)
    exact = F.linear(x.double(), w.double())
    for given in (None, bias):
        wanted = exact if given is None else exact + given.double()
        error = (packed(library, w)(x, given).double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_is_rounded_alike_in_any_batch(
    library: LinearLibrary, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x, w, bias = operands(200, inputs, outputs, dtype)
    weight = packed(library, w)
    whole = weight(x, bias)
    for begin, end in ((0, 1), (3, 8), (12, 13), (1, 13), (60, 100), (0, 199)):
        assert torch.equal(weight(x[begin:end], bias), whole[begin:end])


@pytest.mark.parametrize("sections", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 10), (34, 140), (16, 2), (18, 256)])
def test_packing_loses_nothing(
    library: LinearLibrary, inputs: int, outputs: int, dtype: torch.dtype, sections: int
) -> None:
    x, w, _ = operands(3, inputs, outputs, dtype)
    weight = packed(library, w, sections)
    assert torch.equal(weight.unpack(), w)
    assert (weight.outputs, weight.inputs, weight.dtype) == (outputs, inputs, dtype)
    assert torch.equal(weight(x), packed(library, w)(x))


@torch.inference_mode()
def test_strided_rows_are_read_in_place_and_leading_dimensions_kept(library: LinearLibrary) -> None:
    x, w, _ = operands(6, 130, 33, torch.float32)
    weight, wide = packed(library, w), torch.cat((x, x + 1), dim=1)
    assert torch.equal(weight(wide[:, :130]), weight(x))
    assert torch.equal(weight(x.view(2, 3, 130)), weight(x).view(2, 3, 33))


def test_what_the_kernel_does_not_have_stays_with_torch(library: LinearLibrary) -> None:
    assert library.pack(torch.zeros(4, 7, dtype=torch.bfloat16), 1) is None
    assert library.pack(torch.zeros(4, 8, dtype=torch.float16), 1) is None
    assert library.pack(torch.zeros(4, 8, dtype=torch.float64), 1) is None


@torch.inference_mode()
def test_a_layer_packs_and_unpacks_its_weight(library: LinearLibrary) -> None:
    layer = Linear(34, 20, bias=True, sections=2)
    x, before = torch.randn(3, 34), layer.weight.clone()
    wanted = layer(x)
    layer.use(library.pack)
    assert layer.weight is None
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    layer.use(library.pack)  # again: from the packed one
    layer.use(leave)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), wanted)


def test_switched_off_means_torch() -> None:
    assert kernels("cpu", native=False).pack is leave
    assert kernels("cpu", native=False).library is None
