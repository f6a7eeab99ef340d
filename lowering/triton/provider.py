"""Provider ``triton``: templates for AMD and NVIDIA GPUs."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem, No, Provider, no_dtype, no_layout, no_rule, register_provider
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton import tiles
from quark_inductor.lowering.triton.chips import CHIPS, Chip
from quark_inductor.schemes.ops import FUSED_OPS

FLOATS = ("bfloat16", "float16", "float32")
# Not those that somebody else adds.
OPS = tuple(sorted(FUSED_OPS))


@register_provider
class Triton(Provider):
    """Kernels on any GPU that Triton supports; weights are read in the checkpoint's layout."""

    name = "triton"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """Any M but 0, any N; K a multiple of 16; every format that Triton has a dtype for on the chip."""
        if target.device_type != "cuda":
            return No(f"for GPUs, the device is {target.device_type}")
        if target.arch not in CHIPS:
            return No(f"does not know {target.arch}; it knows {', '.join(CHIPS)}")
        if problem.op not in OPS:
            return No(f"has no kernel for {problem.op}; it has {', '.join(OPS)}")
        if problem.dtype not in FLOATS:
            return No(no_dtype(problem, FLOATS))
        reason = refuse(CHIPS[target.arch], problem)
        return None if reason is None else No(reason)

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """See :class:`Provider`."""
        from quark_inductor.lowering.triton.template import lower

        return lower(target, problem, args)


def refuse(chip: Chip, problem: GemmProblem) -> str | None:
    """``None`` if there is a kernel for a problem, else why not."""
    if problem.m == 0:
        return "there are no rows"
    if problem.layout:
        return no_layout(problem)
    if problem.experts and not problem.grouped:
        return "has no kernel for experts"
    if problem.scale_rule in ("floor", "ceil"):
        return no_rule(problem.scale_rule)
    formats = f"{problem.x_format} {problem.weight_format}"
    if "fnuz" in formats and not any("fnuz" in format for format in chip.fp8):
        return "the chip has no FP8 of the kind fnuz"
    if not chip.has_fp8 and ("fp8" in formats or "nvfp4" in formats):
        return "Triton has no FP8 on this chip"
    return tiles.refuse(problem)
