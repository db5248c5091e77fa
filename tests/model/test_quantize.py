"""Weight-only int8: torchao quantises, the native kernel multiplies as torchao's own operation does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_families import loaded, published
from test_whole import Side

from steeple.errors import ConfigError
from steeple.model.layers import Linear
from steeple.model.quantize import quantize_weights
from steeple.model.whole import NativeForward
from steeple.ops.linear import quantised
from steeple.ops.native import library_path

pytest.importorskip("torchao", reason="torchao is not installed")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.skipif(library_path() is None, reason="no compiler: there is no native library")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "llama-mha-tied"])
def test_the_native_forward_equals_torchaos(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = published(case)
    decoders = [loaded(model, tmp_path, dtype=dtype) for _ in range(3)]
    for decoder in decoders[:2]:
        quantize_weights(decoder)
    native, twin = Side(decoders[0], native=True), Side(decoders[1], native=False)
    unquantised = Side(decoders[2], native=False)
    assert isinstance(native.runner.whole, NativeForward)
    found, wanted, before = (side.forward(side.batch()).final_TD.float() for side in (native, twin, unquantised))
    error, change = (found - wanted).norm() / wanted.norm(), (before - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)
    assert change > 1e-3  # another target
    logits = native.runner.logits(found.to(dtype))
    assert torch.equal(native.runner.best(found.to(dtype)), logits.argmax(-1))
    scale = logits.abs().max()
    assert (logits - twin.runner.logits(found.to(dtype))).abs().max() < 0.01 * scale


@pytest.mark.skipif(library_path() is None, reason="no compiler: there is no native library")
def test_a_weight_takes_a_byte_and_comes_back_as_it_was(tmp_path: Path) -> None:
    decoder = loaded(published("llama"), tmp_path, dtype=torch.bfloat16)
    quantize_weights(decoder)
    layer = decoder.layers[0].mlp.down
    assert isinstance(layer, Linear)
    source = quantised(layer.weight)
    assert source is not None
    side = Side(decoder, native=True)
    assert layer.packed is not None
    assert layer.packed.data.dtype == torch.int8
    assert side.runner.whole is not None
    assert layer.packed.unpack() is source.weight or torch.equal(layer.packed.unpack().qdata, source.values)


@pytest.mark.parametrize("rows", [1, 5, 13, 60])
def test_a_row_is_rounded_alike_in_any_batch(rows: int, tmp_path: Path) -> None:
    decoder = loaded(published("llama"), tmp_path, dtype=torch.bfloat16)
    quantize_weights(decoder)
    Side(decoder, native=True)
    layer = decoder.layers[1].mlp.gate_up
    assert isinstance(layer, Linear)
    x = torch.randn(60, layer.in_features).to(torch.bfloat16)
    assert torch.equal(layer(x[:rows]), layer(x)[:rows])


def test_without_torchao_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    decoder = loaded(published("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"weights = 'int8' needs torchao .* pip install torchao"):
        quantize_weights(decoder)


def test_another_quantisation_is_refused_by_name() -> None:
    class Odd(torch.Tensor):
        qdata = torch.zeros(4, 8, dtype=torch.uint8)
        scale = torch.ones(4)

    with pytest.raises(ConfigError, match=r"quantised to torch\.uint8"):
        quantised(torch.zeros(4, 8).as_subclass(Odd))
