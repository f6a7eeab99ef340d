"""The ops of namespace quark_inductor: schema, fake, dispatch, errors. Their numbers are checked on whole numbers.

Where values are compared, every product and sum is a small whole number: exact in every dtype and order, so a float64
product is the expected result bit for bit.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.schemes import ops, registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.errors import QuarkInductorError, TrainingError
from quark_inductor.schemes.numerics import int4
from quark_inductor.schemes.spec import PRESETS

OPS = torch.ops.quark_inductor
NAMES = [
    "block_dequantize",
    "block_quantize",
    "grouped_linear",
    "int4_unpack",
    "linear",
    "prologue_gemm",
    "quantized_gemm",
    "unpack_weight",
    "weight_only_gemm",
]
FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
M, N, K = 5, 24, 64
# An activation, and a weight: see Operands.
GEMMS = [
    *(
        ("float", weight)
        for weight in (
            "mxfp4",
            "mxfp6_e2m3",
            "nvfp4",
            "amdfp4_g16",
            "fp8_e4m3",
            "fp8_e4m3_16x48",
            "int8",
            "uint8 groups",
            "int4",
            "uint4_order groups",
            "int4_fp8",
        )
    ),
    ("mxfp4 codes", "mxfp4"),
    ("mxfp6_e2m3 codes", "mxfp4"),
    ("nvfp4 codes", "nvfp4"),
    ("fp8 codes static", "fp8_e4m3"),
    ("fp8 codes per token", "fp8_e4m3 channels"),
    ("fp8 codes by groups", "fp8_e4m3_16x48"),
    ("int8 codes", "int8 no zero point"),
    ("mxfp4 even", "mxfp4"),
    ("mxfp8_e4m3 rceil", "mxfp8_e4m3"),
    ("fp8 given", "fp8_e4m3"),
    ("fp8 amax", "fp8_e4m3 channels"),
    ("fp8 amax by groups", "mxfp4"),
    ("int8 given", "int8"),
    ("uint8 asymmetric", "uint8 groups"),
]
# How many of an activation are too large for every sum to be exact in 16 bits, as their scale must be 1.
LARGE = ("fp8 amax", "fp8 amax by groups", "mxfp8_e4m3 rceil", "uint8 asymmetric")
gemms = pytest.mark.parametrize("gemm", GEMMS, ids=" by ".join)


class Operands:
    """Operands of a GEMM for one dtype, whose dequantized values are whole numbers."""

    def __init__(self, oracle: ModuleType, gemm: tuple[str, str], dtype: torch.dtype, bias: bool, m: int = M) -> None:
        generator = np.random.default_rng(9)
        self.oracle, (self.activation, self.weight), self.dtype = oracle, gemm, dtype
        self.x = generator.choice([-2.0, -1.0, 0.0, 1.0, 2.0], (m, K))
        # The largest of a block, group or row: with it a computed scale is 1, and these values are exact.
        if self.activation == "uint8 asymmetric":
            self.x[:, 0], self.x[:, 1] = 200.0, -55.0
        else:
            self.x[:, ::32] = 448.0 if self.activation in LARGE else 4.0
        self.w = generator.choice([-2.0, -1.0, 0.0, 1.0, 2.0], (N, K))
        self.b = generator.integers(-8, 9, N).astype(float)
        self.bias = torch.from_numpy(self.b).to(dtype) if bias else None

    @property
    def name(self) -> str:
        if self.activation == "float":
            return "weight_only_gemm"
        return "quantized_gemm" if "codes" in self.activation else "prologue_gemm"

    def op(self) -> Any:
        return getattr(OPS, self.name)

    def args(self) -> tuple[Any, ...]:
        by_weight = *self.weight_args(), self.bias
        format = self.weight.split()[0]
        x = torch.from_numpy(self.x).to(self.dtype)
        if self.activation == "float":
            return x, *by_weight, format
        codes = self.activation.split()[0]
        x_format = "fp8_e4m3" if codes == "fp8" else codes
        if self.name == "quantized_gemm":
            return *self.codes_args(x_format), *by_weight, x_format, format, ops.dtype_name(self.dtype)
        scale = zero_point = None
        rule = self.activation.split()[1]
        if rule == "given":
            scale = torch.ones((), dtype=self.dtype)
            zero_point = torch.tensor(7, dtype=torch.int32) if codes == "int8" else None
        group_size = 32 if "groups" in self.activation else 0
        return x, scale, None, zero_point, *by_weight, x_format, rule, group_size, format

    def codes_args(self, format: str) -> tuple[Tensor | None, ...]:
        """A quantized activation: codes, scale, second scale, zero point."""
        if format in self.oracle.BLOCKS:
            return *self.block(self.x, format), None
        rows = len(self.x)
        if format == "int8":
            offset = torch.full((rows, 1), 5, dtype=torch.int32)
            half = torch.full((rows, 1), 0.5, dtype=self.dtype)
            return torch.from_numpy(2 * self.x + 5).to(torch.int8), half, None, offset
        shape = {"static": (), "token": (rows, 1), "groups": (rows, 2)}[self.activation.split()[-1]]
        return torch.from_numpy(2 * self.x).to(FP8), torch.full(shape, 0.5, dtype=self.dtype), None, None

    def block(self, values: np.ndarray, format: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of half the values, scales of 2 (with a global scale 4 and a half), second scale."""
        size, element, scale = self.oracle.BLOCKS[format]
        codes = self.oracle.packed_elements(values / 2, element)
        if element.startswith("fp8"):
            codes = codes.view(FP8)
        # 2 in E8M0 (127 is 1), 4 in E4M3 and 2 in E5M3.
        code = {"e8m0": 128, "e4m3": 0x48, "e5m3": 16 << 3}[scale]
        scales = torch.full((len(values), K // size), code, dtype=torch.uint8)
        return (codes, scales.view(FP8), torch.tensor(0.5)) if scale == "e4m3" else (codes, scales, None)

    def weight_args(self) -> tuple[Tensor | None, ...]:
        """Weight, scale, second scale, zero point."""
        (format, *more), w = self.weight.split(), torch.from_numpy(self.w)
        if format in self.oracle.BLOCKS:
            return *self.block(self.w, format), None
        if format.startswith("fp8"):
            shape = (2, 2) if format.endswith("x48") else (N,) if more else ()
            return (2 * w).to(FP8), torch.full(shape, 0.5, dtype=self.dtype), None, None
        offset = 0 if more == ["no", "zero", "point"] else 6
        if format in ("int8", "uint8"):
            dtype, shape = getattr(torch, format), (N, 2) if more == ["groups"] else (N,)
            zero_point = torch.full(shape, offset, dtype=dtype) if offset else None
            return (2 * w + offset).to(dtype), torch.full(shape, 0.5, dtype=self.dtype), None, zero_point
        pack, codes, offset = self.oracle.packed_nibbles, self.w + 3, 3
        if more == ["groups"]:
            scale, zero_point = torch.ones(4, N, dtype=self.dtype), pack(np.full((4, N), offset), format)
            return pack(codes.T, format), scale, None, zero_point
        two_stages = format == "int4_fp8"
        scale = torch.tensor(0.5) if two_stages else torch.ones(N, dtype=self.dtype)
        second = torch.full((N,), 2.0) if two_stages else None
        return pack(codes, format), scale, second, pack(np.full(N, offset), format)

    def result(self) -> np.ndarray:
        return self.x @ self.w.T + (self.b if self.bias is not None else 0.0)


def raw_bytes(argument: Any) -> bytes | None:
    return argument.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if isinstance(argument, Tensor) else None


# --- what is registered


def test_these_ops_and_no_others_are_defined() -> None:
    """But for those of a provider, which begin with its name."""
    defined = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    names = {name.removeprefix("quark_inductor::") for name in defined if name.startswith("quark_inductor::")}
    assert sorted(name for name in names if not name.startswith(("aiter_", "scaled_mm_"))) == NAMES
    # amd-quark's own namespace is not ours to add to; it is not imported here.
    assert [name for name in defined if name.startswith("quark::")] == []


def test_the_fused_ops_are_the_gemms() -> None:
    assert {name for name in NAMES if name.endswith("gemm")} == ops.FUSED_OPS


@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_functional_and_may_be_compiled(name: str) -> None:
    op = getattr(OPS, name).default
    assert not op._schema.is_mutable
    assert all(argument.alias_info is None for argument in (*op._schema.arguments, *op._schema.returns))
    assert torch.Tag.pt2_compliant_tag in op.tags


# --- opcheck: schema, fake, autograd registration, AOT with symbolic sizes


@pytest.mark.parametrize(("dtype", "bias"), [*((dtype, True) for dtype in DTYPES), (torch.bfloat16, False)])
@gemms
def test_opcheck_of_the_gemms(oracle: ModuleType, gemm: tuple[str, str], bias: bool, dtype: torch.dtype) -> None:
    made = Operands(oracle, gemm, dtype, bias)
    args = made.args()
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(a, Tensor) and a.dtype == FP8 for a in args):
        checks.append("test_schema")  # torch compares no FP8 tensors, which this one does
    before = [raw_bytes(a) for a in args]
    torch.library.opcheck(made.op(), args, test_utils=checks)
    assert [raw_bytes(a) for a in args] == before


@pytest.mark.parametrize("format", int4.FORMATS)
@pytest.mark.parametrize("shape", [(3,), (5, 2), (2, 3, 4)])
def test_opcheck_of_unpack(format: str, shape: tuple[int, ...]) -> None:
    words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    torch.library.opcheck(OPS.int4_unpack, (words, format))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 96)])
