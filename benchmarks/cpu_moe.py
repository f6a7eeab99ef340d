"""One layer's experts on CPU, compiled by this package, against bfloat16 ones in every form transformers has.

    python benchmarks/cpu_moe.py [--scheme NAME ...] [--tokens N ...] [--threads N] [--output FILE]

The layer has the sizes of Qwen3-30B-A3B's: 128 experts, 8 a token, hidden size 2048, intermediate size 768. Every way
gets the same random inputs, interleaved in one process, with another routing each time, so that experts' weights come
from memory; medians. The ways in bfloat16: ``eager`` (a loop over the experts that were hit), ``grouped``
(``torch._grouped_mm``) and ``grouped compiled`` (stock Inductor). Every compiled way runs once with each routing first.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.machine import facts

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
SCHEMES = ("mxfp4", "mxfp4_weight_only", "nvfp4_weight_only", "ptpc_fp8", "mxfp8", "ptpc_int8", "int4_wo_128")
TOKENS = (1, 4, 16, 64, 512, 2048)
Inputs = tuple[Tensor, Tensor, Tensor]


class Layer(nn.Module):
    """The experts as transformers has them, and a form in which they run."""

    def __init__(self, form: str) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = form
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config).to(torch.bfloat16)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``."""
        result: Tensor = self.experts(x, index, weights)
        return result


def float_layers() -> dict[str, Layer]:
    """One set of weights, in three forms."""
    layers = {"eager": Layer("eager"), "grouped": Layer("grouped_mm")}
    torch.manual_seed(0)
    for name, p in list(layers["eager"].experts.named_parameters()):
        weight = nn.Parameter(torch.randn(p.shape).mul_(0.02).to(torch.bfloat16), requires_grad=False)
        for layer in layers.values():
            setattr(layer.experts, name, weight)
    return {**layers, "grouped compiled": layers["grouped"]}


def some_inputs(tokens: int) -> Inputs:
    """Random tokens, routed at random."""
    scores = torch.softmax(torch.randn(tokens, EXPERTS), -1)
    weights, index = scores.topk(TOP_K)
    weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
    return torch.randn(tokens, HIDDEN).to(torch.bfloat16), index, weights


def medians(ways: dict[str, Callable[..., Any]], tokens: int, seconds: float) -> dict[str, float]:
    """Milliseconds a call of each way, interleaved."""
    inputs = [some_inputs(tokens) for _ in range(8)]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for given in inputs:
        for way in ways.values():
            way(*given)
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or i < 8:
        for name, way in ways.items():
            begin = time.perf_counter()
            way(*inputs[i % len(inputs)])
            times[name].append((time.perf_counter() - begin) * 1e3)
        i += 1
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", nargs="+", default=SCHEMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for one row of the table")
    parser.add_argument("--output", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = float_layers()
    lines = [
        f"Milliseconds, medians; {', '.join(f'{k} {v}' for k, v in facts().items())}; {arguments.threads} threads.",
        "",
        "| scheme | tokens | compiled | bf16 eager | bf16 grouped | bf16 grouped compiled | x best bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme in arguments.scheme:
        quantized = copy.deepcopy(layers["eager"])
        qi.quantize_(quantized, scheme)
        for tokens in arguments.tokens:
            torch._dynamo.reset()
            ways: dict[str, Callable[..., Any]] = {
                "compiled": torch.compile(quantized, backend="quark", fullgraph=True, options={"quark.strict": True}),
                **layers,
                "grouped compiled": torch.compile(layers["grouped"], fullgraph=True),
            }
            found = medians(ways, tokens, arguments.seconds)
            best = min(found[name] for name in layers)
            cells = [f"{found[name]:.3f}" for name in ("compiled", *layers)]
            lines.append(f"| `{scheme}` | {tokens} | {' | '.join(cells)} | {best / found['compiled']:.2f} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
