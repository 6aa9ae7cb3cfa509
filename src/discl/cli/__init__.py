"""The command line: `main` is the program `discl`."""

from .program import app, main

__all__ = ["app", "main"]
