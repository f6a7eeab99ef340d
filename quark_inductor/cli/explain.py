"""``quark-inductor explain``."""

import argparse
from typing import Any

from quark_inductor.cli import common

HELP = "compile a checkpoint and say of each Linear what runs it, or why not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    common.add_checkpoint(parser)
    parser.add_argument(
        "--tokens", type=common.positive, default=1, metavar="M", help="in the call that is compiled; default: 1"
    )
    parser.add_argument("--measure", action="store_true", help="also measure each Linear while the model runs")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a Linear is left to the emulation")
    common.add_options(parser)
    common.add_json(parser, "the report")
    common.add_document(parser, "--html", "write the report as a page for a browser there")


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`."""
    options = {**common.options_of(arguments), **({"quark.strict": True} if arguments.strict else {})}
    common.check_options(options)
    model = common.load(arguments)
    from quark_inductor.report import explain

    more: dict[str, Any] = {"measure": True} if arguments.measure else {}
    report = explain(model, common.random_tokens(model, arguments.tokens), options=options, use_cache=False, **more)
    if arguments.json:
        arguments.json.write(report.to_json())
    if arguments.html:
        arguments.html.write(report.to_html())
    print(report)
    return 0