def test_opcheck_of_quantize_and_dequantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(10)).to(dtype)
    torch.library.opcheck(OPS.block_quantize, (x, "mxfp4", "even"))
    codes, scales = OPS.block_quantize(x, "mxfp4", "even")
    torch.library.opcheck(OPS.block_dequantize, (codes, scales, "mxfp4", ops.dtype_name(dtype)))


OTHER_FORMATS = [  # with a scale rule, and whether there is a global scale
    ("mxfp6_e2m3", "floor", False),
    ("mxfp6_e3m2", "even", False),
    ("mxfp8_e4m3", "rceil", False),
    ("mxfp8_e5m2", "ceil", False),
    ("nvfp4", "combined", True),
    ("nvfp4", "sequential", True),
    ("amdfp4_g16", "nearest", False),
    ("amdfp4_g32", "nearest", False),
]


@pytest.mark.parametrize(("name", "rule", "has_global"), OTHER_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_of_the_other_formats(name: str, rule: str, has_global: bool, dtype: torch.dtype) -> None:
    x = torch.randn((3, 64), generator=torch.Generator().manual_seed(10)).to(dtype)
    scale = (torch.tensor(2.0**-9),) if has_global else ()
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    codes, scales = OPS.block_quantize(x, name, rule, *scale)
    if FP8 not in (codes.dtype, scales.dtype) and codes.dtype != torch.float8_e5m2:
        checks.append("test_schema")  # torch compares no FP8 tensors
    torch.library.opcheck(OPS.block_quantize, (x, name, rule, *scale), test_utils=checks)
    args = (codes, scales, name, ops.dtype_name(dtype), *scale)
    torch.library.opcheck(OPS.block_dequantize, args, test_utils=checks)
    fakes = symbolic(lambda x, *s: OPS.block_quantize(x, name, rule, *s), x, *scale)
    assert [f.dtype for f in fakes] == [codes.dtype, scales.dtype]
    assert codes.shape[1] * codes.itemsize == {"4": 32, "6": 48, "8": 64}[name[name.index("fp") + 2]]
    assert scales.shape == (3, 4 if name in ("nvfp4", "amdfp4_g16") else 2)


# --- fakes


def symbolic(function: Any, *args: Any) -> list[Any]:
    """The fake results of tracing ``function`` with every size symbolic."""
    graph = make_fx(function, tracing_mode="symbolic")(*args).graph
    (output,) = graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], (list, tuple)) else [output.args[0]]
    return [node.meta["val"] for node in results]


