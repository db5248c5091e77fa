"""Everything Steeple raises on purpose. Each error names its subject, the value and a remedy.

SteepleError
+-- ConfigError                 a setting is unknown, out of range or contradicts another
+-- ModelError                  a model cannot be used
|   +-- UnsupportedModel        an architecture or option that the decoder does not have
|   +-- WeightError             a weight is missing, unexpected, misshapen or unreadable
|   +-- TokenizerMismatch       target and drafter do not speak the same token ids
+-- RequestError                one request is wrong; it is answered, the others go on
+-- CapacityError               memory does not suffice; says how much is missing and what to lower
+-- StorageError                a file cannot be written or read
+-- InternalError               an invariant of Steeple broke; never the user's fault
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteepleError(Exception):
    """Root of the tree."""


class ConfigError(SteepleError):
    """A setting is unknown, out of range or contradicts another."""


class ModelError(SteepleError):
    """A model cannot be used."""


class UnsupportedModel(ModelError):
    """An architecture or an option that the decoder does not have."""


class WeightError(ModelError):
    """A weight is missing, unexpected, misshapen or unreadable."""


class TokenizerMismatch(ModelError):
    """Target and drafter do not speak the same token ids."""


class RequestError(SteepleError):
    """One request is wrong. It is answered with this message; nothing else is lost."""


class CapacityError(SteepleError):
    """Memory does not suffice."""


class StorageError(SteepleError):
    """A file cannot be written or read."""


class InternalError(SteepleError):
    """An invariant of Steeple broke."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """``value`` against ``known``: a sentence with the closest match, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
