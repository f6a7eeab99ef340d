"""Which quantizes have a kernel of their own, and what becomes of the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from quark_inductor.lowering.base import EMULATION, No, forcing
from quark_inductor.lowering.quantize import quantizes
from quark_inductor.lowering.registry import count_key, kernel_counts
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton.chips import CHIPS
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

q = torch.ops.quark_inductor
LOGARITHM = "takes a logarithm, which two libraries round differently: quantize with 'even'"


def on(arch: str) -> Target:
    return Target(device_type="cuda", arch=arch)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_packed_format(arch: str, dtype: str) -> None:
    found = {
        (format, rule)
        for format, f in BLOCK_FORMATS.items()
        for rule in f.scale_rules
        if quantizes(on(arch), format, rule, dtype, 64) is None
    }
    mx, amd = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"), ("amdfp4_g16", "amdfp4_g32")
    nvfp4 = {("nvfp4", "combined"), ("nvfp4", "sequential")} if CHIPS[arch].has_fp8 else set()
    assert found == {(format, "even") for format in mx} | {(format, "nearest") for format in amd} | nvfp4


@pytest.mark.parametrize(
    ("target", "format", "rule", "dtype", "k", "reason"),
    [
        (Target(device_type="cpu", arch="x86_64", isa="avx2"), "mxfp4", "even", "bfloat16", 64, "the device is cpu"),
        (on("sm_70"), "mxfp4", "even", "bfloat16", 64, "the device is cuda sm_70"),
        (on("sm_90"), "mxfp8_e4m3", "even", "bfloat16", 64, "elements of mxfp8_e4m3 are not packed"),
        (on("sm_90"), "mxfp4", "floor", "bfloat16", 64, f"scale rule 'floor' {LOGARITHM}"),
        (on("sm_90"), "mxfp6_e2m3", "ceil", "bfloat16", 64, f"scale rule 'ceil' {LOGARITHM}"),
        (on("sm_80"), "nvfp4", "combined", "bfloat16", 64, "Triton has no FP8 on this chip"),
        (on("sm_90"), "mxfp4", "even", "float64", 64, "quantizes bfloat16, float16, float32, not float64"),
        (on("sm_90"), "mxfp4", "even", "bfloat16", None, "K is not known before run time"),
    ],
)
def test_what_stays_plain_aten(target: Target, format: str, rule: str, dtype: str, k: int | None, reason: str) -> None:
    answer = quantizes(target, format, rule, dtype, k)
    assert isinstance(answer, No)
    assert answer.reason.startswith("triton: ")
    assert reason in answer.reason


def test_a_forced_provider() -> None:
    """``quark.provider`` says who makes kernels, these too."""
    problem = on("gfx950"), "mxfp4", "even", "bfloat16", 64
    with forcing("triton"):
        assert quantizes(*problem) is None
    for provider in ("cpp", EMULATION):
        with forcing(provider):
            assert quantizes(*problem) == No(f"triton: option quark.provider is {provider!r}: leave it out to ask all")


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = q.block_quantize(x, "mxfp4", "even")
    return codes, scales


def test_kernels_are_counted(gpu_code: Callable[..., Any]) -> None:
    """But not among those of GEMMs."""
    before = kernel_counts()
    gpu_code(lambda x: (*quantized(x), *quantized(x + 1)), [torch.empty(3, 64)], arch="sm_90")
    counted = {key: count for key, count in counters["inductor"].items() if key.startswith("quark.")}
    assert counted == {count_key("block_quantize", "triton"): 2}
    assert kernel_counts() == before


def test_a_quantize_that_has_no_kernel(gpu_code: Callable[..., Any]) -> None:
    """The passes leave none; another backend, which has no passes of ours, calls the op."""
    code = gpu_code(quantized, [torch.empty(3, 64)], arch="sm_70")
    assert code.count("torch.ops.quark_inductor.block_quantize.default(") == 1
    assert "async_compile.triton(" not in code
