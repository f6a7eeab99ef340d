"""What merge_shared_input_ gains, on CPU.

    python benchmarks/merge_shared_input.py [SCHEME ...]

The Linears of a Llama's block (q, k, v, o, gate, up, down, with silu and a norm between) in bfloat16, compiled; one
token and sixteen, apart and merged, interleaved in one run: median milliseconds and their ratio.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quark_inductor as qi

SCHEMES = ("mxfp4", "ptpc_fp8", "nvfp4")
# Hidden size, key-value width, intermediate size.
SIZES = {"SmolLM2-135M": (576, 192, 1536), "Llama-8B": (4096, 1024, 14336)}
TOKENS = (1, 16)
SECONDS = 0.5


class Block(nn.Module):
    """A block without its attention: what is between the Linears is cheap."""

    def __init__(self, hidden: int, kv: int, intermediate: int) -> None:
        super().__init__()
        make = partial(nn.Linear, bias=False, dtype=torch.bfloat16)
        self.q_proj, self.k_proj, self.v_proj = make(hidden, hidden), make(hidden, kv), make(hidden, kv)
        self.o_proj, self.down_proj = make(hidden, hidden), make(intermediate, hidden)
        self.gate_proj, self.up_proj = make(hidden, intermediate), make(hidden, intermediate)
        self.norm = nn.RMSNorm(hidden, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Every Linear once."""
        kv = torch.tanh(self.k_proj(x)) * self.v_proj(x)
        x = x + self.o_proj(self.q_proj(x) * kv.repeat_interleave(x.shape[-1] // kv.shape[-1], -1))
        x = self.norm(x)
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def interleaved(calls: list[Callable[[], Tensor]]) -> list[tuple[float, float]]:
    """Median and spread (a quarter to three quarters) of each call's milliseconds."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, mine in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            mine.append((time.perf_counter() - start) * 1e3)
    return [(statistics.median(t), statistics.quantiles(t, n=4)[2] - statistics.quantiles(t, n=4)[0]) for t in times]


@torch.inference_mode()
def main() -> None:
    """Print a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| block of | scheme | M | apart, ms | merged, ms | apart / merged |\n|---|---|---|---|---|---|")
    for name, sizes in SIZES.items():
        for scheme in sys.argv[1:] or SCHEMES:
            torch._dynamo.reset()
            calibration = [torch.randn(4, sizes[0], dtype=torch.bfloat16)]
            forms = []
            for merge in (False, True):
                torch.manual_seed(0)
                model = qi.quantize_(Block(*sizes), scheme, exclude=(), calibration=calibration)
                if merge:
                    assert set(qi.merge_shared_input_(model).values()) == {""}
                forms.append(torch.compile(model, backend="quark", fullgraph=True, dynamic=False))
            for m in TOKENS:
                x = torch.randn(m, sizes[0], dtype=torch.bfloat16)
                (apart, _), (merged, _) = interleaved([partial(form, x) for form in forms])
                print(f"| {name} | {scheme} | {m} | {apart:.3f} | {merged:.3f} | {apart / merged:.2f} |", flush=True)


if __name__ == "__main__":
    main()
