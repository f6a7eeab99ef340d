"""Provider ``aiter``: the GEMMs of AMD's AITER, on gfx942 and gfx950, where that library is installed.

AITER (https://github.com/ROCm/aiter, distributed as ``amd-aiter``) is looked for by its files and imported when a
kernel first runs; the package ``aiter`` on PyPI is somebody else's. Each GEMM is an op of this package around AITER's
wrapper: the ops that AITER registers claim to write all that they read, and other wrappers are plain Python.

Most are Triton's. On gfx950 MXFP4 by MXFP4 also has an assembler kernel and Triton ones that read codes and scales in
one and the same shuffled order: :class:`Aiter16x16`, the layout of such weights where AITER has all three.

Experts, MXFP4 by MXFP4 and FP8 by FP8 in blocks, are multiplied by AITER's Triton kernels for mixtures of experts,
which read weights and scales as a checkpoint has them: none is shuffled. Sources: AITER at 2038b2df,
``aiter/ops/triton/moe: moe_op_mxfp4.py, moe_op.py``, their kernels in ``_triton_kernels/moe``, and
``op_tests/triton_tests/moe: test_moe.py, test_moe_mx.py``, which say what the arguments are.
"""

import ast
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import GemmProblem, No, Provider, no_dtype, register_provider, tokens
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.layout import Layout, Stored, register_layout
from quark_inductor.schemes.ops import NAMESPACE, dtype_of, lib

# What runs where. FP4 has no instructions before gfx950; the FP8 of gfx942 is "fnuz".
ARCHS: Mapping[str, tuple[str, ...]] = {
    "gemm_afp4wfp4": ("gfx950",),
    "gemm_a16wfp4": ("gfx950",),
    "gemm_a8wfp4": ("gfx950",),
    "gemm_a8w8": ("gfx942", "gfx950"),
    "gemm_a8w8_blockscale": ("gfx942", "gfx950"),
    "gemm_a4w4": ("gfx950",),
    "gemm_afp4wfp4_preshuffle": ("gfx950",),
    "gemm_a16wfp4_preshuffle": ("gfx950",),
    "fused_moe_mxfp4": ("gfx950",),
    "fused_moe": ("gfx942", "gfx950"),
}
# Those that read a packed weight: their module in ``aiter.ops``, and an argument that older versions do not have.
PACKED: Mapping[str, tuple[str, str]] = {
    "gemm_a4w4": ("gemm_op_a4w4", "dtype"),
    "gemm_afp4wfp4_preshuffle": ("triton.gemm.basic.gemm_afp4wfp4", "skip_reduce"),
    "gemm_a16wfp4_preshuffle": ("triton.gemm.basic.gemm_a16wfp4", "prequant"),
}
# Those of experts: their module in ``aiter.ops.triton.moe``, older versions have it one folder up, and what they take.
_ROUTED = "topk_weights topk_ids sorted_token_ids expert_ids num_tokens_post_padded mul_routed_weight top_k"
GROUPED: Mapping[str, tuple[str, str]] = {
    "fused_moe_mxfp4": (
        "moe_op_mxfp4",
        f"A B C A_scale B_scale A_mx_scale B_mx_scale {_ROUTED} swizzle_mx_a swizzle_mx_b config compute_type",
    ),
    "fused_moe": (
        "moe_op",
        f"A B C A_scale B_scale B_zp {_ROUTED} compute_type use_fp8_w8a8 use_int8_w8a16 use_int4_w4a16 "
        "block_shape config",
    ),
}
# What chooses their tiles: its argument that names their formats.
_TILES = "utils.moe_config_utils"
_TILES_FOR: Mapping[str, str] = {"fused_moe_mxfp4": "use_mxfp4", "fused_moe": "use_fp8_w8a8"}
FP8: Mapping[str, str] = {"gfx942": "fp8_e4m3fnuz", "gfx950": "fp8_e4m3"}
# The most tokens that a GEMM quantizes itself: each of its tiles along N does it again. Not measured.
FEW_TOKENS = 64
_URL = "https://github.com/ROCm/aiter"
# Newer first: there the former are aliases.
_FOLDERS = ("gemm/basic", "")
# The tiles of gemm_a4w4 are multiples of it wide and have no ragged edge along N; blocks of scales are 8 wide.
_N, _K = 128, 256


