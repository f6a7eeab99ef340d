"""``quark-inductor profile``."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from quark_inductor.cli import common
from quark_inductor.schemes.errors import QuarkInductorError

HELP = "where the time goes when a checkpoint is compiled, with empty caches and with full ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    common.add_checkpoint(parser)
    parser.add_argument(
        "--tokens", type=common.positive, default=1, metavar="M", help="in the call that is compiled; default: 1"
    )
    parser.add_argument("--backend", choices=("quark", "inductor"), default="quark", help="default: quark")
    parser.add_argument("--stock", action="store_true", help="also profile Inductor alone, and compare with it")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a profile that --json wrote")
    common.add_options(parser)
    common.add_json(parser, "the profile, and what it was compared with,")
    common.add_document(parser, "--html", "write the profile as a page for a browser there")
    common.add_document(parser, "--trace", "write a trace there, for Perfetto or chrome://tracing")


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`."""
    from quark_inductor.profile import profile_compile

    if arguments.stock and arguments.backend == "inductor":
        raise common.UsageError("--stock compares with --backend inductor, which is what is profiled already")
    options = common.options_of(arguments)
    if arguments.backend == "quark":
        common.check_options(options)
    bases = [] if arguments.against is None else [_profile(arguments.against)]
    model = common.load(arguments)
    ids = common.random_tokens(model, arguments.tokens)
    found = profile_compile(model, ids, backend=arguments.backend, options=options, use_cache=False)
    if arguments.stock:
        bases.append(_stock(arguments))
    comparisons = [found.compare(base) for base in bases]
    if arguments.json:
        content = json.loads(found.to_json())
        if comparisons:
            content["comparisons"] = [json.loads(comparison.to_json()) for comparison in comparisons]
        arguments.json.write(json.dumps(content, indent=1))
    if arguments.html:
        arguments.html.write(found.to_html())
    if arguments.trace:
        arguments.trace.write(found.to_chrome_trace())
    print(found.table())
    for comparison in comparisons:
        print(f"\n{comparison}")
    return 0


def _stock(arguments: argparse.Namespace) -> Any:
    """The same by Inductor alone, in a process of its own: what a process does only once is in both profiles then."""
    from quark_inductor.profile import Profile

    command = [sys.executable, "-P", "-m", "quark_inductor", "profile", arguments.checkpoint, "--backend", "inductor"]
    command += ["--device", arguments.device, "--tokens", str(arguments.tokens), "--json", "-"]
    for key, value in arguments.option:
        if not key.startswith("quark."):
            command += ["--option", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise QuarkInductorError(f"Inductor alone could not be profiled: {last}")
    return Profile.from_json(done.stdout)


def _profile(path: Path) -> Any:
    from quark_inductor.profile import Profile

    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise QuarkInductorError(f"cannot read {path}: {e.strerror}; expected a profile that --json wrote") from e
    except (QuarkInductorError, UnicodeDecodeError) as e:
        raise QuarkInductorError(f"{path}: {e}") from e
