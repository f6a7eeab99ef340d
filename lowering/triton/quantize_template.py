"""Inductor IR of a quantize to a block format as a Triton kernel."""

import functools
import hashlib
import math
from typing import Any

from quark_inductor.lowering._inductor import (
    SymbolicGridFn,
    TritonTemplate,
    empty,
    ir,
    realized_inputs,
    select_choice,
    timed,
    view,
)
from quark_inductor.lowering.triton.quantize import constants, source
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.ops import dtype_name


@SymbolicGridFn
def _grid(blocks: Any, meta: Any, *, cdiv: Any) -> tuple[Any, int, int]:
    return cdiv(blocks, meta["BLOCKS"]), 1, 1


@functools.cache
def _template(source: str) -> Any:
    # Inductor wants a name of its own for each source.
    name = f"quark_block_quantize_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return TritonTemplate(name=name, grid=_grid, source=source, cache_codegen_enabled_for_template=True)


def lower(x: Any, format: str, scale_rule: str, global_scale: Any | None) -> tuple[Any, Any]:
    """Inductor IR of codes and scales, as those of ``quark_inductor::block_quantize``."""
    f = BLOCK_FORMATS[format]
    *rows, k = x.get_size()
    k, device = int(k), x.get_device()
    given = {"x": x} if global_scale is None else {"x": x, "global_scale": global_scale}
    x, *rest = realized_inputs(given)
    # A template has one result: the other is a buffer that it is given, and writes.
    codes = empty([*rows, f.packed(k)], f.codes_dtype, device)
    nodes = [x, codes, *rest]
    layout = ir.FixedLayout(device, f.scales_dtype, [math.prod(rows) * (k // f.size)])
    choices: list[Any] = []
    template = _template(source(format, scale_rule, dtype_name(x.get_dtype())))
    with timed("render.quark_block_quantize"):
        error = template.maybe_append_choice(
            choices, input_nodes=nodes, layout=layout, mutated_inputs=[codes], **constants(format)
        )
    if error is not None:
        raise error
    scales = select_choice("quark_block_quantize", choices, nodes, layout)
    return codes, view(scales, [*rows, k // f.size])