# --- what is installed


@functools.cache
def modules() -> Mapping[str, str] | No:
    """The module of each GEMM that the installed AITER has, found without importing it; or why there is none."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        return No(f"AITER is not installed: see {_URL}")
    for location in spec.submodule_search_locations or ():
        root = Path(location, "ops", "triton")
        if root.is_dir():
            found = {}
            for name in ARCHS.keys() - PACKED.keys() - GROUPED.keys():
                folder = next((f for f in _FOLDERS if (root / f / f"{name}.py").is_file()), None)
                if folder is not None:
                    found[name] = ".".join(("aiter", "ops", "triton", *folder.split("/"), name)).replace("..", ".")
            for name, (module, argument) in PACKED.items():
                if _takes(_file(Path(location, "ops"), module), name, argument) and (
                    name != "gemm_a4w4" or os.environ.get(_TRITON_ONLY) != "1"
                ):
                    found[name] = f"aiter.ops.{module}"
            for name, (module, arguments) in GROUPED.items():
                for where in (f"moe.{module}", module):
                    if _gives(_file(root, where), name, arguments.split()) and _takes(
                        _file(root, _TILES), "get_optimal_moe_config_func", _TILES_FOR[name]
                    ):
                        found.setdefault(name, f"aiter.ops.triton.{where}")
            return {name: found[name] for name in ARCHS if name in found}
    return No(f"the package aiter that is installed is not AMD's: see {_URL}")


_TRITON_ONLY = "AITER_TRITON_ONLY"


def _file(folder: Path, module: str) -> Path:
    return folder.joinpath(*module.split(".")).with_suffix(".py")


def _defined(file: Path, function: str) -> list[ast.arguments]:
    """The arguments of each function of a name that a file defines: one, if it does."""
    body = ast.parse(file.read_bytes()).body if file.is_file() else []
    return [d.args for d in body if isinstance(d, ast.FunctionDef) and d.name == function]


def _takes(file: Path, function: str, argument: str) -> bool:
    """Whether a file defines a function that has an argument."""
    return any(argument == a.arg for d in _defined(file, function) for a in d.args)


def _gives(file: Path, function: str, arguments: Sequence[str]) -> bool:
    """Whether a file defines a function that is called with these arguments, by place, and needs no other."""
    return any(
        [a.arg for a in d.args[: len(arguments)]] == list(arguments)
        and len(d.args) - len(d.defaults) <= len(arguments)
        and None not in d.kw_defaults
        for d in _defined(file, function)
    )


def _lacks(name: str) -> str:
    """Why a function that :func:`modules` has not found is not there."""
    if name in GROUPED:
        spec = importlib.util.find_spec("aiter")
        for location in (spec and spec.submodule_search_locations) or ():
            for where in (f"moe.{GROUPED[name][0]}", GROUPED[name][0]):
                if _defined(_file(Path(location, "ops", "triton"), where), name):
                    return f"{name} of the AITER that is installed, or what chooses its tiles, takes other arguments"
    return f"the AITER that is installed has no {name}"


def _function(name: str) -> Callable[..., Any]:
    found = modules()
    reason = found.reason if isinstance(found, No) else f"{_lacks(name)}: see {_URL}"
    if isinstance(found, No) or name not in found:
        raise QuarkInductorError(f"quark_inductor::aiter_{name} runs a function of AITER's; {reason}")
    function: Callable[..., Any] = getattr(importlib.import_module(found[name]), name)
    return function


# --- the ops


def gemm_afp4wfp4(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: str) -> Tensor:
    """MXFP4 by MXFP4: ``[M, N]`` in ``out_dtype``, bfloat16 or float16, of sums in float32.

    Args:
        x: uint8 ``[M, K / 2]``, element 2i low.
        x_scale: E8M0 in uint8 ``[M, K / 32]``.
        weight: uint8 ``[N, K / 2]``.
        weight_scale: uint8 ``[N, K / 32]``.
        out_dtype: dtype of the result.
    """
    y: Tensor = _function("gemm_afp4wfp4")(x, weight, x_scale, weight_scale, dtype=dtype_of(out_dtype))
    return y


def gemm_a16wfp4(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """:func:`gemm_afp4wfp4` of an ``x [M, K]`` in bfloat16 or float16, quantized by rule "even" inside.

    The result has its dtype. Scales and codes are those of :func:`.numerics.block.quantize`, but that the maximum of a
    block ignores NaN.
    """
    y: Tensor = _function("gemm_a16wfp4")(x, weight, weight_scale, dtype=x.dtype)
    return y


def gemm_a8wfp4(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: str) -> Tensor:
    """FP8 by MXFP4: ``[M, N]``.

    Args:
        x: float8_e4m3fn ``[M, K]``.
        x_scale: float32 ``[M, 1]``.
        weight: uint8 ``[N, K / 2]``.
        weight_scale: uint8 ``[N, K / 32]``.
        out_dtype: dtype of the result, bfloat16 or float16.
    """
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype_of(out_dtype))
    # It writes y, which has no default, and returns None.
    _function("gemm_a8wfp4")(x, weight, y, x_scale, weight_scale, dtype=y.dtype)
    return y


def gemm_a8w8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: str
) -> Tensor:
    """8 bits by 8 bits: ``[M, N]``.

    Args:
        x: int8, or the FP8 of the architecture, ``[M, K]``.
        x_scale: float32 ``[M, 1]``.
        weight: in the dtype of ``x``, ``[N, K]``.
        weight_scale: float32 ``[1, N]``.
        bias: ``[N]`` in ``out_dtype``, to which the sum is rounded before.
        out_dtype: dtype of the result, bfloat16 or float16.
    """
    y: Tensor = _function("gemm_a8w8")(x, weight, x_scale, weight_scale, bias=bias, dtype=dtype_of(out_dtype))
    return y


def gemm_a8w8_blockscale(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: str) -> Tensor:
    """FP8 by FP8 with scales of 1x128 and 128x128 blocks: ``[M, N]``.

    Args:
        x: the FP8 of the architecture, ``[M, K]``.
        x_scale: float32 ``[M, K / 128]``.
        weight: in the dtype of ``x``, ``[N, K]``.
        weight_scale: float32 ``[ceil(N / 128), K / 128]``.
        out_dtype: dtype of the result, bfloat16 or float16.
    """
    y: Tensor = _function("gemm_a8w8_blockscale")(x, weight, x_scale, weight_scale, dtype=dtype_of(out_dtype))
    return y


def gemm_a4w4(x: Tensor, x_scale: Tensor, packed: Tensor, n: int, out_dtype: str) -> Tensor:
    """:func:`gemm_afp4wfp4` by a weight in the layout :class:`Aiter16x16`, in assembler: ``[M, n]``.

    Args:
        x: uint8 ``[M, K / 2]``.
        x_scale: uint8 ``[M, K / 32]``.
        packed: the weight ``[n, K]`` and its scales.
        n: output features.
        out_dtype: ``"bfloat16"``.
    """
    function = _function("gemm_a4w4")
    dtypes = importlib.import_module("aiter.utility.dtypes")
    codes, scales = _parts(packed, n, x.shape[1])
    # It insists on these dtypes. A bias it gives to some of its kernels only.
    y: Tensor = function(
        *(t.view(dtypes.fp4x2) for t in (x, codes)),
        *(t.view(dtypes.fp8_e8m0) for t in (shuffle_scale(x_scale), scales)),
        dtype=dtype_of(out_dtype),
        bpreshuffle=True,
    )
    return y


def gemm_afp4wfp4_preshuffle(x: Tensor, x_scale: Tensor, packed: Tensor, n: int, out_dtype: str) -> Tensor:
    """:func:`gemm_a4w4` in Triton, with results in bfloat16 or float16."""
    codes, scales = _panels(packed, n, x.shape[1])
    # It reads those of less than 32 rows as they are.
    x_scales = x_scale if x.shape[0] < 32 else shuffle_scale(x_scale).view(-1, 2 * x.shape[1])
    y: Tensor = _function("gemm_afp4wfp4_preshuffle")(x, codes, x_scales, scales, dtype=dtype_of(out_dtype))
    return y


def gemm_a16wfp4_preshuffle(x: Tensor, packed: Tensor, n: int) -> Tensor:
    """:func:`gemm_a16wfp4` by a weight in the layout :class:`Aiter16x16`."""
    codes, scales = _panels(packed, n, x.shape[1] // 2)
    y: Tensor = _function("gemm_a16wfp4_preshuffle")(x, codes, scales, prequant=True, dtype=x.dtype)
    return y


def fused_moe_mxfp4(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, out_dtype: str
) -> Tensor:
    """:func:`gemm_afp4wfp4` of experts: ``[S, N]`` in ``out_dtype``, bfloat16, float16 or float32.

    Args:
        x: uint8 ``[S, K / 2]``, the rows of the first expert, then those of the second, and so on.
        x_scale: uint8 ``[S, K / 32]``.
        weight: uint8 ``[E, N, K / 2]``.
        weight_scale: uint8 ``[E, N, K / 32]``.
        offsets: int32 ``[E]``, where each expert's rows end. Rows from the last on are nobody's, and give zeros.
        out_dtype: dtype of the result.
    """
    # Of a row past the last, which fills a block, it reads the scales.
    x_scale = torch.nn.functional.pad(x_scale, (0, 0, 0, 1))
    ones = torch.ones(weight.shape[0], dtype=torch.float32, device=x.device)

    def run(y: Tensor, routed: tuple[Any, ...], config: dict[str, Any], to: Any) -> None:
        scales = ones[:1], ones, x_scale, weight_scale
        _function("fused_moe_mxfp4")(x, weight, y, *scales, *routed, False, False, config, to)

    return _of_experts("fused_moe_mxfp4", x, weight, offsets, out_dtype, run)


def fused_moe(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, out_dtype: str
) -> Tensor:
    """:func:`gemm_a8w8_blockscale` of experts: ``[S, N]``, see :func:`fused_moe_mxfp4`.

    Args:
        x: the FP8 of the architecture, ``[S, K]``.
        x_scale: float32 ``[S, K / 128]``.
        weight: in the dtype of ``x``, ``[E, N, K]``.
        weight_scale: float32 ``[E, ceil(N / 128), K / 128]``.
        offsets: int32 ``[E]``.
        out_dtype: dtype of the result.
    """

    def run(y: Tensor, routed: tuple[Any, ...], config: dict[str, Any], to: Any) -> None:
        # It scales what it has multiplied of a row at once, which must lie in one block.
        config["BLOCK_SIZE_K"] = min(config["BLOCK_SIZE_K"], _BLOCK)
        flags, blocks = (True, False, False), [_BLOCK, _BLOCK]
        _function("fused_moe")(x, weight, y, x_scale, weight_scale, None, *routed, to, *flags, blocks, config)

    return _of_experts("fused_moe", x, weight, offsets, out_dtype, run)


def _of_experts(
    name: str,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    out_dtype: str,
    run: Callable[[Tensor, tuple[Any, ...], dict[str, Any], Any], None],
) -> Tensor:
    """``[S, N]`` that one of :data:`GROUPED` writes, which ``run`` calls: each row has one expert, and no weight."""
    rows, (_, n, columns) = x.shape[0], weight.shape
    y = x.new_empty((rows, 1, n), dtype=dtype_of(out_dtype))
    if rows == 0:
        return y.squeeze(1)
    _function(name)  # or an error that says what is missing
    tiles = importlib.import_module(f"aiter.ops.triton.{_TILES}").get_optimal_moe_config_func
    config = dict(tiles(torch.bfloat16, **{_TILES_FOR[name]: True})(rows))
    # It multiplies a row's place by its length in the dtype of the places.
    places = torch.int32 if rows * max(n, columns) < 2**31 else torch.int64
    ids, experts, count = expert_blocks(offsets, rows, config["BLOCK_SIZE_M"])
    # Of the experts of each row only how many there are is read, and nothing of their weights.
    of_row = torch.empty((rows, 1), dtype=torch.float32, device=x.device), x.new_empty((rows, 1), dtype=torch.int32)
    to = getattr(importlib.import_module("triton.language"), out_dtype)
    run(y, (*of_row, ids.to(places), experts, count, False, 1), config, to)
    return y.squeeze(1)


def expert_blocks(offsets: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in blocks of one expert each, as the functions of :data:`GROUPED` want them; nothing is read by the host.

    Args:
        offsets: int32 ``[E]``, where each expert's rows end.
        rows: S, at least 1. Those from the last offset on are nobody's.
        block: rows in a block.

    Returns:
        ``sorted_token_ids``, int32 ``[B * block]``: rows, and S where a block is not full; ``expert_ids``, int32
        ``[B]``: -1 for a block of nobody's rows, of which those functions write zeros; and ``num_tokens_post_padded``,
        int32 ``[1]``: how many of the ids count. B is the most blocks that S rows can be.
    """
    experts = offsets.shape[0]
    groups = min(experts + 1, rows)  # those that can have rows
    most = (rows + groups * (block - 1)) // block
    number = torch.arange(most, dtype=torch.int32, device=offsets.device)
    begins = torch.nn.functional.pad(offsets, (1, 0))
    ends = torch.nn.functional.pad(offsets, (0, 1), value=rows)
    blocks = (ends - begins + (block - 1)) // block
    last = blocks.cumsum(0, dtype=torch.int32)
    # Past the last block there are more of nobody, of no rows.
    group = torch.searchsorted(last, number, right=True).clamp(max=experts)
    first = begins[group] + (number - (last - blocks)[group]) * block
    row = first.unsqueeze(1) + torch.arange(block, dtype=torch.int32, device=offsets.device)
    ids = torch.where(row < ends[group].unsqueeze(1), row, rows)
    return ids.flatten(), torch.where(group < experts, group, -1).to(torch.int32), last[-1:] * block


