"""Packed weights of a ``QuarkLinear``: nothing changes but the bytes' places, with a toy layout and with the CPU's."""

import copy
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.schemes import layout
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.layout import Layout, Stored
from quark_inductor.schemes.plan import parse
from quark_inductor.schemes.spec import PRESETS

SCHEMES = sorted(name for name in PRESETS)
N, K = 72, 128


class Reversed(Layout):
    """The bytes backwards, one tensor after the other."""

    name, device_type, rows = "reversed", "meta", 1

    def refuses(self, tensors: Sequence[Tensor], stored: Stored) -> str | None:
        return None

    def pack(self, tensors: Sequence[Tensor], stored: Stored) -> Tensor:
        return torch.cat([t.contiguous().view(torch.uint8).flatten() for t in tensors]).flip(0)

    def unpack(self, packed: Tensor, stored: Stored) -> list[Tensor]:
        raise NotImplementedError


@pytest.fixture
def toy() -> Iterator[None]:
    layout.register_layout(Reversed)
    yield
    del layout._LAYOUTS["reversed"]


def quantized(scheme: str, n: int = N) -> QuarkLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, n, dtype=torch.bfloat16))
    qi.quantize_(model, scheme, exclude=(), calibration=[torch.randn(5, K, dtype=torch.bfloat16)])
    linear = model[0]
    assert isinstance(linear, QuarkLinear)
    return linear


def bytes_of(tensors: dict[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing_changes_no_number_and_no_checkpoint(scheme: str) -> None:
    linear = quantized(scheme)
    assert linear.packed is not None
    assert "weight" not in dict(linear.named_parameters())
    x = torch.randn(3, K, dtype=torch.bfloat16)
    y, state = linear(x), bytes_of(linear.state_dict())
    linear.unpack_()
    assert linear.packed is None
    assert bytes_of(linear.state_dict()) == state
    assert torch.equal(linear(x), y)
    # No byte more than the padding of N and K, here to 128 channels.
    plain = sum(getattr(linear, name).nbytes for name in linear.scheme.stored(linear).names)  # type: ignore[union-attr]
    linear.pack_()
    assert linear.weight_packed.nbytes == plain * 128 // N


@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "int8", "int4_wo_32"])
def test_another_device_gets_the_checkpoint_s_layout(scheme: str) -> None:
    linear = quantized(scheme)
    names = set(linear.state_dict())
    linear.to("meta")
    assert linear.packed is None
    assert set(dict(linear.named_parameters())) == names


