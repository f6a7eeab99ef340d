"""``quark-inductor run``."""

import argparse
import json
import sys
import time
from typing import Any

from quark_inductor.cli import common

HELP = "compile a checkpoint and let it answer a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See :class:`quark_inductor.cli.Command`."""
    common.add_checkpoint(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="what to answer; continued where there is no chat template")
    parser.add_argument(
        "--tokens", type=common.positive, default=128, metavar="N", help="the most tokens of the answer; default: 128"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile: the emulation")
    common.add_options(parser)
    common.add_json(parser, "answer, tokens, tokens a second, and seconds of loading and compiling")


def run(arguments: argparse.Namespace) -> int:
    """See :class:`quark_inductor.cli.Command`."""
    options = common.options_of(arguments)
    common.check_options(options)
    from quark_inductor.session import Clock, Session, Stream, quiet, tokenizer_of

    with quiet():
        tokenizer = tokenizer_of(arguments.checkpoint)
        start = time.perf_counter()
        model = common.load(arguments)
        session = Session(tokenizer, model, arguments.prompt, arguments.tokens)
        loaded = time.perf_counter()
        if not arguments.eager:
            session.compile(options)
            session.generate(session.prompt, 2, least=2)
        compiled = time.perf_counter()
        clock = Clock()
        answer = session.generate(session.prompt, arguments.tokens, streamer=Stream(tokenizer, sys.stdout, clock))
    speed = clock.tokens_per_second()
    report: dict[str, Any] = {
        "schema": 1,
        "kind": "answer",
        "checkpoint": arguments.checkpoint,
        "prompt": arguments.prompt,
        "answer": session.decode(answer),
        "tokens": len(answer),
        "compiled": not arguments.eager,
        "tok_s": speed,
        "seconds": {"load": loaded - start, "compile": None if arguments.eager else compiled - loaded},
    }
    if arguments.json:
        arguments.json.write(json.dumps(report, indent=1))
    said = f"{len(answer)} tokens" + (f", {speed:.1f} tokens/s" if speed is not None else "")
    compiling = "" if arguments.eager else f", compiled in {compiled - loaded:.1f} s"
    print(f"{said}; loaded in {loaded - start:.1f} s{compiling}", file=sys.stderr)
    return 0
