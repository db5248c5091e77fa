"""What the README shows runs: its Python blocks, its command lines, and its map of the source is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = ROOT / "models" / "target" / "model.safetensors"

needs_model = pytest.mark.skipif(not MODEL.exists(), reason="the embedded models are not in this checkout")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@needs_model
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:30].strip())
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@needs_model
def test_command_lines_run(tmp_path: Path) -> None:
    for block in blocks("bash"):
        for line in block.splitlines():
            done = run(["bash", "-c", line], tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_every_source_file_has_a_line_in_the_map() -> None:
    named = set(re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE))
    files = {str(p.relative_to(ROOT / "src" / "steeple")) for p in (ROOT / "src" / "steeple").rglob("*.*")}
    files = {f for f in files if Path(f).suffix in (".py", ".cpp", ".h") and Path(f).name != "__init__.py"}
    assert named == files


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