def _fake(x: Tensor, weight: Tensor, out_dtype: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype_of(out_dtype))


def _register(eager: Callable[..., Tensor], arguments: str, fake: Callable[..., Tensor]) -> None:
    name = f"aiter_{eager.__name__}"
    lib.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)


_OPERANDS = "Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale"
for _gemm in (gemm_afp4wfp4, gemm_a8wfp4, gemm_a8w8_blockscale):
    _register(
        _gemm,
        f"{_OPERANDS}, str out_dtype",
        lambda x, x_scale, weight, weight_scale, out_dtype: _fake(x, weight, out_dtype),
    )
for _gemm_of_experts in (fused_moe_mxfp4, fused_moe):
    _register(
        _gemm_of_experts,
        f"{_OPERANDS}, Tensor offsets, str out_dtype",
        lambda x, x_scale, weight, weight_scale, offsets, out_dtype: x.new_empty(
            (x.shape[0], weight.shape[1]), dtype=dtype_of(out_dtype)
        ),
    )
_register(
    gemm_a8w8,
    f"{_OPERANDS}, Tensor? bias, str out_dtype",
    lambda x, x_scale, weight, weight_scale, bias, out_dtype: _fake(x, weight, out_dtype),
)
_register(
    gemm_a16wfp4,
    "Tensor x, Tensor weight, Tensor weight_scale",
    lambda x, weight, weight_scale: x.new_empty((x.shape[0], weight.shape[0])),
)
for _gemm_of_packed in (gemm_a4w4, gemm_afp4wfp4_preshuffle):
    _register(
        _gemm_of_packed,
        "Tensor x, Tensor x_scale, Tensor packed, int n, str out_dtype",
        lambda x, x_scale, packed, n, out_dtype: x.new_empty((x.shape[0], n), dtype=dtype_of(out_dtype)),
    )
