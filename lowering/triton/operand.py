"""What a kernel does for an operand, and lines of Triton that both operands have in common."""

from dataclasses import dataclass, field

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.triton.forms import Form
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

# Triton's names of dtypes; FP8 ones by the names of formats.
FLOATS = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}
FP8 = {"fp8_e4m3": "tl.float8e4nv", "fp8_e5m2": "tl.float8e5", "fp8_e4m3fnuz": "tl.float8e4b8"}
# Of elements: explicit mantissa bits, the smallest normal number's exponent, the largest number.
MINIFLOATS = {
    "fp4": (1, 0, 6.0),
    "fp6_e2m3": (3, 0, 7.5),
    "fp6_e3m2": (2, -2, 28.0),
    "fp8_e4m3": (3, -6, 448.0),
    "fp8_e5m2": (2, -14, 57344.0),
    "fp8_e4m3fnuz": (3, -7, 224.0),
}
# Exponents of the largest normal numbers.
MAX_EXPONENT = {"fp4": 2, "fp6_e2m3": 2, "fp6_e3m2": 4, "fp8_e4m3": 8, "fp8_e5m2": 15}


@dataclass(slots=True)
class Operand:
    """What a kernel does for one operand.

    Attributes:
        before: lines before the loop, or after it if it does not need them.
        scales: lines in the loop that load the scales of a block format.
        loop: lines in the loop, at column ``k``; they leave the tile in ``a`` or ``b``, or its pieces in ``a_0``, ...
        in_pieces: which of both.
        is_turned: the tile has a row for each column of the operand.
        scale: in the loop, the name of the scales of a block-scaled tile.
        factors: of the product's rows or columns, float32, applied after the loop.
        partial: of the product of one step, applied in the loop.
        partial_numbers: the same, but one number for each of so many equal parts of the tile's columns.
        zero: the zero points of rows or columns of integers, int32, that are not in the tile; ``""``: none.
    """

    before: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    loop: list[str] = field(default_factory=list)
    in_pieces: bool = False
    is_turned: bool = False
    scale: str = "None"
    factors: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    partial_numbers: list[str] = field(default_factory=list)
    zero: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """Names of one operand's things.

    Attributes:
        tile: the variable that the product reads.
        name: prefix of the variables before it.
        index: the variable with the rows.
        rows: how many there are in a tile.
        pointer: of the codes; with ``_SCALE`` that of the scales.
        stride: entries between two rows of codes.
    """

    tile: str
    name: str
    index: str
    rows: str
    pointer: str
    stride: str


def load_rows(side: Side, share: int = 1, step: int = 1, turned: bool = False) -> str:
    """A tile of a tensor that has an entry for so many columns of the operand; turned, it has a row for each."""
    return _load(side.pointer, side.index, side.stride, share, step, "load_columns" if turned else "load_rows")


def _load(pointer: str, rows: str, stride: str, share: int, last: int | str = 1, function: str = "load_rows") -> str:
    first, columns = ("k", "BLOCK_K") if share == 1 else (f"k // {share}", f"BLOCK_K // {share}")
    return f"{function}({pointer}, {rows}, {stride}, {first}, {columns}, {last})"


def names_of_pieces(tile: str, form: Form) -> str:
    """Variables with the pieces of a tile."""
    return ", ".join(f"{tile}_{i}" for i in range(form.pieces))


def load_words(side: Side, bits: int) -> str:
    """A tile of packed 4-bit codes, four to an int16, of a tensor whose entries have so many bits."""
    stride = f"({side.stride}) * {bits} // 16"
    return f"load_rows(as_words({side.pointer}), {side.index}, {stride}, k // 4, BLOCK_K // 4, 1)"


