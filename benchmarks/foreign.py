"""What the rules make of Linears that compressed-tensors, torchao and amd-quark quantized.

    python benchmarks/foreign.py

Prints the table of foreign.md for those of the three that are installed. Cases that fare alike share a row. The
Linears are those of ``tests/foreign_linears.py``, with a bias and an input of three dimensions.
"""

import argparse
import importlib.util
import logging
import platform
import sys
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from quark_inductor.testing import rewrite

Row = tuple[str, str, str, str]


def load_linears() -> ModuleType:
    """``tests/foreign_linears.py``, which is in no package."""
    path = Path(__file__).resolve().parents[1] / "tests" / "foreign_linears.py"
    spec = importlib.util.spec_from_file_location("foreign_linears", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def result(foreign: Any, library: str, name: str, dtype: torch.dtype) -> Row:
    """Outcome, rules, op and reason of one case."""
    layer = foreign.cases(library)[name](dtype)
    x = foreign.example(dtype, foreign.shapes(library, name)[0])
    eager, done = layer(x), rewrite(layer, x)
    torch.testing.assert_close(done.output, eager, rtol=0, atol=0, equal_nan=True)
    kind, rules, reason = foreign.outcome(done)
    op = next((op for op in ("prologue_gemm", "quantized_gemm", "weight_only_gemm") if op in done.fused), "")
    return kind, " + ".join(rules), op, reason.removeprefix("no rule's pattern is this graph; ")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    foreign = load_linears()
    today = datetime.now(UTC).date()
    print(f"torch {torch.__version__}, {platform.machine()}, {today}\n")
    for library in foreign.LIBRARIES:
        if importlib.util.find_spec(library) is None:
            continue
        rows: dict[Row, dict[str, list[str]]] = {}
        with foreign.traceable(library):
            for name in foreign.cases(library):
                for label, dtype in foreign.DTYPES.items():
                    rows.setdefault(result(foreign, library, name, dtype), {}).setdefault(name, []).append(label)
        counts = Counter[str]()
        for (kind, *_), names in rows.items():
            counts[kind] += sum(map(len, names.values()))
        kinds = (foreign.WHOLE, foreign.GEMM, foreign.NONE)
        print(f"## {foreign.release(library)}\n")
        print(f"{', '.join(f'{counts[kind]} {kind}' for kind in kinds)} (cases and dtypes).\n")
        print("| case | dtype | outcome | rules | op | reason |\n|---|---|---|---|---|---|")
        for (kind, rules, op, reason), names in sorted(rows.items(), key=lambda row: kinds.index(row[0][0])):
            for labels in dict.fromkeys(map(tuple, names.values())):
                alike = ", ".join(f"`{name}`" for name, found in names.items() if tuple(found) == labels)
                print(f"| {alike} | {', '.join(labels)} | {kind} | {rules} | {op} | {reason} |")
        print()


if __name__ == "__main__":
    main()
