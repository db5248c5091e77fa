"""Puts the laws' lab on the path of the tests of the GPU path."""

from __future__ import annotations

import gpu.engines  # noqa: F401
