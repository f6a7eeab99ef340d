"""``quark-inductor inspect``."""

import argparse

from quark_inductor.cli import common

HELP = "what a checkpoint holds, and what would run it here, without loading weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    common.add_path(parser)
    parser.add_argument("--all", action="store_true", help="a line for each Linear and each problem")
    common.add_json(parser, "the same")


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`; 1 too if ``quark_inductor.load`` would refuse the checkpoint."""
    from quark_inductor.inspection import inspect

    found = inspect(arguments.checkpoint)
    if arguments.json:
        arguments.json.write(found.to_json())
    print(found.text(all=arguments.all))
    return int(bool(found.problems))
