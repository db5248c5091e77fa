"""Which whole forward a runner gets beside the native one: recorded graphs, on a GPU."""

from __future__ import annotations

from steeple.model.graphs import step_graphs
from steeple.model.run import Runner
from steeple.ops.triton_attention import TritonAttention


def accelerate(runner: Runner, *, graphs: bool) -> None:
    """Record the forwards of ``runner`` as CUDA graphs if ``graphs``, and device, attention and cache allow it."""
    cache, device = runner.cache, runner.decoder.device
    recordable = device.type == "cuda" and isinstance(cache.attention, TritonAttention)
    if graphs and recordable and cache.scratch_slot is not None:
        runner.whole = step_graphs(runner.decoder, cache, cache.attention, scratch=cache.scratch_slot)