def test_fake_of_quantize_with_symbolic_sizes() -> None:
    x = torch.randn(7, 3, 96)
    codes, scales, batch = symbolic(lambda x: (*OPS.block_quantize(x, "mxfp4", "even"), x + 1), x)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.uint8)
    for result, divisor in ((codes, 2), (scales, 32)):
        assert isinstance(result.shape[0], torch.SymInt)
        assert result.shape[:2] == batch.shape[:2]
        assert result.shape[2] == batch.shape[2] // divisor


def test_fake_of_dequantize_with_symbolic_sizes() -> None:
    codes, scales = torch.zeros(7, 48, dtype=torch.uint8), torch.zeros(7, 3, dtype=torch.uint8)
    values, same = symbolic(lambda c, s: (OPS.block_dequantize(c, s, "mxfp4", "bfloat16"), c + 1), codes, scales)
    assert values.dtype == torch.bfloat16
    assert isinstance(values.shape[0], torch.SymInt)
    assert values.shape[0] == same.shape[0]
    assert values.shape[1] == same.shape[1] * 2


def test_fake_of_unpack_with_symbolic_sizes() -> None:
    words = torch.zeros(7, 3, dtype=torch.int32)
    codes, same = symbolic(lambda w: (OPS.int4_unpack(w, "uint4"), w + 1), words)
    assert codes.dtype == torch.int32
    assert isinstance(codes.shape[1], torch.SymInt)
    assert codes.shape == (same.shape[0], same.shape[1] * 8)


