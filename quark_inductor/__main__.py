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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 1 after an error of ours, or 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="quark-inductor", description="Models quantized by AMD Quark, compiled.")
    parser.add_argument("--version", action="version", version=f"quark-inductor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
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
    arguments = parser.parse_args(argv)

    from quark_inductor import demo as demo_module
    from quark_inductor.schemes.errors import QuarkInductorError
    from quark_inductor.schemes.spec import PRESETS

    schemes = arguments.scheme or list(demo_module.SCHEMES)
    if unknown := [s for s in schemes if s not in PRESETS]:
        parser.error(f"there is no scheme {unknown[0]!r}; expected one of {', '.join(PRESETS)}")
    try:
        return demo_module.run(schemes, arguments.cache, arguments.json)
    except QuarkInductorError as e:
        print(f"quark-inductor: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
