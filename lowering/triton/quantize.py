"""The Triton source of a quantize to a block format, as a template of Inductor's.

Blocks are neighbours in memory, whatever the shape: a program takes so many of them, reads each number once, and
writes codes and scales. Of plain aten Inductor makes two kernels (torch 2.11 and 2.13): it stores elements, and packs
them in the next.
"""

from quark_inductor.lowering.base import no_rule
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton.chips import CHIPS
from quark_inductor.lowering.triton.operand import FLOATS, MAX_EXPONENT, MINIFLOATS
from quark_inductor.lowering.triton.source import functions
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

# Bits of the elements that are packed.
_BITS = {"fp4": 4, "fp6_e2m3": 6, "fp6_e3m2": 6}
# A program reads 4 KiB of bfloat16, two loads of 16 bytes a thread on AMD and four on NVIDIA: enough in flight, enough
# programs for few tokens, and what a block costs is shared by 16 or 32 numbers of a thread.
ELEMENTS = 2048
WARPS = 2


def refuse(target: Target, format: str, scale_rule: str, dtype: str, k: int | None) -> str | None:
    """``None`` if there is a kernel that is worth it, else why not.

    Args:
        target: where it would run.
        format: of a block.
        scale_rule: how scales are computed.
        dtype: bare name of the dtype of ``x [..., K]``.
        k: ``None`` if it is not known before run time.
    """
    if target.device_type != "cuda" or target.arch not in CHIPS:
        return f"knows {', '.join(CHIPS)}, the device is {target}"
    f = BLOCK_FORMATS[format]
    if f.element not in _BITS:
        return f"elements of {format} are not packed: Inductor's own kernel quantizes, together with what is before it"
    if scale_rule not in ("even", "nearest", "sequential", "combined"):
        return no_rule(scale_rule)
    if f.scale == "e4m3" and not CHIPS[target.arch].has_fp8:
        return "Triton has no FP8 on this chip"
    if dtype not in FLOATS:
        return f"quantizes {', '.join(FLOATS)}, not {dtype}"
    if k is None:
        return "K is not known before run time"
    return None


def constants(format: str) -> dict[str, int]:
    """Values of the names in :func:`source`, and the options of its compiler."""
    return {"BLOCKS": ELEMENTS // BLOCK_FORMATS[format].size, "num_warps": WARPS, "num_stages": 1}


def source(format: str, scale_rule: str, dtype: str) -> str:
    """The source of a kernel, for ``TritonTemplate``: it returns scales ``[blocks]``, and writes the codes.

    Scales, and codes of blocks whose scale is a number, are bit for bit those of
    :func:`quark_inductor.schemes.numerics.block.quantize`.

    Args:
        format: one with packed elements.
        scale_rule: one of the format's that takes no logarithm.
        dtype: bare name of the dtype of ``x``.
    """
    f = BLOCK_FORMATS[format]
    names = ["X", "CODES", *["GLOBAL_SCALE"] * f.has_global_scale]
    lines = [*_scale(f.element, f.scale, scale_rule, FLOATS[dtype]), *_codes(f.element)]
    body = _HEAD.format(names=", ".join(f'"{name}"' for name in names), size=f.size)
    body += "".join(f"    {line}\n" for line in lines)
    store = '    {{store_output(("block",), "scale", "inside", val_shape=("BLOCKS",))}}\n'
    return body + store + functions(body)


_HEAD = """{{{{def_kernel({names})}}}}
    SIZE: tl.constexpr = {size}
    block = tl.program_id(0).to(INDEX_DTYPE) * BLOCKS + tl.arange(0, BLOCKS).to(INDEX_DTYPE)
    inside = block < {{{{size(None, 0)}}}}
    element = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(X + element, inside[:, None], other=0.0).to(tl.float32)
    amax = amax_bits(x, 1)
"""


def _scale(element: str, scale: str, rule: str, dtype: str) -> list[str]:
    """Lines that leave the scales in ``scale``, and the elements divided by them in ``x``."""
    if scale == "e8m0":
        return [
            f"scale = scale_even(amax, {MINIFLOATS[element][0]}, {MAX_EXPONENT[element]})",
            "x = x * inverse_e8m0(scale)[:, None]",
            "scale = scale.to(tl.uint8)",
        ]
    if scale == "e5m3":
        lines = [f"scale = scale_nearest(amax, {dtype}).to(tl.uint8)", "multiplier = or_eps(e5m3(scale))"]
    else:
        lines = [
            "global_scale = tl.load(GLOBAL_SCALE).to(tl.float32)",
            f"scale = scale_e4m3(amax, global_scale, {rule == 'sequential'})",
            "multiplier = or_eps(scale.to(tl.float32) * global_scale)",
        ]
    return [*lines, "x = divide(x, multiplier[:, None])"]


def _codes(element: str) -> list[str]:
    """Lines that store the packed codes of ``x``."""
    mantissa, smallest, largest = MINIFLOATS[element]
    codes = f"encode_small(x, {_BITS[element]}, {mantissa}, {smallest}, {largest})"
    if element == "fp4":
        return [
            f"codes = pack_fp4({codes}, BLOCKS, SIZE).to(tl.uint8)",
            "byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]",
            "tl.store(CODES + byte, codes, inside[:, None])",
        ]
    return [
        f"low, middle, high = pack_fp6({codes}, BLOCKS, SIZE)",
        "byte = (block[:, None] * (SIZE // 4) + tl.arange(0, SIZE // 4)[None, :]) * 3",
        "tl.store(CODES + byte, low, inside[:, None])",
        "tl.store(CODES + byte + 1, middle, inside[:, None])",
        "tl.store(CODES + byte + 2, high, inside[:, None])",
    ]
