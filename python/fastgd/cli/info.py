"""What fastgd runs on here: its version, instruction set and threads, one line each."""

from __future__ import annotations

import argparse

import fastgd


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the command takes none."""


def run(args: argparse.Namespace) -> int:
    """Print ``fastgd.config()``."""
    config = fastgd.config()
    width = max(map(len, config))
    for name, value in config.items():
        print(f"{name:<{width}}  {_in_words(value)}")
    return 0


def _in_words(value: object) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_in_words(item)}" for key, item in value.items())
    return str(value)
