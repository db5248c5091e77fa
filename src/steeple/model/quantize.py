"""Weight-only int8 for the target: a quarter to a half of the bytes of a step, and another target.

The law that is verified against is then the quantised model's. torchao quantises (symmetric, one scale per output); the
native kernel multiplies, torchao's own operation is the slow twin. The embedding keeps its type.
"""

from __future__ import annotations

import warnings

from torch import nn

from steeple.errors import ConfigError
from steeple.model.decoder import Decoder
from steeple.model.layers import Linear


def quantize_weights(decoder: Decoder) -> None:
    """Quantise the weights of all linear layers in place, before ``Decoder.use``; a tied head stays as it is.

    Raises ``ConfigError`` if torchao is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            f"weights = 'int8' needs torchao ({error}); pip install torchao, or leave weights as stored."
        ) from error

    def wanted(module: nn.Module, _name: str) -> bool:
        return isinstance(module, Linear) and not (module is decoder.head and decoder.config.tie_embeddings)

    quantize_(decoder, Int8WeightOnlyConfig(), filter_fn=wanted)
