"""Triton's interpreter, made to compute what a GPU computes. Runs kernels from their source, on CPU tensors.

Whether a kernel is interpreted is settled when ``triton`` is imported: ``TRITON_INTERPRET=1`` has to be set before
this module is imported, and nothing in that process can be compiled any more. ``interpreter_worker.py`` gives it a
process of its own.

What the interpreter of Triton 3.6 to 3.9 gets wrong, and ``correct()`` puts right:

- Casts of floats: most to FP8 and BF16 are truncated or worse. Here every cast is rounded once, half to even. Beyond
  the largest number E4M3FN becomes NaN, where a GPU may saturate: a kernel that forgets to clamp is found. NaN stays
  NaN.
- BF16 and FP8 hold bits, which arithmetic, comparisons, reductions, ``tl.dot`` and ``tl.full`` take for integers.
- ``tl.dot_scaled``: missing up to 3.7, and without E4M3 scales since.
- ``tl.fma`` rounds twice; ``tl.minimum``, ``tl.maximum`` and ``tl.clamp`` return NaN, where a GPU returns the number,
  unless they are asked to propagate NaN.
- A float argument is a Python number, with which BF16 stays BF16; on a GPU it is a float32. Bools are refused.
- ``~`` of an unsigned integer is an error (numpy 2), functions of ``libdevice`` return None.
- ``not``, ``and`` and ``or`` of a block return one of the operands. Here they are errors (a compiler takes them).
- ``tl.reduce`` calls its function once an element.

And what it cannot notice: ``run`` raises if an address that a kernel reads or writes is in none of its arguments, and
an element that a mask leaves out of ``tl.load`` is NaN, or -1, if there is no ``other``: a GPU promises nothing.

What stays different: no two operations are contracted to one, ``tl.exp`` and division are as exact as numpy's, TF32 is
float32, ``tl.dot`` rounds a tile's sum once, the counter of ``range`` is a Python integer (which does not widen the
uint8 that it shifts), ``a = b = x`` and inline assembly are errors, and no limit of a GPU's is checked.
"""

import ast
import functools
import importlib.util
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
# Numpy has no such dtype: a TensorHandle holds their bits.
BITS = FLOATS.keys() - {tl.float64, tl.float32, tl.float16}
INTEGERS = {
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
}
E2M1 = np.array([sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
# 2**-127 to 2**127 and NaN. Exact in float64 only.
E8M0 = np.array([2.0**exponent for exponent in range(-127, 128)] + [math.nan])

# Methods of InterpreterBuilder that take floats, and give the same dtype.
ARITHMETIC = [
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_precise_divf"),
    *("create_minimumf", "create_maximumf", "create_minnumf", "create_maxnumf", "create_fabs"),
    "create_fneg",  # since 3.8
]
# By float64, rounded once; a GPU is off by an ulp or two where this is not one of the exact ones.
LIBDEVICE: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("abs", "ceil", "cos", "erf", "erfc", "exp", "exp2", "expm1", "floor")},
    **{name: getattr(torch, name) for name in ("log", "log10", "log1p", "log2", "rsqrt", "sin", "sqrt", "tanh")},
    **{name: getattr(torch, name) for name in ("copysign", "fmod", "pow", "trunc")},
    **{name: getattr(torch, name) for name in ("isnan", "isinf", "signbit")},
    "fabs": torch.abs,
    "fast_tanhf": torch.tanh,
    "nearbyint": torch.round,  # half to even
    "rint": torch.round,
    "llrint": lambda x: torch.round(x).long(),
    "round": lambda x: torch.copysign(torch.floor(torch.abs(x) + 0.5), x),  # half away from zero
    "div_rn": torch.div,
    "mul_rn": torch.mul,
    "sqrt_rn": torch.sqrt,
}


def decoded(handle: TensorHandle) -> np.ndarray:
    """The numbers of a tensor: bits as float32, everything else as it is."""
    dtype = handle.dtype.scalar
    if dtype not in BITS:
        return handle.data
    return torch.from_numpy(np.array(handle.data)).view(FLOATS[dtype]).float().numpy()


