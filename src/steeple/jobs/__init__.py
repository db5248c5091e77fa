"""Long jobs over files. ``steeple generate`` is one."""

from steeple.jobs.config import GenerateConfig
from steeple.jobs.generate import JobInterrupted, Progress, run_generate

__all__ = ["GenerateConfig", "JobInterrupted", "Progress", "run_generate"]
