"""Batched speculative decoding for any causal language model of ``transformers``, unmodified."""

from steeple.padded.config import PaddedConfig
from steeple.padded.generate import PaddedOutput, PaddedResult, generate
from steeple.padded.stats import PaddedStats

__all__ = ["PaddedConfig", "PaddedOutput", "PaddedResult", "PaddedStats", "generate"]
