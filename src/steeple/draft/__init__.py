"""Drafters. A new one is a file here and a line in ``DRAFTERS``."""

from __future__ import annotations

from steeple.config import from_dict
from steeple.draft.base import DrafterConfig
from steeple.draft.ngram import NGramConfig
from steeple.draft.small_lm import SmallLMConfig
from steeple.errors import ConfigError, did_you_mean

DRAFTERS: dict[str, type[DrafterConfig]] = {"ngram": NGramConfig, "small_lm": SmallLMConfig}
NO_DRAFTER = "none"


def drafter_config(spec: str, *, k: int | None = None, **fields: object) -> DrafterConfig | None:
    """``none``, ``ngram``, ``small_lm`` or ``small_lm:DIR`` to the method's settings; None for no drafter.

    What follows the colon is the field ``model`` of the method, if it has one.
    """
    name, _, model = spec.partition(":")
    if name == NO_DRAFTER:
        return None
    if name not in DRAFTERS:
        raise ConfigError(f"Unknown drafter {name!r}. {did_you_mean(name, [*DRAFTERS, NO_DRAFTER])}")
    if model:
        fields["model"] = model
    if k is not None:
        fields["k"] = k
    return from_dict(DRAFTERS[name], fields)
