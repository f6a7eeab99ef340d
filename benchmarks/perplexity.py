"""Perplexity of SmolLM2-135M-Instruct under every scheme, emulated: what each scheme costs in quality.

    python benchmarks/perplexity.py [--cache DIR] [SCHEME ...]

Downloads the model (93 MB) as the demo does. Text: the licence shipped with the package, its first 2048 tokens in
pieces of 512; what follows calibrates the schemes with static activation scales. Prints the table of perplexity.md.
"""

import argparse
import copy
import math
import platform
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from quark_inductor.demo import fetch_model, load_float
from quark_inductor.machine import cache_folder
from quark_inductor.quantize import quantize_
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.spec import PRESETS

PIECE, PIECES = 512, 4


@torch.inference_mode()
def losses(model: Any, pieces: list[torch.Tensor]) -> torch.Tensor:
    """Negative log likelihood of each token, the first of a piece excepted, in float64."""
    found = []
    for ids in pieces:
        logits = model(ids[None], use_cache=False).logits[0, :-1].double()
        found.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(found)


def row(name: str, model: Any, reference: torch.Tensor | None, pieces: list[torch.Tensor]) -> tuple[str, torch.Tensor]:
    """A line of the table, and the losses."""
    linears = [m for m in model.modules() if isinstance(m, QuarkLinear)]
    stored = sum(p.nbytes for m in linears for p in m.parameters())
    numbers = sum(m.in_features * m.out_features for m in linears)
    for linear in linears:
        linear.dequantize_()
    loss = losses(model, pieces)
    change = ""
    if reference is not None:
        difference = loss - reference
        error = difference.std().item() / math.sqrt(len(difference))
        change = f"{difference.mean().item():+.4f} ± {error:.4f}"
    bits = f"{8 * stored / numbers:.2f}" if numbers else "16"
    return f"| `{name}` | {bits} | {math.exp(loss.mean().item()):.3f} | {change} |", loss


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("schemes", nargs="*", default=list(PRESETS), metavar="SCHEME")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    args = parser.parse_args()
    tokenizer, float_model = load_float(fetch_model(args.cache))
    text = resources.files("quark_inductor").joinpath("perplexity.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    pieces, rest = list(tokens[: PIECE * PIECES].split(PIECE)), tokens[PIECE * PIECES :]
    print(
        f"torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}; {len(tokens)} tokens of text,"
    )
    print(f"the first {PIECE * PIECES} read in pieces of {PIECE}, the other {len(rest)} for calibration.\n")
    print("| scheme | bits a weight | perplexity | loss a token, less that of bf16 (± standard error) |")
    print("|---|---|---|---|")
    line, reference = row("bf16", float_model, None, pieces)
    print(line, flush=True)
    for name in args.schemes:
        model = copy.deepcopy(float_model)
        try:
            quantize_(model, name, calibration=[rest[None]])
        except ShapeError as e:
            print(f"| `{name}` | | | not for this model: {e} |", flush=True)
            continue
        print(row(name, model, reference, pieces)[0], flush=True)


if __name__ == "__main__":
    main()
