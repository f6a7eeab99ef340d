"""``quark-inductor env``."""

import argparse
import json
import os

from quark_inductor.cli import common

HELP = "versions, machine, providers and caches, on one page for the report of a bug"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    common.add_json(parser, "the same")


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`."""
    variables = dict(os.environ)  # torch sets some of its own
    from rich.console import Console

    from quark_inductor.environment import environment

    found = environment(variables)
    if arguments.json:
        arguments.json.write(json.dumps(found.to_dict(), indent=1))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in str(found).splitlines():
        console.print(line, style=None if line.startswith(" ") else "bold")
    return 0