_register(
    gemm_a16wfp4_preshuffle,
    "Tensor x, Tensor packed, int n",
    lambda x, packed, n: x.new_empty((x.shape[0], n)),
)


# --- the provider


@register_provider
class Aiter(Provider):
    """See the module."""

    name = "aiter"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """What :data:`ARCHS` says, if the installed AITER has it; results in bfloat16 and float16."""
        if target.device_type != "cuda":
            return No(f"for GPUs, the device is {target.device_type}")
        if target.arch not in FP8:
            return No(f"runs on {', '.join(FP8)}, the device is {target.arch}")
        gemm = gemm_for(target, problem)
        if isinstance(gemm, No):
            return gemm
        if target.arch not in ARCHS[gemm]:
            return No(f"{gemm} runs on {', '.join(ARCHS[gemm])}, the device is {target.arch}")
        found = modules()
        if isinstance(found, No):
            return found
        return None if gemm in found else No(_lacks(gemm))

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """See :class:`Provider`."""
        from quark_inductor.lowering._inductor import called, contiguous, lowered, to_dtype

        gemm = gemm_for(target, problem)
        assert isinstance(gemm, str)
        aten, op = torch.ops.aten, getattr(torch.ops.quark_inductor, f"aiter_{gemm}").default

        def in_float32(name: str, shape: list[Any]) -> Any:
            scale = to_dtype(args[name], torch.float32)
            return scale if len(scale.get_size()) == 2 else lowered(aten.expand.default, scale, shape)

        x, x_scale, weight, weight_scale, bias = (
            args[name] for name in ("x", "x_scale", "weight", "weight_scale", "bias")
        )
        if problem.experts:
            if problem.x_format != "mxfp4":
                x_scale, weight_scale = (to_dtype(scale, torch.float32) for scale in (x_scale, weight_scale))
            operands = map(contiguous, (x, x_scale, weight, weight_scale, args["offsets"]))
            # So that the sum is rounded once, with its bias.
            y = called(op, *operands, problem.dtype if bias is None else "float32")
            return y if bias is None else _with_biases(y, bias, args["offsets"], dtype_of(problem.dtype))
        if problem.x_format != "mxfp4":
            x_scale = in_float32("x_scale", [x.get_size()[0], 1])
        if problem.layout:
            if gemm == "gemm_a16wfp4_preshuffle":
                y = called(op, contiguous(x), contiguous(weight), problem.n)
            else:
                y = called(op, *map(contiguous, (x, x_scale, weight)), problem.n, problem.dtype)
            return y if bias is None else lowered(aten.add.Tensor, y, bias)
        if problem.weight_format != "mxfp4":
            weight_scale = in_float32("weight_scale", [1, problem.n])
        if gemm == "gemm_a16wfp4":
            y = called(op, *map(contiguous, (x, weight, weight_scale)))
        else:
            operands = map(contiguous, (x, x_scale, weight, weight_scale))
            if gemm == "gemm_a8w8":
                return called(op, *operands, None if bias is None else contiguous(bias), problem.dtype)
            y = called(op, *operands, problem.dtype)
        return y if bias is None else lowered(aten.add.Tensor, y, bias)

    def found(self) -> tuple[str, ...]:
        """The functions that there are."""
        return () if isinstance(found := modules(), No) else tuple(found)


