"""API keys: kept as SHA-256, compared in constant time, each with a name that stands for its holder."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection

from steeple.errors import ConfigError
from steeple.serve.errors import ApiError

VARIABLE = "STEEPLE_API_KEYS"
TENANT = "steeple.tenant"
HASH = re.compile(r"[0-9a-f]{64}")
OPEN = ("/", "/health", "/ready", "/version", "/metrics", "/openapi.json")
"""Paths that need no key: they tell nothing of anybody's requests."""


def hashed(key: str) -> str:
    """What is kept of a key. Keys are long and random, so one round of SHA-256 keeps them secret."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """Args: hashes: name of the holder -> SHA-256 of the key, in hex. Without any, everybody may come in."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    @staticmethod
    def load(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
        """Keys of a file (``name:sha256`` a line, # begins a comment) and of the environment (``KEY,KEY``).

        Raises ``ConfigError`` naming the line.
        """
        hashes: dict[str, str] = {}
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise ConfigError(f"ServeConfig.keys_file: {file} cannot be read ({error}).") from error
            for number, line in enumerate(lines, 1):
                hashes.update(_entry(file, number, line.partition("#")[0].strip(), hashes))
        given = [key.strip() for key in environment.get(VARIABLE, "").split(",")]
        hashes.update({f"environment-{i}": hashed(key) for i, key in enumerate(filter(None, given), 1)})
        if file is not None and not hashes:
            raise ConfigError(f"ServeConfig.keys_file: {file} holds no keys; nobody could come in.")
        return Keys(hashes)

    def tenant(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Whose key a request carries. ``ApiError`` 401 if it has none or a wrong one."""
        if not self._hashes:
            return ""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if given else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not key.strip():
            raise _refused("no API key was given; send it as 'Authorization: Bearer KEY'.", "missing_api_key")
        own = hashlib.sha256(key.strip()).hexdigest()
        # All are compared, so that the time says nothing about which was close.
        found = [name for name, known in self._hashes.items() if hmac.compare_digest(own, known)]
        if not found:
            raise _refused("the API key is not known here.", "invalid_api_key")
        return found[0]


def tenant_of(connection: HTTPConnection) -> str:
    """Whose request it is; empty if there are no keys."""
    scope: Mapping[str, Any] = connection.scope
    return str(scope.get(TENANT, ""))


def _entry(file: Path, number: int, line: str, known: Mapping[str, str]) -> dict[str, str]:
    if not line:
        return {}
    name, _, digest = (part.strip() for part in line.partition(":"))
    if not name or not HASH.fullmatch(digest):
        raise ConfigError(
            f"ServeConfig.keys_file: line {number} of {file} is not 'name:sha256' with 64 hex digits; make one by "
            "printf %s KEY | sha256sum."
        )
    if name in known:
        raise ConfigError(f"ServeConfig.keys_file: line {number} of {file} names {name!r} again; give another name.")
    return {name: digest}


def _refused(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