def test_a_layout_is_that_of_its_device(toy: None) -> None:
    linear = quantized("mxfp4").to("meta")
    assert linear.packed is not None
    assert linear.packed[0].name == "reversed"
    assert linear.weight_packed.shape == (N * (K // 2 + K // 32),)


def test_a_name_is_taken_once(toy: None) -> None:
    with pytest.raises(QuarkInductorError, match="two layouts are named 'reversed'"):
        layout.register_layout(Reversed)
    with pytest.raises(ValueError, match=r"no layout 'x'; expected one of aiter_16x16, panel64, reversed"):
        layout.named("x")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_packed_linear_is_copied_and_loaded(how: str) -> None:
    linear = quantized("nvfp4")
    x = torch.randn(3, K, dtype=torch.bfloat16)
    if how == "deepcopy":
        other = copy.deepcopy(linear)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(linear, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = quantized("nvfp4")
        for p in other.parameters():
            p.data.zero_()
        other.load_state_dict(linear.state_dict())
    assert other.packed is not None
    assert torch.equal(other(x), linear(x))


def test_at_load_unpacks() -> None:
    linear = quantized("mxfp4")
    x = torch.randn(3, K, dtype=torch.bfloat16)
    y = linear(x)
    linear.dequantize_()
    assert set(dict(linear.named_parameters())) == {"weight", "bias"}
    assert torch.equal(linear(x), y)


def test_what_no_layout_takes_stays_as_it_is() -> None:
    linear = quantized("mxfp4")
    linear.unpack_()
    linear.weight_scale.data[3, 1] = 191  # 2^64: kernels of packed weights add exponents
    linear.pack_()
    assert linear.packed is None


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "mxfp6_e2m3", "ptpc_fp8", "fp8_block128", "int8", "int4_fp8"])
def test_the_op_that_compiled_code_calls(scheme: str) -> None:
    """Composite: opcheck sees what it is made of, with static and with symbolic sizes."""
    linear = quantized(scheme)
    tensors = [p.data for p in linear.parameters()]
    # Not test_schema: of a composite op it looks at every result inside, and cannot compare FP8.
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    x = torch.randn(2, 3, K, dtype=torch.bfloat16)
    args = x, tensors, linear.plan
    torch.library.opcheck(torch.ops.quark_inductor.linear.default, args, test_utils=checks)
    packed = torch.ops.quark_inductor.linear(*args)
    linear.unpack_()
    assert torch.equal(packed, linear(x))


@pytest.mark.parametrize(
    ("scheme", "format"),
    [("mxfp4", "mxfp4"), ("ptpc_fp8", "fp8_e4m3"), ("int8_weight_only", "int8"), ("int4_wo_32", "int4")],
)
def test_a_fused_gemm_reads_a_packed_weight(scheme: str, format: str) -> None:
    """The eager form of the op that rules make, of both layouts."""
    linear = quantized(scheme)
    assert linear.packed is not None
    rows, columns = linear.packed[1].shape
    named = {"weight_scale_2": None, "weight_zero_point": None, **linear.state_dict()}
    x, gemm = torch.randn(5, K, dtype=torch.bfloat16), torch.ops.quark_inductor.weight_only_gemm
    rest = named["weight_scale_2"], named["weight_zero_point"], named["bias"], format
    plain = gemm(x, named["weight"], named["weight_scale"], *rest)
    scale = None if "weight_scale" in linear.packed[1].names else named["weight_scale"]
    args = x, linear.weight_packed.data, scale, *rest, "panel64", rows, columns
    assert torch.equal(gemm(*args), plain)
    torch.library.opcheck(gemm.default, args, test_utils=["test_faketensor"])


def test_a_plan_is_read_as_it_was_written() -> None:
    for scheme in SCHEMES:
        plan = quantized(scheme).plan
        assert plan is not None
        assert parse(plan).text() == plan


@pytest.mark.parametrize(
    ("scheme", "activation"),
    [
        ("mxfp4", "mxfp4"),
        ("mxfp4_fp8", "fp8_e4m3"),
        ("mxfp4_weight_only", ""),
        ("nvfp4", "nvfp4"),
        ("ptpc_fp8", "fp8_e4m3"),
        ("int8", "int8"),
        ("int4_wo_32", ""),
        ("int4_fp8", "fp8_e4m3"),
    ],
)
def test_a_layout_is_told_what_the_weight_is_multiplied_with(scheme: str, activation: str) -> None:
    linear = quantized(scheme)
    assert linear.packed is not None
    assert linear.packed[1].activation == activation
    assert linear.plan is not None
    assert parse(linear.plan).stored == linear.packed[1]


class Whole(Reversed):
    """No part of a packed weight is one."""

    device_type, rows = "cpu", 0

    def unpack(self, packed: Tensor, stored: Stored) -> list[Tensor]:
        codes, scales = packed.flip(0).split((N * K // 2, N * K // 32))
        return [codes.view(stored.shape), scales.view(N, K // 32)]


def test_a_layout_without_parts_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_LAYOUTS", {"reversed": Whole(), **layout._LAYOUTS})
    linears = [quantized("mxfp4") for _ in range(2)]
    x = torch.randn(3, K, dtype=torch.bfloat16)
    before = linears[0](x)
    assert QuarkLinear.merge_(linears) == "they are packed as reversed, of which no part is a weight"
    assert linears[0].packed is not None
    assert linears[0].merged is None
    assert torch.equal(linears[0](x), before)


def test_a_packed_parameter_is_not_replaced_by_accident() -> None:
    linear = quantized("mxfp4")
    with pytest.raises(QuarkInductorError, match="weight is packed as panel64: call unpack_"):
        linear.weight = nn.Parameter(torch.zeros(N, K // 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AttributeError, match="no attribute 'weight_zero_point'"):
        _ = linear.weight_zero_point