@pytest.mark.parametrize("dtype", DTYPES)
@gemms
def test_fake_of_the_gemms_with_symbolic_sizes(oracle: ModuleType, gemm: tuple[str, str], dtype: torch.dtype) -> None:
    made = Operands(oracle, gemm, dtype, bias=True)
    args = made.args()
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    names = [a.name for a in made.op().default._schema.arguments]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = dict(zip(places, tensors, strict=True))
        y = made.op()(*(given.get(i, a) for i, a in enumerate(args)))
        weight = given[names.index("weight")]
        return y, given[0].view(torch.uint8) + 1, torch.zeros_like(weight, dtype=torch.uint8)

    result, tokens, weight = symbolic(call, *(args[i] for i in places))
    assert result.dtype == dtype
    assert isinstance(result.shape[0], torch.SymInt)
    assert isinstance(result.shape[1], torch.SymInt)
    # By groups packed integers are stored transposed, eight channels a word.
    transposed = "int4_order groups" in gemm[1]
    assert result.shape == (tokens.shape[0], weight.shape[1] * 8 if transposed else weight.shape[0])


# --- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@gemms
@pytest.mark.parametrize("m", [0, 1, M])
def test_the_gemms_are_exact_on_small_whole_numbers(
    oracle: ModuleType, gemm: tuple[str, str], bias: bool, dtype: torch.dtype, m: int
) -> None:
    made = Operands(oracle, gemm, dtype, bias, m)
    y = made.op()(*made.args())
    expected = torch.from_numpy(made.result())
    assert torch.equal(expected.to(dtype).double(), expected) or gemm[0] in LARGE
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("format", int4.FORMATS)
def test_unpack_is_numpys(oracle: ModuleType, format: str) -> None:
    words = torch.randint(-(2**31), 2**31, (4, 50), generator=torch.Generator().manual_seed(4)).to(torch.int32)
    codes = OPS.int4_unpack(words, format)
    assert codes.dtype == torch.int32
    assert codes.tolist() == oracle.nibbles(words, format).tolist()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize_has_the_dtype_it_is_asked_for(dtype: torch.dtype) -> None:
    codes = torch.tensor([[0x21] * 16], dtype=torch.uint8)  # 0.5 and 1
    values = OPS.block_dequantize(codes, torch.tensor([[130]], dtype=torch.uint8), "mxfp4", ops.dtype_name(dtype))
    assert values.dtype == dtype
    assert values.tolist() == [[4.0, 8.0] * 16]


# --- of several experts