def to_odd(exact: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Numbers rounded to odd, which can be rounded again, to half the bits, as if they had not been rounded before.

    Args:
        exact: rounded to nearest.
        error: what each lost, or only its sign.
    """
    lost = (error != 0) & ~np.isnan(error)  # infinity and NaN are exact
    even = exact.view(f"i{exact.itemsize}") % 2 == 0
    towards = np.copysign(np.inf, error).astype(exact.dtype)
    return np.where(lost & even, np.nextafter(exact, towards), exact)


def encoded(numbers: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Numbers as an interpreter's tensor holds them, rounded once, half to even."""
    if dtype in (tl.float32, tl.float64):
        return numbers.astype(stock._get_np_dtype(dtype))
    if numbers.dtype not in (np.float32, np.float16):  # float64, integers
        wide = numbers.astype(np.float64)
        narrow = wide.astype(np.float32)
        numbers = to_odd(narrow, wide - narrow)
    rounded = torch.from_numpy(np.array(numbers, np.float32))
    if dtype == tl.float8e4nv:
        # Torch saturates from some release on. 464 is a tie, whose even neighbour is 448, the largest number.
        rounded = torch.where(rounded.abs() > 464, math.nan, rounded)
    rounded = rounded.to(FLOATS[dtype])
    return rounded.view(getattr(torch, f"uint{dtype.primitive_bitwidth}")).numpy().view(stock._get_np_dtype(dtype))


def cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    """Numbers of any dtype in another."""
    numbers, to = decoded(source), to.scalar
    return TensorHandle(encoded(numbers, to) if to in FLOATS else numbers.astype(stock._get_np_dtype(to)), to)


def cast_float(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, rounding: Any) -> TensorHandle:
    """Like ``cast``, but ``rounding`` may be towards zero."""
    result = cast(self, source, to)
    if rounding == stock._ir.ROUNDING_MODE.RTZ:
        # The bits of a float, without its sign, are in the order of the numbers.
        bits = result.data.view(f"u{result.data.itemsize}")
        result.data = np.where(np.abs(decoded(result)) > np.abs(decoded(source)), bits - 1, bits).view(
            result.data.dtype
        )
    return result


def by_numbers(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A method of InterpreterBuilder that computes with numbers where it computed with bits."""

    @functools.wraps(method)
    def corrected(self: InterpreterBuilder, *operands: TensorHandle) -> TensorHandle:
        dtype = operands[0].dtype.scalar
        if dtype not in BITS:
            return method(self, *operands)
        # Float32 has more than twice their bits and two more: rounding its result is rounding the exact one.
        result = method(self, *(TensorHandle(decoded(operand), tl.float32) for operand in operands))
        return TensorHandle(encoded(result.data, dtype), dtype)

    return corrected


def compared(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A comparison that says that its result is one of bools: what casts it would believe the operands' dtype."""

    @functools.wraps(method)
    def corrected(self: InterpreterBuilder, *operands: TensorHandle) -> TensorHandle:
        numbers = (
            TensorHandle(decoded(operand), tl.float32) if operand.dtype.scalar in BITS else operand
            for operand in operands
        )
        return TensorHandle(method(self, *numbers).data, tl.int1)

    return corrected


def clamp(self: InterpreterBuilder, x: TensorHandle, low: TensorHandle, high: TensorHandle, nan: Any) -> TensorHandle:
    """``tl.clamp``."""
    ends = decoded(low), decoded(high)
    propagate = nan == stock._ir.PROPAGATE_NAN.ALL
    clamped = np.clip(decoded(x), *ends) if propagate else np.fmin(np.fmax(decoded(x), ends[0]), ends[1])
    return TensorHandle(encoded(clamped, x.dtype.scalar), x.dtype.scalar)


def fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """``x * y + z``, rounded once.

    The product is exact in float64, the sum is not: Knuth's two-sum says what it lost.
    """
    dtype = z.dtype.scalar
    if dtype == tl.float64:
        raise NotImplementedError("tl.fma of float64: nothing wider is at hand")
    product = decoded(x).astype(np.float64) * decoded(y)
    addend = decoded(z).astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    total = to_odd(total, (product - (total - part)) + (addend - part))
    return TensorHandle(encoded(total, dtype), dtype)


def dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, imprecise: Any
) -> TensorHandle:
    """``tl.dot``. Float64 holds products of all dtypes, and sums of integers: one rounding, or none."""
    return accumulated(decoded(a).astype(np.float64), decoded(b).astype(np.float64), acc)


def accumulated(a: np.ndarray, b: np.ndarray, acc: TensorHandle) -> TensorHandle:
    """``acc + a @ b`` in the dtype of ``acc``."""
    total = np.matmul(a, b) + decoded(acc)
    dtype = acc.dtype.scalar
    if dtype in FLOATS:
        return TensorHandle(encoded(total, dtype), dtype)
    # By way of int64: a sum that does not fit wraps.
    return TensorHandle(total.astype(np.int64).astype(acc.data.dtype), dtype)


def dot_scaled(
    self: InterpreterBuilder,
    lhs: TensorHandle,
    lhs_scale: TensorHandle | None,
    lhs_format: Any,
    rhs: TensorHandle,
    rhs_scale: TensorHandle | None,
    rhs_format: Any,
    fast_math: bool,
    lhs_k_pack: bool,
    rhs_k_pack: bool,
    acc: TensorHandle,
) -> TensorHandle:
    """``tl.dot_scaled``. Nothing overflows on the way, as nothing does where a tensor core has the scales."""
    a = scaled(lhs, lhs_scale, lhs_format, -1 if lhs_k_pack else -2)
    # The scales of both have groups of K last; rhs itself has K before N.
    rhs = TensorHandle(np.swapaxes(rhs.data, -1, -2), rhs.dtype)
    b = scaled(rhs, rhs_scale, rhs_format, -1 if rhs_k_pack else -2)
    return accumulated(a, np.swapaxes(b, -1, -2), acc)


def scaled(operand: TensorHandle, scale: TensorHandle | None, element: Any, packed: int) -> np.ndarray:
    """The numbers of one operand of ``tl.dot_scaled``, in float64, with K last.

    Args:
        operand: codes. E2M1: two a byte, the first in the lower half.
        scale: of each group of consecutive elements, E4M3 or bytes that are E8M0. None is 1.
        element: the format, one of Triton's enumeration.
        packed: the dimension of which a byte has two elements.
    """
    if element.name == "E2M1":
        codes = np.moveaxis(operand.data, packed, -1)
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        numbers = np.moveaxis(E2M1[codes], -1, packed)
    else:
        numbers = decoded(operand).astype(np.float64)
    if scale is None:
        return numbers
    factors = decoded(scale).astype(np.float64) if scale.dtype.scalar in FLOATS else E8M0[scale.data.view(np.uint8)]
    return numbers * np.repeat(factors, numbers.shape[-1] // factors.shape[-1], axis=-1)


class Format(str):
    """A name that is its own value: up to 3.7 ``tl.dot_scaled`` reads the one of a constexpr, later it has a string."""

    @property
    def value(self) -> str:
        """What a constexpr would hold."""
        return str(self)


def reduce(self: ReduceOps, tensors: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """``tl.reduce`` by neighbours, all pairs at once, as a GPU does it. The length is a power of two in Triton."""
    rank = len(tensors[0].handle.data.shape)
    original = self.axis
    tensors, axis = self.unravel(tensors, original)
    function = self.combine_fn.rewrite()
    while (length := tensors[0].handle.data.shape[axis]) > 1:
        halves = [
            tuple(
                self.to_tensor(np.take(tensor.handle.data, range(first, length, 2), axis), tensor.dtype)
                for tensor in tensors
            )
            for first in (0, 1)
        ]
        combined = function(*halves[0], *halves[1])
        tensors = combined if isinstance(combined, tuple) else (combined,)
    if original is None:
        shape: tuple[int, ...] = (1,) * rank if self.keep_dims else ()
        results = [tensor.handle.data.reshape(shape) for tensor in tensors]
    else:
        results = [t.handle.data if self.keep_dims else np.squeeze(t.handle.data, axis) for t in tensors]
    return [
        # A number of one element is an array of shape (1,).
        self.to_tensor(data if data.shape else data.item(), tensor.dtype)
        for data, tensor in zip(results, tensors, strict=True)
    ]


def argument(value: Any) -> Any:
    """An argument that is no constexpr, as a kernel sees it: of the type that it has on a GPU."""
    if isinstance(value, bool | int | float):
        dtype = tl.str_to_ty(triton.runtime.jit.mangle_type(value), None)
        return tl.tensor(TensorHandle(np.array([value], dtype=stock._get_np_dtype(dtype)), dtype), dtype)
    return stock_argument(value)


stock_argument = stock._implicit_cvt


def library(name: str) -> Callable[..., tl.tensor]:
    """``libdevice.name``: of float32 and float64."""

    def call(*operands: Any) -> tl.tensor:
        if name not in LIBDEVICE:
            raise NotImplementedError(f"libdevice.{name} is not interpreted: add it to LIBDEVICE")
        tensors = [stock.interpreter_semantic.to_tensor(operand) for operand in operands]
        dtypes = {tensor.dtype for tensor in tensors}
        if not dtypes <= {tl.float32, tl.float64} or len(dtypes) > 1:
            raise TypeError(f"libdevice.{name} of {[str(tensor.dtype) for tensor in tensors]}")
        wide = (torch.from_numpy(np.array(tensor.handle.data, dtype=np.float64)) for tensor in tensors)
        result = LIBDEVICE[name](*wide)
        special = {torch.bool: tl.int1, torch.int64: tl.int64}
        dtype = special.get(result.dtype, tensors[0].dtype)
        block = next((tensor.type for tensor in tensors if tensor.type.is_block()), None)
        data = result.numpy().astype(stock._get_np_dtype(dtype))
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)) if block else dtype)

    return call


