"""The command line. A command is made from the settings of the job it runs, and loads what it needs when called."""

from steeple.cli.app import main

__all__ = ["main"]