def _with_biases(y: Any, bias: Any, offsets: Any, dtype: torch.dtype) -> Any:
    """``y [S, N]`` plus the bias ``[E, N]`` of each row's expert, in float32; nobody's rows have none."""
    from quark_inductor.lowering._inductor import lowered, to_dtype

    aten, rows, experts = torch.ops.aten, y.get_size()[0], bias.get_size()[0]
    about = {"dtype": torch.int32, "device": y.get_device(), "requires_grad": False}
    row = lowered(torch.ops.prims.iota.default, rows, start=0, step=1, **about)
    expert = lowered(aten.searchsorted.Tensor, offsets, row, right=True)
    own = lowered(aten.index.Tensor, bias, [lowered(aten.clamp_max.default, expert, experts - 1)])
    biased = lowered(aten.add.Tensor, y, to_dtype(own, torch.float32))
    is_own = lowered(aten.unsqueeze.default, lowered(aten.lt.Scalar, expert, experts), 1)
    return to_dtype(lowered(aten.where.self, is_own, biased, y), dtype)


def gemm_for(target: Target, problem: GemmProblem) -> str | No:
    """The name of AITER's function for a problem on an architecture of :data:`FP8`, or why it has none."""
    if problem.layout not in ("", Aiter16x16.name) or (problem.layout and problem.experts):
        return No(
            f"has no kernel for {'experts in ' * bool(problem.experts)}the layout {problem.layout}, which unpack_() "
            "undoes"
        )
    if problem.experts and not problem.grouped:
        return No("has no kernel for experts of as many rows each")
    if problem.dtype not in ("bfloat16", "float16"):
        return No(no_dtype(problem, ("bfloat16", "float16")))
    if problem.zero_points:
        return No("has no kernel for zero points, whose values are not known when compiling")
    if problem.experts:
        return _gemm_of(target, problem)
    x, weight, fp8 = problem.x_format, problem.weight_format, FP8[target.arch]
    if problem.op == "prologue_gemm" and (x, problem.scale_rule, weight) == ("mxfp4", "even", "mxfp4"):
        if problem.m is None or problem.m > FEW_TOKENS:
            return No(f"quantizes up to {FEW_TOKENS} tokens in the GEMM, M is {tokens(problem.m)}")
        return "gemm_a16wfp4_preshuffle" if problem.layout else "gemm_a16wfp4"
    if problem.layout:
        if (problem.op, x, weight) != ("quantized_gemm", "mxfp4", "mxfp4"):
            return No(f"has no kernel for {problem} in the layout {problem.layout}, which unpack_() undoes")
        return "gemm_a4w4" if problem.dtype == "bfloat16" else "gemm_afp4wfp4_preshuffle"
    if problem.op == "quantized_gemm":
        if "fp8_e4m3" in x and x != fp8:
            return No(f"{target.arch} multiplies {fp8}, the activation is {x}")
        rows = problem.x_granularity != "per_group"
        if weight == "mxfp4" and (x == "mxfp4" or (x == fp8 and rows)):
            return "gemm_afp4wfp4" if x == "mxfp4" else "gemm_a8wfp4"
        if problem.rounds:
            return No("does not round operands, as emulate_precision_casts asks for: leave it out")
        if x == weight and x in (fp8, "int8") and rows and problem.weight_scale_ndim < 2:
            return "gemm_a8w8"
        if weight == f"{fp8}_128x128" and x == fp8 and problem.k % _BLOCK == 0:
            return _by_blocks(problem) or "gemm_a8w8_blockscale"
    return No(f"has no kernel for {problem}")


