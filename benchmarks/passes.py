"""What the passes cost.

    python benchmarks/passes.py [SCHEME ...]

The graph of a Llama of 32 blocks, 224 quantized Linears (its sizes are tiny: a pass sees nodes, not numbers), for some
schemes, in milliseconds: all passes together, late decomposition included, in a process that has traced its patterns
before; everything that is done to the graph, with Inductor's removal of no-ops and of dead code and the reasons for the
report; the same in a process that traces its patterns. The last column leaves every op to the late decomposition, as on
a target without kernels.
"""

import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._inductor.virtualized import V
from torch.fx import GraphModule

import quark_inductor as qi
from quark_inductor.patterns.late_decomposition import late_decomposition
from quark_inductor.testing import Rewrite, rewrite

SCHEMES = ("mxfp4", "ptpc_fp8", "fp8_block128", "ptpc_int8", "nvfp4_weight_only", "int4_wo_128")
BLOCKS, REPEATS = 32, 3


def model(scheme: str) -> Any:
    """A random Llama, quantized."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        dtype="bfloat16",
    )
    return qi.quantize_(LlamaForCausalLM(config).to(torch.bfloat16).eval(), scheme)


def run(scheme: str, quantized: Any, provider: str | None) -> Rewrite:
    """The rules on the model's graph."""

    def logits(ids: torch.Tensor) -> Any:
        return quantized(input_ids=ids, use_cache=False).logits

    return rewrite(logits, torch.arange(8).view(2, 4), options={"quark.provider": provider})


def decomposed(done: Rewrite) -> tuple[float, int]:
    """Milliseconds of the late decomposition, and how many ops there were."""
    graph = GraphModule(nn.Module(), done.after).graph
    values = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
    with V.set_fake_mode(detect_fake_mode(values)):
        start = time.perf_counter()
        ops = late_decomposition(graph)
        return (time.perf_counter() - start) * 1e3, ops


def main() -> None:
    """Print a table."""
    print(f"torch {torch.__version__}, {BLOCKS} blocks, median of {REPEATS}")
    titles = ("scheme", "Linears", "nodes", "passes, ms", "slowest", "all, ms", "first time, ms", "all left: late, ms")
    print(f"| {' | '.join(titles)} |")
    print(f"|{'---|' * len(titles)}")
    for scheme in sys.argv[1:] or SCHEMES:
        quantized = model(scheme)
        first = run(scheme, quantized, None)
        runs = [run(scheme, quantized, None) for _ in range(REPEATS)]
        late = []
        for done in runs:
            late.append(decomposed(done)[0])
        total = statistics.median(
            sum(p.ms for p in done.result.passes) + ms for done, ms in zip(runs, late, strict=True)
        )
        whole = statistics.median(done.result.ms + ms for done, ms in zip(runs, late, strict=True))
        slowest = max(runs[-1].result.passes, key=lambda p: p.ms)
        emulated = run(scheme, quantized, "emulation")
        everything, ops = decomposed(emulated)
        fused = sum(linear.fused for linear in first.result.linears)
        nodes = len(first.before.nodes)
        print(
            f"| {scheme} | {fused} | {nodes} | {total:.0f} | {slowest.name} {slowest.ms:.0f} | {whole:.0f} | "
            f"{first.result.ms:.0f} | {everything:.0f} ({ops} ops) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
