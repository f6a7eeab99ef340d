"""Inductor IR of a fused GEMM as a Triton kernel."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from quark_inductor.lowering._inductor import (
    SymbolicGridFn,
    TritonTemplate,
    V,
    add,
    config,
    expand,
    ir,
    realized_inputs,
    select_choice,
    sum_,
    timed,
    to_dtype,
)
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton import grouped, whole
from quark_inductor.lowering.triton.chips import CHIPS
from quark_inductor.lowering.triton.forms import form_of
from quark_inductor.lowering.triton.source import kernel
from quark_inductor.lowering.triton.tiles import Tile, tiles_for
from quark_inductor.lowering.triton.weight import Strides
from quark_inductor.schemes.ops import dtype_of


@SymbolicGridFn
def _grid(*sizes_and_meta: Any, cdiv: Any) -> tuple[Any, Any, int]:
    *parts, m, n, meta = sizes_and_meta
    return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), *(parts or [1]), 1


_grid_of_experts = SymbolicGridFn(grouped.grid)


@functools.cache
def _template(op: str, source: str, grid: Any) -> Any:
    # Inductor wants a name of its own for each source.
    name = f"quark_{op}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return TritonTemplate(name=name, grid=grid, source=source, cache_codegen_enabled_for_template=True)


def _add(acc: Any, bias: Any) -> Any:
    return V.ops.add(acc, bias)


def lower(target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
    """Inductor IR of a fused op as a call of a kernel, or two where K is split."""
    chip = CHIPS[target.arch]
    tensors = {name: a for name, a in args.items() if a is not None and not isinstance(a, str | int)}
    # Of an expert it is an argument of the kernel, else of what follows it.
    bias = None if problem.grouped else tensors.pop("bias", None)
    integers = problem.weight_format in ("int8", "uint8")
    strided = ("weight_scale", "weight_zero_point", "weight") if integers else ()
    inputs = dict(zip(tensors, realized_inputs(tensors, strided), strict=True))
    strides = _strides(inputs, problem.grouped)
    form = form_of(chip, problem)
    measures = bool(config.max_autotune or config.max_autotune_gemm)
    if problem.grouped and problem.m is None:
        measures = False  # nobody knows by which offsets
    tiles = tiles_for(chip, problem, form, most=measures)
    splits = tiles[0].parts > 1
    # A GEMM that quantizes is measured beside other ways, which give the result and no parts of it.
    has_other_ways = measures and problem.op == "prologue_gemm" and not problem.grouped
    if has_other_ways:
        tiles = [replace(tile, parts=1) for tile in tiles]
    size: list[Any] = [inputs["x"].get_size()[0], problem.n]
    device, dtype = inputs["x"].get_device(), dtype_of(problem.dtype)
    parts = tiles[0].parts
    layout = ir.FixedLayout(device, torch.float32, [parts, *size]) if parts > 1 else ir.FixedLayout(device, dtype, size)
    nodes, epilogue = list(inputs.values()), dict[str, Any]()
    if bias is not None and parts == 1:
        # Added before the sum is rounded.
        nodes += realized_inputs({"bias": expand(bias, size)}, ["bias"])
        epilogue = {"suffix_args": 1, "epilogue_fn": _add, "epilogue_fn_hash": "add"}
    choices: list[Any] = []
    for tile in tiles:
        source = kernel(problem, form, tile, strides, tuple(inputs))
        template = _template(problem.op, source, _grid_of_experts if problem.grouped else _grid)
        constants = _constants(problem, tile)
        with timed(f"render.quark_{problem.op}"):
            error = template.maybe_append_choice(choices, input_nodes=nodes, layout=layout, **constants, **epilogue)
        if error is not None:
            raise error
    if has_other_ways:
        names = [*inputs, *(["bias"] if len(nodes) > len(inputs) else [])]
        choices += whole.choices(target, problem, dict(zip(names, nodes, strict=True)), layout, splits)
    made = None
    if measures and problem.grouped:
        made = {[*inputs].index("offsets"): lambda node: grouped.some_offsets(problem).to(device)}
    y = select_choice(f"quark_{problem.op}", choices, nodes, layout, made)
    if parts == 1:
        return y
    total = sum_(y, [0])
    return to_dtype(total if bias is None else add(total, to_dtype(bias, torch.float32)), dtype)


def _constants(problem: GemmProblem, tile: Tile) -> dict[str, Any]:
    steps = problem.k // tile.k
    return {
        **({"EXPERTS": problem.experts} if problem.grouped else {}),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": 8,
        "STEPS_A_PART": -(-steps // tile.parts),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _strides(inputs: Mapping[str, Any], of_experts: bool) -> Strides:
    def of(name: str) -> tuple[int, ...]:
        return tuple(int(step) for step in inputs[name].get_stride()[of_experts:]) if name in inputs else ()

    rows, columns = of("weight")
    return Strides(
        rows=rows,
        columns=columns,
        scale=of("weight_scale"),
        zero_point=of("weight_zero_point"),
        experts=grouped.steps_of(inputs) if of_experts else {},
    )
