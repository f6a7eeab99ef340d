"""The ops of namespace quark_inductor: schema, fake, dispatch, errors. Their numbers are checked on whole numbers.

Where values are compared, every product and sum is a small whole number: exact in every dtype and order, so a float64
product is the expected result bit for bit.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.schemes import ops, registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.errors import QuarkInductorError, TrainingError
from quark_inductor.schemes.spec import PRESETS

OPS = torch.ops.quark_inductor
NAMES = ["block_dequantize", "block_gemm", "block_prologue_gemm", "block_quantize", "fp8_gemm", "fp8_prologue_gemm"]
FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GEMMS = [
    "block_gemm",
    "block_prologue_gemm",
    "fp8_gemm static",
    "fp8_gemm per token",
    "fp8_prologue_gemm static",
    "fp8_prologue_gemm",
]
M, N, K = 5, 24, 64


class Operands:
    """Operands of every GEMM for one dtype, whose dequantized values are whole numbers."""

    def __init__(self, dtype: torch.dtype, bias: bool, m: int = M) -> None:
        generator = np.random.default_rng(9)
        # With a 4 in every block of 32 (or a 448 in every row) a dynamic scale is 1, and these values are exact.
        self.x = generator.choice([-2.0, -1.0, 0.0, 1.0, 2.0], (m, K))
        self.x[:, ::32] = 4.0
        self.w = generator.choice([-2.0, -1.0, 0.0, 1.0, 2.0], (N, K))
        self.b = generator.integers(-8, 9, N).astype(float)
        self.dtype = dtype
        self.bias = torch.from_numpy(self.b).to(dtype) if bias else None

    def args(self, gemm: str) -> tuple[Any, ...]:
        name = str(self.dtype).removeprefix("torch.")
        x, weight = torch.from_numpy(self.x).to(self.dtype), torch.from_numpy(self.w)
        one = torch.ones((), dtype=self.dtype)
        if gemm.startswith("block"):
            packed, scale = mxfp4(self.w)
            if gemm == "block_gemm":
                return *mxfp4(self.x), packed, scale, self.bias, "mxfp4", "mxfp4", name
            return x, packed, scale, self.bias, "mxfp4", "even", "mxfp4"
        codes = weight.to(FP8)
        if gemm == "fp8_gemm per token":
            halves = torch.full((len(x), 1), 0.5, dtype=self.dtype)
            scales = torch.full((N,), 2.0, dtype=self.dtype)
            return x.to(FP8), halves, codes, scales, self.bias, name
        if gemm == "fp8_gemm static":
            return x.to(FP8), one * 2, codes, one / 2, self.bias, name
        if gemm == "fp8_prologue_gemm static":
            return x, one, codes, one, self.bias, "per_tensor"
        x[:, 0] = 448.0
        return x, None, codes, torch.ones(N, dtype=self.dtype), self.bias, "per_token"

    def result(self, gemm: str) -> np.ndarray:
        x = self.x.copy()
        if gemm == "fp8_prologue_gemm":
            x[:, 0] = 448.0
        return x @ self.w.T + (self.b if self.bias is not None else 0.0)


def mxfp4(values: np.ndarray) -> tuple[Tensor, Tensor]:
    """Codes and scales of values that FP4 holds; the scales are 2, so the codes are of half the values."""
    codes = (values / 2).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), torch.full(
        (len(values), K // 32), 128, dtype=torch.uint8
    )


def raw_bytes(argument: Any) -> bytes | None:
    return argument.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if isinstance(argument, Tensor) else None


def gemm_op(gemm: str) -> Any:
    return getattr(OPS, gemm.split()[0])


# --- what is registered


def test_these_ops_and_no_others_are_defined() -> None:
    defined = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert (
        sorted(name.removeprefix("quark_inductor::") for name in defined if name.startswith("quark_inductor::"))
        == NAMES
    )
    # amd-quark's own namespace is not ours to add to; it is not imported here.
    assert [name for name in defined if name.startswith("quark::")] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_functional_and_may_be_compiled(name: str) -> None:
    op = getattr(OPS, name).default
    assert not op._schema.is_mutable
    assert all(argument.alias_info is None for argument in (*op._schema.arguments, *op._schema.returns))
    assert torch.Tag.pt2_compliant_tag in op.tags


# --- opcheck: schema, fake, autograd registration, AOT with symbolic sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gemm", GEMMS)
def test_opcheck_of_the_gemms(gemm: str, bias: bool, dtype: torch.dtype) -> None:
    args = Operands(dtype, bias).args(gemm)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(a, Tensor) and a.dtype == FP8 for a in args):
        checks.append("test_schema")  # torch compares no FP8 tensors, which this one does
    before = [raw_bytes(a) for a in args]
    torch.library.opcheck(gemm_op(gemm), args, test_utils=checks)
    assert [raw_bytes(a) for a in args] == before


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemm", GEMMS)
def test_fake_of_the_gemms_with_symbolic_sizes(gemm: str, dtype: torch.dtype) -> None:
    args = Operands(dtype, bias=True).args(gemm)
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    weight = next(i for i in places if args[i].ndim == 2 and len(args[i]) == N)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = dict(zip(places, tensors, strict=True))
        y = gemm_op(gemm)(*(given.get(i, a) for i, a in enumerate(args)))
        return y, given[0].view(torch.uint8) + 1, given[weight].view(torch.uint8) + 1

    result, tokens, features = symbolic(call, *(args[i] for i in places))
    assert result.dtype == dtype
    assert isinstance(result.shape[0], torch.SymInt)
    assert isinstance(result.shape[1], torch.SymInt)
    assert result.shape == (tokens.shape[0], features.shape[0])


# --- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("m", [0, 1, M])
def test_the_gemms_are_exact_on_small_whole_numbers(gemm: str, bias: bool, dtype: torch.dtype, m: int) -> None:
    operands = Operands(dtype, bias, m)
    y = gemm_op(gemm)(*operands.args(gemm))
    expected = torch.from_numpy(operands.result(gemm))
    assert torch.equal(expected.to(dtype).double(), expected) or gemm == "fp8_prologue_gemm"
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize_has_the_dtype_it_is_asked_for(dtype: torch.dtype) -> None:
    codes = torch.tensor([[0x21] * 16], dtype=torch.uint8)  # 0.5 and 1
    values = OPS.block_dequantize(codes, torch.tensor([[130]], dtype=torch.uint8), "mxfp4", ops.dtype_name(dtype))
    assert values.dtype == dtype
    assert values.tolist() == [[4.0, 8.0] * 16]


# --- errors


UNKNOWN = {
    "format of quantize": lambda x, c, s: OPS.block_quantize(x, "mxfp5", "even"),
    "scale rule of quantize": lambda x, c, s: OPS.block_quantize(x, "mxfp4", "odd"),
    "format of dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "mxfp5", "float32"),
    "x format of gemm": lambda x, c, s: OPS.block_gemm(c, s, c, s, None, "mxfp5", "mxfp4", "float32"),
    "weight format of gemm": lambda x, c, s: OPS.block_gemm(c, s, c, s, None, "mxfp4", "mxfp5", "float32"),
    "x format of prologue gemm": lambda x, c, s: OPS.block_prologue_gemm(x, c, s, None, "mxfp5", "even", "mxfp4"),
    "scale rule of prologue gemm": lambda x, c, s: OPS.block_prologue_gemm(x, c, s, None, "mxfp4", "odd", "mxfp4"),
    "weight format of prologue gemm": lambda x, c, s: OPS.block_prologue_gemm(x, c, s, None, "mxfp4", "even", "mxfp5"),
    "rule of another format": lambda x, c, s: OPS.block_quantize(x, "mxfp4", "rceil"),
    "global scale too many": lambda x, c, s: OPS.block_quantize(x, "mxfp4", "even", x[0, 0]),
    "global scale too few": lambda x, c, s: OPS.block_quantize(x, "nvfp4", "combined"),
    "global scale too few to dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "nvfp4", "float32"),
    "global scale too many to dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "mxfp4", "float32", x[0, 0]),
    "dtype of dequantize": lambda x, c, s: OPS.block_dequantize(c, s, "mxfp4", "float31"),
    "dtype of gemm": lambda x, c, s: OPS.block_gemm(c, s, c, s, None, "mxfp4", "mxfp4", "float31"),
    "dtype of fp8 gemm": lambda x, c, s: OPS.fp8_gemm(x.to(FP8), x[0, 0], x.to(FP8), x[0, 0], None, "float31"),
}


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("mode", ["eager", "fake", "symbolic"])
def test_an_unknown_name_is_an_error_that_says_it(what: str, mode: str) -> None:
    x, codes, scales = torch.ones(2, 64), torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    call = UNKNOWN[what] if mode == "eager" else make_fx(UNKNOWN[what], tracing_mode=mode)
    with pytest.raises(
        ValueError, match=r"mxfp5|odd|float31|'rceil' for mxfp4|mxfp4 has no global scale|nvfp4 needs a global"
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