class Grouped:
    """Operands of E experts: each weight is the others', its rows turned, and so is each bias.

    The scale of an activation that is one number is another for each expert.
    """

    ENDS = (2, 2, 4)  # an expert without rows, and a row behind that is nobody's

    def __init__(self, oracle: ModuleType, gemm: tuple[str, str], dtype: torch.dtype, bias: bool) -> None:
        self.parts = [Operands(oracle, gemm, dtype, bias) for _ in self.ENDS]
        for e, part in enumerate(self.parts):
            part.w, part.b = np.roll(part.w, 5 * e, 0), np.roll(part.b, 5 * e)
            part.bias = torch.from_numpy(part.b).to(dtype) if bias else None
        self.op, self.dtype = self.parts[0].op(), dtype
        self.offsets = torch.tensor(self.ENDS, dtype=torch.int32)
        self.names = [a.name for a in self.op.default._schema.arguments]
        each = [dict(zip(self.names, part.args(), strict=False)) for part in self.parts]
        self.scales = 2.0 ** np.arange(len(each)) if gemm[0].endswith("static") else np.ones(len(each))
        self.args = tuple(
            torch.stack(
                [
                    named[name] * by if name == "x_scale" else named[name]
                    for named, by in zip(each, self.scales, strict=True)
                ]
            )
            if isinstance(first, Tensor) and (name.startswith(("weight", "bias")) or first.ndim == 0)
            else first
            for name, first in each[0].items()
        )

    def result(self) -> np.ndarray:
        y, begin = np.zeros((M, N)), 0
        for part, by, end in zip(self.parts, self.scales, self.ENDS, strict=True):
            y[begin:end] = (by * part.x @ part.w.T + (part.b if part.bias is not None else 0.0))[begin:end]
            begin = end
        return y


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@gemms
def test_each_expert_has_its_rows(oracle: ModuleType, gemm: tuple[str, str], dtype: torch.dtype, bias: bool) -> None:
    """Exact on small whole numbers, and zeros, not biases, in the row behind the last."""
    made = Grouped(oracle, gemm, dtype, bias)
    y, expected = made.op(*made.args, offsets=made.offsets), torch.from_numpy(made.result())
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    assert not y[4].any()
    nobody = made.op(*made.args, offsets=torch.zeros_like(made.offsets))
    assert torch.equal(nobody, torch.zeros_like(y))
    # All rows are one expert's: it is the GEMM without offsets.
    last = made.op(*made.args, offsets=torch.tensor([0, 0, M], dtype=torch.int32))
    alone = [a[2] if isinstance(a, Tensor) and len(a) == len(made.ENDS) else a for a in made.args]
    assert torch.equal(last, made.op(*alone))


@gemms
def test_opcheck_of_the_gemms_of_experts(oracle: ModuleType, gemm: tuple[str, str]) -> None:
    made = Grouped(oracle, gemm, torch.bfloat16, bias=True)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(a, Tensor) and a.dtype == FP8 for a in made.args):
        checks.append("test_schema")
    torch.library.opcheck(made.op, made.args, {"offsets": made.offsets}, test_utils=checks)


# --- errors


def weight_only(x: Tensor, c: Tensor, s: Tensor, format: str) -> Tensor:
    return OPS.weight_only_gemm(x, c, s, None, None, None, format)


def quantized(c: Tensor, s: Tensor, x_format: str, weight_format: str, dtype: str = "float32") -> Tensor:
    return OPS.quantized_gemm(c, s, None, None, c, s, None, None, None, x_format, weight_format, dtype)


def prologue(x: Tensor, c: Tensor, s: Tensor, x_format: str, rule: str, weight_format: str) -> Tensor:
    return OPS.prologue_gemm(x, None, None, None, c, s, None, None, None, x_format, rule, 0, weight_format)


