"""The native norm equals torch's, row by row."""

from __future__ import annotations

import pytest
import torch

from steeple.ops.native import library_path
from steeple.ops.norm import NativeNorm, torch_norm


@pytest.fixture(scope="module")
def native() -> NativeNorm:
    path = library_path()
    if path is None:
        pytest.skip("no compiler: there is no native kernel")
    return NativeNorm(path)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1, 15, 16, 64, 130, 512])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_equals_torch(native: NativeNorm, rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    made = torch.Generator().manual_seed(rows + size)
    x = (torch.randn(rows, size, generator=made) * 3).to(dtype)
    weight = torch.randn(size, generator=made).to(dtype)
    exact = torch_norm(x.double(), weight.double(), 1e-5)
    assert (native(x, weight, 1e-5).double() - exact).abs().max() <= tolerance * exact.abs().max()


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours(native: NativeNorm) -> None:
    x, weight = torch.randn(9, 130), torch.randn(130)
    assert torch.equal(native(x, weight, 1e-5)[4:6], native(x[4:6], weight, 1e-5))


@torch.inference_mode()
def test_what_it_has_not_goes_to_torch(native: NativeNorm) -> None:
    x, weight = torch.randn(3, 4, 16), torch.randn(16)
    assert torch.equal(native(x, weight, 1e-5), torch_norm(x, weight, 1e-5))
    assert torch.equal(native(x[:, 0], weight, 1e-5), torch_norm(x[:, 0], weight, 1e-5))
