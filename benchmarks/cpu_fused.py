"""Fused GEMMs against the compiled emulation and bfloat16, on CPU.

    python benchmarks/cpu_fused.py [SCHEME ...]

One Linear in bfloat16, compiled for any number of tokens: milliseconds a call with this package's kernels, with the
emulation as Inductor compiles it (``quark.provider="emulation"``) and of ``F.linear`` on the float weight, interleaved
in one run, medians; the ratios are to the first.
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

SCHEMES = (
    "mxfp4",
    "nvfp4",
    "mxfp4_fp8",
    "mxfp6_e2m3",
    "mxfp8",
    "ptpc_fp8",
    "fp8_block128",
    "ptpc_int8",
    "int8",
    "int4_wo_128",
    "mxfp4_weight_only",
)
N = K = 2048
TOKENS = (1, 16, 128, 512)
SECONDS = 0.5


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


def compiled(model: nn.Module, provider: str | None) -> Callable[[Tensor], Tensor]:
    """The model compiled with one provider allowed."""
    result: Callable[[Tensor], Tensor] = torch.compile(
        model, backend="quark", fullgraph=True, dynamic=True, options={"quark.provider": provider}
    )
    return result


@torch.inference_mode()
def main() -> None:
    """Print a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N = K = {N}")
    print("| scheme | M | fused, ms | spread | emulation / fused | bf16 F.linear / fused |\n|---|---|---|---|---|---|")
    for scheme in sys.argv[1:] or SCHEMES:
        torch.manual_seed(0)
        linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
        weight = linear.weight.detach().clone()
        calibration = [torch.randn(8, K, dtype=torch.bfloat16)]
        model = qi.quantize_(nn.Sequential(linear), scheme, exclude=(), calibration=calibration)
        torch._dynamo.reset()
        fused, emulation = compiled(model, None), compiled(model, "emulation")
        for m in TOKENS:
            x = torch.randn(m, K, dtype=torch.bfloat16)
            calls = [partial(fused, x), partial(emulation, x), partial(F.linear, x, weight)]
            (ours, spread), (theirs, _), (float_, _) = interleaved(calls)
            row = f"| {scheme} | {m} | {ours:.2f} | {spread:.2f} | {theirs / ours:.2f} | {float_ / ours:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
