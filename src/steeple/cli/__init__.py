"""The command line. Each command is made from the settings of the job it runs; nothing heavy loads before it is needed."""

from steeple.cli.app import main

__all__ = ["main"]
