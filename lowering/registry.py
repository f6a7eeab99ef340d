"""Imports every provider and tells Inductor how each fused op is lowered."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from quark_inductor.lowering import providers  # noqa: F401
from quark_inductor.lowering import target as targets
from quark_inductor.lowering._inductor import called, config, counters, register_lowering, static_size, timed
from quark_inductor.lowering.base import gemm_problem, select
from quark_inductor.lowering.quantize import PROVIDER as QUANTIZER
from quark_inductor.lowering.quantize import quantizes
from quark_inductor.schemes import ops
from quark_inductor.schemes.errors import QuarkInductorError

FUSED_OPS: tuple[Callable[..., Any], ...] = tuple(getattr(ops, name) for name in sorted(ops.FUSED_OPS))


def count_key(op: str, provider: str) -> str:
    """Key of ``torch._dynamo.utils.counters["inductor"]`` that counts kernels; a cache hit counts them too."""
    return f"quark.{op}.{provider}"


def kernel_counts() -> dict[str, int]:
    """Fused GEMMs compiled or taken from a cache so far in this process, by provider."""
    totals: Counter[str] = Counter()
    for key, count in counters["inductor"].items():
        kind, _, rest = key.partition(".")
        op, _, provider = rest.rpartition(".")
        if kind == "quark" and op in ops.FUSED_OPS:
            totals[provider] += count
    return dict(totals)


def _register_quantize() -> None:
    def lowering(x: Any, format: str, scale_rule: str, global_scale: Any = None) -> Any:
        target, k = targets.current(x.get_device().type), static_size(x.get_size()[-1])
        if quantizes(target, format, scale_rule, _dtype(x), k) is not None:
            # Not one of patterns/late_decomposition.py's: another backend compiles the op, and calls it.
            return called(torch.ops.quark_inductor.block_quantize.default, x, format, scale_rule, global_scale)
        from quark_inductor.lowering.triton.quantize_template import lower

        counters["inductor"][count_key("block_quantize", QUANTIZER)] += 1
        with timed(f"lower.{QUANTIZER}"):
            return lower(x, format, scale_rule, global_scale)

    register_lowering(torch.ops.quark_inductor.block_quantize.default, type_promotion_kind=None)(lowering)


def _shape(node: Any) -> list[int | None]:
    return [static_size(size) for size in node.get_size()]


def _dtype(node: Any) -> str:
    return ops.dtype_name(node.get_dtype())


def _register(fused: Callable[..., Any]) -> None:
    op, signature = fused.__name__, inspect.signature(fused)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        bound = dict(signature.bind(*args, **kwargs).arguments)
        target, problem = (
            targets.current(bound["x"].get_device().type),
            gemm_problem(op, bound, _shape, _dtype, bool(config.emulate_precision_casts)),
        )
        selection = select(target, problem)
        if selection.provider is None:
            # patterns/selection.py leaves no fused op without a provider, so this is one made by somebody else.
            raise QuarkInductorError(
                f"quark_inductor::{op} has no kernel on {target}: {'; '.join(selection.refusals)}. "
                "Call the scheme's emulation instead"
            )
        counters["inductor"][count_key(op, selection.provider.name)] += 1
        with timed(f"lower.{selection.provider.name}"):
            return selection.provider.lower(target, problem, bound)

    register_lowering(getattr(torch.ops.quark_inductor, op).default, type_promotion_kind=None)(lowering)


for _fused in FUSED_OPS:
    _register(_fused)
_register_quantize()
