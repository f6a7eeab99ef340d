"""The commands of ``quark-inductor``: one file each.

A command is a module with ``HELP``, one line; ``add_arguments(parser)``; and ``run(arguments)``, which returns the exit
code. Each imports what it needs when it runs: ``--help`` and ``--version`` do without torch.
"""

import argparse
from collections.abc import Mapping
from typing import Protocol

from quark_inductor.cli import bench, demo, env, explain, inspect, profile, run


class Command(Protocol):
    """What a command's module has."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Say what it takes."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


# In the order of ``--help``.
COMMANDS: Mapping[str, Command] = {
    "demo": demo,
    "inspect": inspect,
    "run": run,
    "explain": explain,
    "profile": profile,
    "bench": bench,
    "env": env,
}
