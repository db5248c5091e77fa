"""Amounts of memory as people write them: 512MiB, 4GiB, 1.5e9."""

from __future__ import annotations

import math
import re

from steeple.errors import ConfigError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}{end}": 1024 ** (i + 1) for i, letter in enumerate("KMGT") for end in ("", "IB")},
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str, owner: str) -> int:
    """Bytes of ``512MiB``, ``4GiB``, ``2GB``, ``1000000``. KiB and K are 1024 bytes, KB is 1000; case does not matter.

    Raises ``ConfigError``, which names ``owner``, for anything else and for less than one byte.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"{owner} = {text!r} is no amount of memory; write it like 512MiB, 4GiB or 1000000 (bytes).")
    amount = float(match[1]) * UNITS[match[2].upper()]
    if not math.isfinite(amount) or not 1 <= amount < 2**60:
        raise ConfigError(f"{owner} = {text!r} is out of range; give from 1 byte to 1023 PiB.")
    whole = match[1].isdigit()
    return int(match[1]) * UNITS[match[2].upper()] if whole else int(amount)


def show_bytes(amount: int) -> str:
    """With a unit and two digits behind the point: 1.50 GiB."""
    value, unit = float(amount), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{amount} bytes" if unit == "bytes" else f"{value:.2f} {unit}"
