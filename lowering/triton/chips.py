"""What the chips that Triton makes code for have, as far as kernels are chosen by it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One architecture.

    Attributes:
        name: as :class:`quark_inductor.lowering.target.Target` spells it.
        processors: multiprocessors, or compute units, of its largest card.
        shared: bytes of shared memory a program may have.
        warp: threads a warp.
        has_fp8: Triton has FP8 dtypes for it.
        fp8: the FP8 formats that its matrix instructions take.
        mx: it multiplies codes by blocks of 32 under E8M0 scales.
        nvfp4: and FP4 codes by blocks of 16 under E4M3 scales.
        mixes_elements: and operands whose elements differ.
        packed_products: it multiplies pairs of bfloat16 numbers.
        ptx: it runs PTX, of compute capability 8.0 or newer.
        rounds_bfloat16: it rounds float32 to bfloat16 in one instruction.
        converts_fp8: it converts the formats of OCP to other dtypes and back.
        wants_scales: each operand needs scales.
        block_scaled_columns: K must be a multiple of this for block-scaled instructions.
        turns_weights: the kinds of :class:`~quark_inductor.lowering.triton.forms.Form` in which tiles of weights are
            turned as they are loaded, not afterwards.
        orders_blocks: tiles of blocks are multiplied in an order in which a lane's scales are neighbours.
        left_rows: the least rows of the left operand, for the instructions of a group of warps; with fewer tokens
            operands are swapped. 0: any.
    """

    name: str
    processors: int
    shared: int
    warp: int = 32
    has_fp8: bool = True
    fp8: tuple[str, ...] = ()
    mx: bool = False
    nvfp4: bool = False
    mixes_elements: bool = True
    packed_products: bool = True
    ptx: bool = True
    rounds_bfloat16: bool = True
    converts_fp8: bool = True
    wants_scales: bool = False
    block_scaled_columns: int = 64
    turns_weights: tuple[str, ...] = ()
    orders_blocks: bool = False
    left_rows: int = 0


_OCP = ("fp8_e4m3", "fp8_e5m2")

# Shared memory: AMD's ISA documents (LDS of a workgroup) and the CUDA C++ Programming Guide (of a thread block).
_CHIPS = (
    Chip(
        name="gfx942",
        processors=304,
        shared=65536,
        warp=64,
        fp8=("fp8_e4m3fnuz",),
        packed_products=False,
        ptx=False,
        rounds_bfloat16=False,
        converts_fp8=False,
        turns_weights=("fp8", "int8"),
    ),
    Chip(
        name="gfx950",
        processors=256,
        shared=163840,
        warp=64,
        fp8=_OCP,
        mx=True,
        packed_products=False,
        ptx=False,
        turns_weights=("block_scaled",),
        orders_blocks=True,
    ),
    Chip(
        name="gfx1100",
        processors=96,
        shared=65536,
        packed_products=False,
        ptx=False,
        rounds_bfloat16=False,
        converts_fp8=False,
    ),
    Chip(name="sm_80", processors=108, shared=166912, has_fp8=False),
    Chip(name="sm_89", processors=142, shared=101376, fp8=_OCP),
    Chip(name="sm_90", processors=132, shared=232448, fp8=_OCP, left_rows=64),
    Chip(name="sm_100", processors=148, shared=232448, fp8=_OCP, mx=True, nvfp4=True, wants_scales=True, left_rows=128),
    Chip(
        name="sm_120",
        processors=188,
        shared=101376,
        fp8=_OCP,
        mx=True,
        nvfp4=True,
        mixes_elements=False,
        wants_scales=True,
    ),
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _CHIPS}
