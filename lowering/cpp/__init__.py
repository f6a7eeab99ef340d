"""Provider ``cpp``: C++ templates for CPU, with the activation quantized in the GEMM's prologue."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem, No, Provider, register_provider
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

FLOATS = ("bfloat16", "float16", "float32")
FORMATS = ("mxfp4",)
OPS = ("fp8_gemm", "fp8_prologue_gemm", "block_gemm", "block_prologue_gemm")


@register_provider
class Cpp(Provider):
    """Kernels on any CPU, fast ones with AVX512-VNNI. Weights are read in the checkpoint's layout."""

    name = "cpp"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """Any M and N; K a multiple of 32 for MX formats."""
        if target.device_type != "cpu":
            return No(f"makes CPU kernels, the device is {target.device_type}")
        if problem.op not in OPS:
            return No(f"has no kernel for {problem.op}; it has {', '.join(OPS)}")
        if problem.dtype not in FLOATS:
            return No(f"the result's dtype is {problem.dtype}; it makes {', '.join(FLOATS)}")
        if problem.op.startswith("block_"):
            if unknown := [f for f in problem.formats if f not in FORMATS]:
                return No(f"has no kernel for {unknown[0]}; it has {', '.join(FORMATS)}")
            if problem.k % BLOCK_FORMATS["mxfp4"].size:
                return No(f"K = {problem.k} is not a multiple of {BLOCK_FORMATS['mxfp4'].size}")
        return None

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """See :class:`Provider`."""
        from quark_inductor.lowering.cpp.template import lower

        return lower(target, problem, args)
