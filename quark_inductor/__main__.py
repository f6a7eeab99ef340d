"""The command line: ``quark-inductor`` or ``python -m quark_inductor``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quark_inductor import __version__


def cache_folder() -> Path:
    """Where downloads are kept by default: a folder of ours in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "quark-inductor"


def _shape(text: str) -> tuple[int, int]:
    """``"4096x14336"``: N and K."""
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected N x K, such as 4096x14336")
    return int(n), int(k)


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser("demo", help="a real model end to end: quantize, save, load, compile, chat")
    demo.add_argument(
        "--scheme",
        action="append",
        metavar="NAME",
        help="a scheme to run (may be repeated); default: ptpc_fp8 and mxfp4",
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    demo.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="where the model is kept (%(default)s)"
    )


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser("bench", help="GEMMs of quantized Linears on this CPU, against those of peers")
    add = bench.add_argument
    add("--scheme", action="append", metavar="NAME", help="a scheme to measure (may be repeated); default: all")
    add(
        "--shape",
        action="append",
        type=_shape,
        metavar="NxK",
        help="output x input features (may be repeated); default: the Linears of Llama 3 8B",
    )
    add("--tokens", nargs="+", type=_positive, metavar="M", help="numbers of tokens; default: 1 4 16 128 512")
    add("--threads", nargs="+", type=_positive, metavar="T", help="numbers of threads; default: 1 and all cores")
    add(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="whom to compare with; default: all that are installed, the emulation only in a few places",
    )
    add("--seconds", type=float, metavar="S", help="how long each row is measured at least; default: 0.5")
    add("--csv", type=Path, metavar="FILE", help="write the rows there")
    add("--json", type=Path, metavar="FILE", help="write rows, settings, machine and what is missing there")
    add("--plot", type=Path, metavar="FILE", help="draw them there (.png, .svg); needs quark-inductor[bench]")
    add("--quick", action="store_true", help="a run of seconds that shows that it works and measures nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 1 after an error of ours, or 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="quark-inductor", description="Models quantized by AMD Quark, compiled.")
    parser.add_argument("--version", action="version", version=f"quark-inductor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_bench(commands)
    arguments = parser.parse_args(argv)

    from quark_inductor.schemes.errors import QuarkInductorError
    from quark_inductor.schemes.spec import PRESETS

    if unknown := [s for s in arguments.scheme or () if s not in PRESETS]:
        parser.error(f"there is no scheme {unknown[0]!r}; expected one of {', '.join(PRESETS)}")
    try:
        if arguments.command == "bench":
            from quark_inductor import bench
            from quark_inductor.peers import PEERS

            if unknown := [p for p in arguments.peers or () if p not in PEERS]:
                parser.error(f"there is no peer {unknown[0]!r}; expected some of {', '.join(PEERS)}")
            settings = bench.settings(
                quick=arguments.quick,
                schemes=arguments.scheme,
                shapes=arguments.shape,
                tokens=arguments.tokens,
                threads=arguments.threads,
                peers=arguments.peers,
                seconds=arguments.seconds,
            )
            return bench.run(settings, arguments.csv, arguments.json, arguments.plot)
        from quark_inductor import demo

        return demo.run(arguments.scheme or list(demo.SCHEMES), arguments.cache, arguments.json)
    except QuarkInductorError as e:
        print(f"quark-inductor: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
