"""Checkpoints of other programs -> a Hugging Face folder that every other room reads."""

from steeple.convert.convert import ConvertConfig, convert
from steeple.convert.source import Format, detect_format

__all__ = ["ConvertConfig", "Format", "convert", "detect_format"]
