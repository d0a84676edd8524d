"""The command `pyadapt`, which is also `python -m pyadapt`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from . import quickstart


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; without one, the report on this machine.

    Args:
        arguments: what follows the program's name; None reads the command line.

    Returns:
        The exit status: 0, or 2 for input that cannot work.
    """
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyadapt", description="Parameter-efficient fine-tuning on native kernels.")
    _add_json(parser)
    parser.set_defaults(run=_environment)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    environment = commands.add_parser("env", help="versions, back ends, instruction sets and routes (the default)")
    _add_json(environment)

    start = commands.add_parser("quickstart", help="fine-tune a small pretrained model here, and export it")
    quickstart.add_arguments(start)
    start.set_defaults(run=lambda options: quickstart.run(quickstart.Options.from_arguments(options)))
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the report as JSON")


def _environment(options: argparse.Namespace) -> int:
    from . import environment

    values = environment.report()
    print(json.dumps(values, indent=2) if getattr(options, "json", False) else environment.as_text(values))
    return 0
