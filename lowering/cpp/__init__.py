"""Provider ``cpp``: C++ templates for CPU, with the activation quantized in the GEMM's prologue."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem, No, Provider, no_dtype, register_provider
from quark_inductor.lowering.cpp import panel64  # noqa: F401
from quark_inductor.lowering.cpp.kernels import refuse
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.ops import FUSED_OPS

FLOATS = ("bfloat16", "float16", "float32")
# Not those that somebody else adds.
OPS = tuple(sorted(FUSED_OPS))


@register_provider
class Cpp(Provider):
    """Kernels on any CPU, fast ones with AVX512-VNNI for some formats. Weights are read in the checkpoint's layout."""

    name = "cpp"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """Any M and N, K a multiple of the block; every format but "fnuz", every scale rule but "floor" and "ceil"."""
        if target.device_type != "cpu":
            return No(f"makes CPU kernels, the device is {target.device_type}")
        if problem.op not in OPS:
            return No(f"has no kernel for {problem.op}; it has {', '.join(OPS)}")
        if problem.dtype not in FLOATS:
            return No(no_dtype(problem, FLOATS))
        reason = refuse(problem)
        return None if reason is None else No(reason)

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """See :class:`Provider`."""
        from quark_inductor.lowering.cpp.template import lower

        return lower(target, problem, args)