# First and last address of what the kernel that runs may read and write, or None: all.
memory: list[tuple[int, int]] | None = None


def check(pointers: TensorHandle, mask: TensorHandle, what: str) -> None:
    """Raise unless all addresses are in ``memory``."""
    if memory is None:
        return
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, dtype=bool)
    for first, last in memory:
        inside |= (addresses >= first) & (addresses <= last - (size - 1))
    if not inside.all():
        raise IndexError(f"{what} {np.count_nonzero(~inside)} of {addresses.size} elements outside all arguments")


def load(
    self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *hints: Any
) -> TensorHandle:
    """``tl.load``."""
    check(pointers, mask, "reads")
    dtype = pointers.get_element_ty()
    if other is None:
        unit = np.frombuffer(b"\xff" * 8, dtype=stock._get_np_dtype(dtype))[:1]  # NaN, -1
        other = TensorHandle(np.broadcast_to(unit, pointers.data.shape).copy(), dtype)
    return stock_load(self, pointers, mask, other, *hints)


def store(
    self: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *hints: Any
) -> Any:
    """``tl.store``."""
    check(pointers, mask, "writes")
    if value.data.dtype.itemsize != max(1, pointers.get_element_ty().primitive_bitwidth // 8):
        raise TypeError(f"{value.data.dtype} stored as {pointers.get_element_ty()}")
    return stock_store(self, pointers, value, mask, *hints)


stock_load, stock_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def as_bool(self: tl.tensor) -> bool:
    """``if``, ``not``, ``and`` and ``or``. Of more than one element the interpreter says that it is true."""
    if sys._getframe(1).f_globals["__name__"] in ("triton.language.core", "triton.language.semantic"):
        return True  # Triton itself asks whether it was given a tensor
    if self.handle.data.size != 1:
        raise TypeError(f"one bool of a block of {self.handle.data.shape}: use ~, & and |")
    return bool(self.handle.data.item())


@functools.cache
def correct() -> None:
    """Put the corrections in the place of what Triton has. For good: this process interprets, and does nothing else."""
    builder: Any = InterpreterBuilder
    builder.cast_impl = cast
    builder.create_fp_to_fp = cast_float
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    for name in [name for name in ARITHMETIC if hasattr(builder, name)]:
        setattr(builder, name, by_numbers(getattr(builder, name)))
    for name in [name for name in vars(builder) if name.startswith(("create_fcmp", "create_icmp"))]:
        setattr(builder, name, compared(getattr(builder, name)))
    builder.create_clampf = clamp
    builder.create_fma = fma
    builder.create_dot = dot
    builder.create_dot_scaled = dot_scaled
    builder.create_masked_load = load
    builder.create_masked_store = store
    builder.get_bf16 = lambda self, value: TensorHandle(encoded(np.array([value]), tl.bfloat16), tl.bfloat16)
    builder.get_all_ones_value = lambda self, dtype: TensorHandle(
        np.invert(np.zeros(1, stock._get_np_dtype(dtype))), dtype.scalar
    )

    stock_reduce = ReduceOps.apply_impl
    ReduceOps.generic_reduce = reduce
    ReduceOps.apply_impl = lambda self, tensors: (
        self.generic_reduce(tensors) if tensors[0].dtype in BITS else stock_reduce(self, tensors)
    )

    stock_dot_scaled = TritonSemantic.dot_scaled

    def semantic_dot_scaled(
        self: TritonSemantic,
        lhs: Any,
        lhs_scale: Any,
        lhs_format: Any,
        rhs: Any,
        rhs_scale: Any,
        rhs_format: Any,
        *rest: Any,
    ) -> tl.tensor:
        formats = [Format(getattr(name, "value", name)) for name in (lhs_format, rhs_format)]
        return stock_dot_scaled(self, lhs, lhs_scale, formats[0], rhs, rhs_scale, formats[1], *rest)

    TritonSemantic.dot_scaled = semantic_dot_scaled

    stock_core, stock_tensor = stock._patch_lang_core, stock._patch_lang_tensor

    def patch_core(language: ModuleType, scope: Any) -> None:
        stock_core(language, scope)
        stock_type = language.dtype.to_ir
        names = {"fp8e4b8", "fp8e5b16"}
        # The interpreter's types are Triton's. It does not know all.
        scope.set_attr(
            language.dtype, "to_ir", lambda self, builder: self if self.name in names else stock_type(self, builder)
        )

    def patch_tensor(tensor: type, scope: Any) -> None:
        stock_tensor(tensor, scope)
        scope.set_attr(tensor, "__bool__", as_bool)
        # Up to 3.6 an array of one element is made an int, which numpy refuses since 2.4.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    stock._patch_lang_core, stock._patch_lang_tensor = patch_core, patch_tensor
    stock._implicit_cvt = argument
    for name in [name for name, member in vars(libdevice).items() if inspect.isfunction(member)]:
        setattr(libdevice, name, library(name))


def without_launcher(source: str) -> str:
    """The source without what needs a GPU in a module of Inductor's: the driver, and what chooses a configuration."""
    if "triton_heuristics" not in source:
        return source
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if "set_driver_to_gpu" not in ast.unparse(node)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if "triton_heuristics" not in ast.unparse(d)]
    return ast.unparse(tree)


