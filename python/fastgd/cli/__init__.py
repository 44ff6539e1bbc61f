"""The command line: ``python -m fastgd demo | info | bench``, one module a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastgd.cli import bench, demo, info
from fastgd.cli.stop import Stop

COMMANDS = {"demo": demo, "info": info, "bench": bench}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process when None.

    Returns
    -------
    int
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m fastgd", description="Fused gradient-descent steps for arrays.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except Stop as stop:
        print(f"fastgd: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfastgd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