UNKNOWN = {
    "format of quantize": lambda x, c, s: OPS.block_quantize(x, "mxfp5", "even"),
    "scale rule of quantize": lambda x, c, s: OPS.block_quantize(x, "mxfp4", "odd"),
    "format of dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "mxfp5", "float32"),
    "format of unpack": lambda x, c, s: OPS.int4_unpack(c.to(torch.int32), "int5"),
    "weight format of weight-only gemm": lambda x, c, s: weight_only(x, c, s, "mxfp5"),
    "weight format of weight-only gemm, fp8": lambda x, c, s: weight_only(x, c, s, "fp8_e4m4"),
    "weight format of weight-only gemm, block": lambda x, c, s: weight_only(x, c, s, "fp8_e4m3_128"),
    "x format of gemm": lambda x, c, s: quantized(c, s, "mxfp5", "mxfp4"),
    "weight format of gemm": lambda x, c, s: quantized(c, s, "mxfp4", "mxfp5"),
    "x format of prologue gemm": lambda x, c, s: prologue(x, c, s, "mxfp5", "even", "mxfp4"),
    "scale rule of prologue gemm": lambda x, c, s: prologue(x, c, s, "mxfp4", "odd", "mxfp4"),
    "scale rule of another family, blocks": lambda x, c, s: prologue(x, c, s, "mxfp4", "amax", "mxfp4"),
    "scale rule of another family, fp8": lambda x, c, s: prologue(x, c, s, "fp8_e4m3", "even", "mxfp4"),
    "scale rule of another family, integers": lambda x, c, s: prologue(x, c, s, "int8", "amax", "mxfp4"),
    "weight format of prologue gemm": lambda x, c, s: prologue(x, c, s, "mxfp4", "even", "mxfp5"),
    "rule of another format": lambda x, c, s: OPS.block_quantize(x, "mxfp4", "rceil"),
    "global scale too many": lambda x, c, s: OPS.block_quantize(x, "mxfp4", "even", x[0, 0]),
    "global scale too few": lambda x, c, s: OPS.block_quantize(x, "nvfp4", "combined"),
    "global scale too few to dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "nvfp4", "float32"),
    "global scale too many to dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "mxfp4", "float32", x[0, 0]),
    "dtype of dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "mxfp4", "float31"),
    "dtype of gemm": lambda x, c, s: quantized(c, s, "mxfp4", "mxfp4", "float31"),
    "dtype of fp8 gemm": lambda x, c, s: quantized(x.to(FP8), x[0, 0], "fp8_e4m3", "fp8_e4m3", "float31"),
}


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("mode", ["eager", "fake", "symbolic"])
def test_an_unknown_name_is_an_error_that_says_it(what: str, mode: str) -> None:
    x, codes, scales = torch.ones(2, 64), torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    call = UNKNOWN[what] if mode == "eager" else make_fx(UNKNOWN[what], tracing_mode=mode)
    with pytest.raises(
        ValueError,
        match=r"no \S+ format '(mxfp5|fp8_e4m4|fp8_e4m3_128|int5)'|'(odd|amax|even)' for (mxfp4|fp8_e4m3|int8)|float31"
        r"|'rceil' for mxfp4|mxfp4 has no global scale|nvfp4 needs a global",
    ):
        call(x, codes, scales)


@pytest.mark.parametrize("k", [31, 33, 48])
def test_a_k_of_no_whole_blocks_is_an_error(k: int) -> None:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.block_quantize(x, "mxfp4", "even")

    x = torch.ones(2, k)
    with pytest.raises(RuntimeError, match="32"):
        quantize(x)
    with pytest.raises(RuntimeError, match=rf"K = {k} is not a multiple of 32"):
        make_fx(quantize, tracing_mode="fake")(x)
    with pytest.raises(RuntimeError, match=r"K = s\d+ is not a multiple of 32"):
        make_fx(quantize, tracing_mode="symbolic")(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.uint8])
def test_a_dtype_has_a_name_and_a_name_its_dtype(dtype: torch.dtype) -> None:
    assert ops.dtype_of(ops.dtype_name(dtype)) is dtype
    assert ops.dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize("name", ["", "bfloat17", "torch.bfloat16", "nn", "Tensor", "__name__"])
def test_what_is_no_dtype_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a torch dtype"):
        ops.dtype_of(name)


# --- gradients


def test_a_gradient_through_the_codes_is_refused() -> None:
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.raises(TrainingError, match=r"block_quantize.*no_grad"):
        OPS.block_quantize(x, "mxfp4", "even")
    assert issubclass(TrainingError, QuarkInductorError)


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64)])
def test_a_gradient_through_a_quantized_linear_is_refused(shape: tuple[int, ...]) -> None:
    layer = QuarkLinear(64, 8, scheme_for(PRESETS["mxfp4"]), bias=True, dtype=torch.float32)
    with pytest.raises(TrainingError, match="no_grad"):
        layer(torch.ones(shape, requires_grad=True) * 2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_input_is_fine(context: Any) -> None:
    x = torch.ones(2, 64, requires_grad=True)
    with context():
        codes, scales = OPS.block_quantize(x, "mxfp4", "even")
    assert scales.tolist() == [[125, 125], [125, 125]]
    codes, _ = OPS.block_quantize(x.detach(), "mxfp4", "even")
    assert not codes.requires_grad
