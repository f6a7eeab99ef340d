"""``quark-inductor bench``."""

import argparse
import contextlib
from pathlib import Path

from quark_inductor.cli import common

HELP = "GEMMs of quantized Linears on this CPU, against those of peers"


def _shape(text: str) -> tuple[int, int]:
    """``"4096x14336"``: N and K."""
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected N x K, such as 4096x14336")
    return int(n), int(k)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    add = parser.add_argument
    add("--scheme", action="append", metavar="NAME", help="a scheme to measure (may be repeated); default: all")
    add(
        "--shape",
        action="append",
        type=_shape,
        metavar="NxK",
        help="output x input features (may be repeated); default: the Linears of Llama 3 8B",
    )
    add("--tokens", nargs="+", type=common.positive, metavar="M", help="numbers of tokens; default: 1 4 16 128 512")
    add("--threads", nargs="+", type=common.positive, metavar="T", help="numbers of threads; default: 1 and all cores")
    add(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="whom to compare with; default: all that are installed, the emulation only in a few places",
    )
    add("--seconds", type=float, metavar="S", help="how long each row is measured at least; default: 0.5")
    add("--csv", type=Path, metavar="FILE", help="write the rows there")
    common.add_json(parser, "rows, settings, machine and what is missing")
    add("--plot", type=Path, metavar="FILE", help="draw them there (.png, .svg); needs quark-inductor[bench]")
    add("--quick", action="store_true", help="a run of seconds that shows that it works and measures nothing")


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`."""
    from quark_inductor.schemes.spec import PRESETS

    common.check_known("scheme", arguments.scheme, list(PRESETS))
    for path in (arguments.csv, arguments.plot):
        if path is not None:
            common.check_writable(path)
    from quark_inductor import bench
    from quark_inductor.peers import PEERS

    common.check_known("peer", arguments.peers, list(PEERS))
    settings = bench.settings(
        quick=arguments.quick,
        schemes=arguments.scheme,
        shapes=arguments.shape,
        tokens=arguments.tokens,
        threads=arguments.threads,
        peers=arguments.peers,
        seconds=arguments.seconds,
    )
    with arguments.json.as_path() if arguments.json else contextlib.nullcontext() as path:
        return bench.run(settings, arguments.csv, path, arguments.plot)