@functools.cache
def module(source: str) -> ModuleType:
    """The module of this source. Triton reads it again, from the file, when a kernel first runs."""
    handle, path = tempfile.mkstemp(prefix="interpreted_", suffix=".py")
    with os.fdopen(handle, "w") as file:
        file.write(without_launcher(source))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def bounded(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside, kernels may read and write these tensors only: the elements between their first and last."""
    global memory
    memory = []
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            memory.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize - 1))
    try:
        yield
    finally:
        memory = None


def run(source: str, name: str, arguments: Mapping[str, Any], grid: tuple[int, ...]) -> None:
    """Run a kernel on CPU tensors, which it changes.

    Args:
        source: of a module, which may be one that Inductor generates.
        name: of the kernel in it.
        arguments: by name: tensors, numbers and constexprs.
        grid: of one to three dimensions.
    """
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        if tensor.dtype not in INTEGERS.union(FLOATS.values()):
            raise TypeError(f"Triton has no {tensor.dtype}: give a kernel its bytes, tensor.view(torch.uint8)")
    kernel = getattr(module(source), name)
    if unknown := arguments.keys() - set(kernel.arg_names):
        raise TypeError(f"{name} has no argument {', '.join(sorted(unknown))}")  # the interpreter would drop it
    with bounded(tensors), np.errstate(all="ignore"):
        kernel[tuple(grid)](**arguments)
