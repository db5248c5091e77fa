"""Drafters. A new one is a file here and a line in ``DRAFTERS``."""

from __future__ import annotations

import dataclasses

from steeple.config import from_dict
from steeple.draft.auto import AutoConfig
from steeple.draft.auto_k import AutoKConfig
from steeple.draft.base import DrafterConfig
from steeple.draft.minions import MinionsConfig
from steeple.draft.ngram import NGramConfig
from steeple.draft.small_lm import SmallLMConfig
from steeple.draft.sparse_self import SparseSelfConfig
from steeple.draft.spin import SpinConfig
from steeple.draft.spire import SpireDraftConfig
from steeple.errors import ConfigError, did_you_mean

DRAFTERS: dict[str, type[DrafterConfig]] = {
    "ngram": NGramConfig,
    "small_lm": SmallLMConfig,
    "sparse_self": SparseSelfConfig,
    "spire": SpireDraftConfig,
    "minions": MinionsConfig,
    "spin": SpinConfig,
    "auto-k": AutoKConfig,
    "auto": AutoConfig,
}
NO_DRAFTER = "none"


def drafter_config(spec: str, *, k: int | None = None, **fields: object) -> DrafterConfig | None:
    """A spec to a method's settings; None for ``none``.

    A spec is ``NAME``, ``NAME:DIR`` (what follows the colon is the field ``model`` of the method, if it has one) or
    ``NAME:field=value+field=value``.
    """
    name, _, rest = spec.partition(":")
    if name == NO_DRAFTER:
        return None
    if name not in DRAFTERS:
        raise ConfigError(f"Unknown drafter {name!r}. {did_you_mean(name, [*DRAFTERS, NO_DRAFTER])}")
    if k is not None:
        fields["k"] = k
    fields.update(_fields(DRAFTERS[name], rest))
    return from_dict(DRAFTERS[name], fields)


def _value(like: object, text: str) -> object:
    """``text`` as the kind of ``like``, if it is one; else as it stands, for the method to refuse."""
    if isinstance(like, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    kind = float if isinstance(like, float) else int
    try:
        return kind(text) if isinstance(like, int | float) else text
    except ValueError:
        return text


def _fields(method: type[DrafterConfig], text: str) -> dict[str, object]:
    """The fields that a spec names behind its colon."""
    known = {f.name: f for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    if not text:
        return {}
    if "model" in known and text.partition("=")[0] not in known:
        return {"model": text}
    found: dict[str, object] = {}
    for part in text.split("+"):
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"{part!r} is no setting of this drafter. {did_you_mean(name, known)}")
        found[name] = _value(known[name].default, value)
    return found