def _gemm_of(target: Target, problem: GemmProblem) -> str | No:
    """:func:`gemm_for` of experts, whose weights are not packed."""
    x, weight, fp8 = problem.x_format, problem.weight_format, FP8[target.arch]
    if problem.op == "quantized_gemm" and x == weight == "mxfp4":
        # Where a row has one scale, those of an expert lie side by side, and it reads whole tiles of them.
        return "fused_moe_mxfp4" if problem.k > 32 else No("reads scales past the last of experts where K is 32")
    if problem.op == "quantized_gemm" and weight == f"{x}_128x128" and problem.k % _BLOCK == 0:
        if x != fp8:
            return No(f"{target.arch} multiplies {fp8}, the activation is {x}")
        if problem.rounds:
            return No("does not round operands, as emulate_precision_casts asks for: leave it out")
        return _by_blocks(problem) or "fused_moe"
    return No(f"has no kernel for {problem}")


def _by_blocks(problem: GemmProblem) -> No | None:
    """Whether an activation's scales are of 128 elements."""
    # [M, 1] is also the shape of the scales of one block a row.
    group = problem.x_columns or (problem.k if problem.x_granularity == "per_token" else 0)
    return None if group == _BLOCK else No(f"scales {_BLOCK} elements of a row at a time")


_BLOCK = 128


