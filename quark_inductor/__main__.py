"""The command line: ``quark-inductor`` or ``python -m quark_inductor``. Its commands are in :mod:`.cli`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from quark_inductor import __version__
from quark_inductor.cli import COMMANDS
from quark_inductor.cli.common import UsageError, documents
from quark_inductor.schemes.errors import QuarkInductorError

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, or 1 after an error of ours, or 130 after Ctrl-C. A wrong command line exits with 2.
    """
    parser = argparse.ArgumentParser(prog="quark-inductor", description="Models quantized by AMD Quark, compiled.")
    parser.add_argument("--version", action="version", version=f"quark-inductor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        description = f"{command.HELP[0].upper()}{command.HELP[1:]}."
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=description))
    arguments = parser.parse_args(argv)
    on_output = [document for document in documents(arguments) if document.path is None]
    if len(on_output) > 1:
        parser.error("only one document can go to standard output")
    try:
        for document in documents(arguments):
            document.check()
        with contextlib.redirect_stdout(sys.stderr) if on_output else contextlib.nullcontext():
            code = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except UsageError as e:
        parser.error(str(e))
    except QuarkInductorError as e:
        print(f"quark-inductor: {e}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("quark-inductor: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has enough. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