def block_codes(side: Side, operand: Operand, format: str, form: Form) -> None:
    """Load scales and codes of a block format: packed FP4, the numbers of FP6, FP8."""
    f = BLOCK_FORMATS[format]
    operand.is_turned = side.tile == "b" and form.turns and not f.element.startswith("fp6")
    if f.element == "fp4":
        codes = load_words(side, 8) if form.pieces == 4 else load_rows(side, 2, turned=operand.is_turned)
        if form.orders_blocks:
            function = "load_block_columns" if operand.is_turned else "load_block_rows"
            codes = _load(side.pointer, side.index, side.stride, 2, f"BLOCK_K // {f.size}", function)
    elif f.element.startswith("fp6"):
        bits = f"load_fp6({side.pointer}, {side.index}, {side.stride}, k, {side.rows}, BLOCK_K)"
        codes = f"{f.element.removeprefix('fp6_')}({bits})"
    else:
        codes = load_rows(side, turned=operand.is_turned)
    scales = _load(f"{side.pointer}_SCALE", side.index, f"(K // {f.size})", f.size)
    if form.orders_blocks:
        scales = f"block_scales({scales}, {side.rows}, BLOCK_K // {f.size})"
    operand.scales.append(f"{side.name}_scale = {scales}")
    operand.loop.append(f"{side.name} = {codes}")


def block_tile(side: Side, operand: Operand, problem: GemmProblem, form: Form, format: str, zero: float) -> None:
    """From :func:`block_codes` to what the form multiplies; ``zero``: what a scale of 0 stands for."""
    f, name = BLOCK_FORMATS[format], side.name
    if f.has_global_scale and not (problem.rounds and form.kind == "float"):
        operand.factors.append(f"{name}_global")
    if form.kind == "block_scaled":
        operand.loop.append(f"{side.tile} = {block_scaled_codes(side, form, f.element)}")
        operand.scale = f"{name}_scale"
        return
    if form.pieces > 1 and f.element == "fp4":
        packed = f", {form.packed_products}" if form.pieces == 2 else ", PTX"
        function = "fp4_halves" if form.pieces == 2 else "fp4_quarters"
        operand.in_pieces = True
        operand.loop.append(
            f"{names_of_pieces(side.tile, form)} = "
            f"{function}({name}, {block_scales(name, f.scale, zero)}, {side.rows}, BLOCK_K, {f.size}, DOT{packed})"
        )
        return
    value = (
        f"e2m1(unpack_fp4({name}, {side.rows}, BLOCK_K))" if f.element == "fp4" else fp8_numbers(name, f.element, form)
    )
    operand.loop.append(f"{side.tile} = {block_numbers(side, problem, form, format, value, zero)}")


def block_numbers(side: Side, problem: GemmProblem, form: Form, format: str, value: str, zero: float) -> str:
    """Elements as float32 times the scales of their blocks, in the dtype that is multiplied."""
    f, name = BLOCK_FORMATS[format], side.name
    scale = block_scales(name, f.scale, zero)
    if f.has_global_scale and problem.rounds:
        scale = f"{scale} * {name}_global"
    return f"times_blocks({value}, {scale}, {side.rows}, BLOCK_K, {f.size}).to(DOT)"


def block_scales(name: str, format: str, zero: float) -> str:
    """The scales of blocks as float32; ``zero``: what one of 0 stands for."""
    scales = {"e8m0": "e8m0({0})", "e4m3": "{0}.to(tl.float32)", "e5m3": "e5m3({0})"}[format].format(f"{name}_scale")
    return f"or_eps({scales})" if zero else scales


def block_scaled_codes(side: Side, form: Form, element: str) -> str:
    """The codes as the block-scaled instruction takes them."""
    wanted = form.x_element if side.tile == "a" else form.weight_element
    if element == "fp4" and wanted == "e4m3":
        return f"e2m1(unpack_fp4({side.name}, {side.rows}, BLOCK_K)).to(tl.float8e4nv)"
    return f"{side.name}.to(tl.float8e4nv)" if element.startswith("fp6") else side.name


def fp8_numbers(name: str, element: str, form: Form) -> str:
    """FP8 codes, or numbers already, as float32."""
    if form.converts_fp8 or not element.startswith("fp8"):
        return f"{name}.to(tl.float32)"
    return f"{element.removeprefix('fp8_')}({name}.to(tl.uint8, bitcast=True))"