# --- the layout


@register_layout
class Aiter16x16(Layout):
    """MXFP4 weights for MXFP4 activations: ``[N K / 2 + ceil(N / 256) 256 K / 32]`` bytes.

    First those of :func:`shuffle_weight`, then those of :func:`shuffle_scale`. The functions of :data:`PACKED` read the
    same bytes: AITER's ``e8m0_shuffle`` and its ``shuffle_scale_gemm`` differ in the padding of N only.
    """

    name = "aiter_16x16"
    device_type = "cuda"
    rows = 0
    experts = False

    def refuses(self, tensors: Sequence[Tensor], stored: Stored) -> str | None:
        """MXFP4 both, whole tiles, and an AITER that runs on such weights all that it runs on others."""
        if (stored.format, stored.activation) != ("mxfp4", "mxfp4"):
            return f"of weight and activation, {stored.format} and {stored.activation or 'a float'}, both must be mxfp4"
        n, k = stored.shape[0], 2 * stored.shape[1]
        if n % _N or k % _K:
            return f"its {n} x {k} elements are not made of tiles of {_N} x {_K}"
        if (arch := targets.current(self.device_type).arch) != "gfx950":
            return f"its kernels run on gfx950, the device is {arch}"
        found = modules()
        if isinstance(found, No):
            return found.reason
        missing = [name for name in PACKED if name not in found]
        return f"the AITER that is installed has no {', '.join(missing)}" if missing else None

    def pack(self, tensors: Sequence[Tensor], stored: Stored) -> Tensor:
        """See :class:`.Layout`."""
        codes, scales = tensors
        return torch.cat((shuffle_weight(codes).flatten(), shuffle_scale(scales).flatten()))

    def unpack(self, packed: Tensor, stored: Stored) -> list[Tensor]:
        """See :class:`.Layout`."""
        n, columns = stored.shape
        codes, scales = _parts(packed, n, columns)
        return [unshuffle_weight(codes), unshuffle_scale(scales, n, columns // 16)]


def _parts(packed: Tensor, n: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes ``[n, columns]``, two a byte, and scales ``[rows, columns / 16]``, of n rows and padding."""
    return packed[: n * columns].view(n, columns), packed[n * columns :].view(-1, columns // 16)


def _panels(packed: Tensor, n: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes and scales as AITER's Triton kernels take them: 16 and 32 rows in one."""
    codes, scales = _parts(packed, n, columns)
    return codes.view(n // 16, -1), scales[:n].view(n // 32, -1)


def shuffle_weight(weight: Tensor) -> Tensor:
    """A weight's bytes as those kernels read them: tiles of 16 rows by 32 bytes, in halves of 16 bytes.

    Args:
        weight: 8-bit ``[N, bytes]``, N a multiple of 16, bytes one of 32; FP4 has two elements a byte.

    Returns:
        The same shape and dtype. Source: AITER, ``aiter/ops/shuffle.py: shuffle_weight`` with the layout (16, 16).

    Raises:
        ValueError: the shape is not one of whole tiles.
    """
    n, k = weight.shape
    if n % 16 or k % 32:
        raise ValueError(f"a weight of {n} x {k} bytes is not made of tiles of 16 x 32")
    return weight.view(n // 16, 16, k // 32, 2, 16).permute(0, 2, 3, 1, 4).reshape(n, k)


def unshuffle_weight(shuffled: Tensor) -> Tensor:
    """The inverse of :func:`shuffle_weight`."""
    n, k = shuffled.shape
    return shuffled.view(n // 16, k // 32, 2, 16, 16).permute(0, 3, 1, 2, 4).reshape(n, k)


def shuffle_scale(scale: Tensor) -> Tensor:
    """E8M0 scales as those kernels read them: tiles of 32 rows by 8 blocks.

    Args:
        scale: uint8 ``[rows, blocks]``.

    Returns:
        uint8, both padded with 0 (that is 2^-127), to multiples of 256 and 8. Source: AITER,
        ``aiter/utility/fp4_utils.py: e8m0_shuffle``.
    """
    rows, blocks = scale.shape
    padded = torch.nn.functional.pad(scale, (0, -blocks % 8, 0, -rows % 256))
    rows, blocks = padded.shape
    return padded.view(rows // 32, 2, 16, blocks // 8, 2, 4).permute(0, 3, 5, 2, 4, 1).reshape(rows, blocks)


def unshuffle_scale(shuffled: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of :func:`shuffle_scale`, of as many rows and blocks as there were."""
    all_rows, all_blocks = shuffled.shape
    tiles = shuffled.view(all_rows // 32, all_blocks // 8, 4, 16, 2, 2)
    return tiles.permute(0, 5, 3, 1, 4, 2).reshape(all_rows, all_blocks)[:rows, :blocks]
