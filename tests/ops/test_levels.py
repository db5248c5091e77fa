"""The native kernels are right on lesser processors too: their tests again, compiled for other instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steeple.ops.native import LEVELS, _features, compiler

HERE = Path(__file__).parents[1]
FILES = ("ops/test_linear.py", "ops/test_norm.py", "ops/test_attention.py", "model/test_whole.py")


@pytest.mark.slow
@pytest.mark.parametrize("level", [name for name in LEVELS if name != "native"])
def test_the_kernels_tests_pass_on(level: str) -> None:
    if not compiler():
        pytest.skip("no compiler")
    if not set(LEVELS[level].needs) <= _features():
        pytest.skip(f"this processor has no {level}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(str(HERE / name) for name in FILES)],
        env={**os.environ, "STEEPLE_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " skipped" not in done.stdout
