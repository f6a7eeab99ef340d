"""``quark-inductor demo``."""

import argparse
import contextlib
from pathlib import Path

from quark_inductor.cli import common
from quark_inductor.machine import cache_folder

HELP = "a real model end to end: quantize, save, load, compile, chat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    parser.add_argument(
        "--scheme",
        action="append",
        metavar="NAME",
        help="a scheme to run (may be repeated); default: ptpc_fp8 and mxfp4",
    )
    common.add_json(parser, "the results")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="where the model is kept (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`."""
    from quark_inductor.schemes.spec import PRESETS

    common.check_known("scheme", arguments.scheme, list(PRESETS))
    from quark_inductor import demo

    with arguments.json.as_path() if arguments.json else contextlib.nullcontext() as path:
        return demo.run(arguments.scheme or list(demo.SCHEMES), arguments.cache, path)
