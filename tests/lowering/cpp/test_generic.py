"""The kernels of ``generic.h``, for every pair of formats, against float64 products of operands by the oracle.

Their operands are the emulation's, rounded where it rounds, so only the sum in float32 and the result's dtype leave
anything to tolerate.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from quark_inductor.lowering.cpp import kernels

q = torch.ops.quark_inductor


def own_kernel(weight: Any, x: Any) -> bool:
    """The two pairs of formats that do not come here."""
    if x is None or x.format != weight.format:
        return False
    return (x.format == "mxfp4" and x.rule in ("", "even")) or (x.format == "fp8_e4m3" and x.by != "group")


@pytest.fixture(scope="module")
def pairs(gemms: ModuleType) -> Any:
    """Groups of columns are no multiples of 8."""
    return gemms.Pairs(gemms.Columns(weight=6, weight_block=24, activation=9), own_kernel)


def test_every_format_occurs(pairs: Any) -> None:
    pairs.check_all_occur()


def any_m(inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Mark the number of rows of every tensor as not known before run time."""
    for tensor in torch.utils._pytree.tree_leaves(inputs):
        if tensor.ndim:
            torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


def test_any_number_of_rows(isa: str, oracle: ModuleType, gemms: ModuleType, pairs: Any) -> None:
    """One kernel for every M; 600 is more than the 512 rows prepared at a time, 32 rows a tile."""
    model = gemms.Gemms(list(pairs)[:: 6 if isa == "portable" else 1], oracle)
    compiled = torch.compile(model, backend="quark", fullgraph=True)
    first = any_m(model.inputs(5))
    outputs, (code,) = run_and_get_code(compiled, first)
    assert code.count("quark::generic::tile(") == len(model.pairs)
    model.check(first, outputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (2, 3, 8, 9, 33, 600):
            inputs = model.inputs(m)
            model.check(inputs, compiled(inputs))
        # The roundings of the operands: a sum of many in bfloat16 would hide them.
        model.keep_one_of_each_channel()
        inputs = model.inputs(40)
        model.check(inputs, compiled(inputs), exactly=True)


def test_a_number_of_rows_known_when_compiling(isa: str, oracle: ModuleType, gemms: ModuleType, pairs: Any) -> None:
    """Up to 32 rows a tile of just so many."""
    model = gemms.Gemms(list(pairs)[1::10] if isa == "portable" else list(pairs)[2::7], oracle)
    inputs = model.inputs(1, 1, 3, 8, 9, 32, 33)
    model.check(inputs, torch.compile(model, backend="quark", fullgraph=True, dynamic=False)(inputs))


def test_no_rows(oracle: ModuleType, gemms: ModuleType, pairs: Any) -> None:
    model = gemms.Gemms(list(pairs)[2:3], oracle)
    (y,) = torch.compile(model, backend="quark", fullgraph=True)(model.inputs(0))
    assert y.shape == (0, model.sizes[0][0])


@pytest.fixture
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's numbers are wanted, also where the emulation would be faster and the provider says no."""
    monkeypatch.setattr(kernels, "_MANY_TOKENS", 1 << 20)


# --- edges of the formats


@pytest.mark.usefixtures("any_number_of_tokens")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_every_fifth_bfloat16(oracle: ModuleType, pairs: Any, dtype: torch.dtype) -> None:
    """Every fifth number of bfloat16 as the largest of its block or row, with others from it down to nothing.

    The weight is the identity in int8, which shows the activation itself: bit by bit, but for blocks whose numbers are
    not finite. Each activation comes in one dtype and those whose scale rounds in both.
    """
    rounding = [x for x in pairs.prologues if x.rule in ("nearest", "amax", "symmetric", "asymmetric")]
    others = [x for x in pairs.prologues if x not in rounding and x.rule != "given"]
    chosen = [*rounding, *others] if dtype is torch.bfloat16 else rounding[::2] + others[::2]
    numbers = torch.arange(0, 65536, 5, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    ratios = {k: torch.tensor([1, -1, 0, *(i / k * (-1) ** i for i in range(k - 3))]).double() for k in (32, 18)}

    def k_of(x: Any) -> int:
        return 18 if x.by == "group" else 32

    inputs = {k: (numbers[:, None] * ratio).to(dtype) for k, ratio in ratios.items()}
    weights = {k: torch.eye(k, dtype=torch.int8) for k in ratios}
    one, half = torch.ones(()), torch.tensor(0.37)

    def products(inputs: dict[int, Tensor]) -> list[Tensor]:
        return [
            q.prologue_gemm(
                inputs[k_of(x)],
                None,
                half if x.format == "nvfp4" else None,
                None,
                weights[k_of(x)],
                one,
                *(None, None, None),
                x.format,
                x.rule,
                x.columns,
                "int8",
            )
            for x in chosen
        ]

    for x, y in zip(chosen, torch.compile(products, backend="quark", fullgraph=True)(inputs), strict=True):
        values = inputs[k_of(x)]
        expected = oracle.quantized_values(
            values, None, half if x.format == "nvfp4" else None, None, x.format, x.rule, x.columns
        )
        finite = torch.from_numpy(np.isfinite(expected).all(-1))
        assert 0.9 < finite.double().mean() < 1, x
        assert torch.equal(y[finite], torch.from_numpy(expected).to(dtype)[finite]), x
        assert not y[~finite].isfinite().all(-1).any(), x


@pytest.mark.usefixtures("any_number_of_tokens")
@pytest.mark.parametrize("format", ["mxfp8_e4m3", "nvfp4", "amdfp4_g32"])
def test_every_scale_byte(oracle: ModuleType, gemms: ModuleType, format: str) -> None:
    """Of a weight and of an activation: E8M0, E4M3, E5M3, of which 0 is eps in an activation."""
    size, k = gemms.BLOCK_SIZES[format], 64
    codes_of = torch.zeros(256, k // (1 if "fp8" in format else 2), dtype=torch.uint8)
    codes_of[:, -1] = 0x31
    scales = torch.full((256, k // size), 0x38, dtype=torch.uint8)
    scales[:, -1] = torch.arange(256)
    global_scale = torch.tensor(0.5) if format == "nvfp4" else None
    held = (
        codes_of.view(torch.float8_e4m3fn) if "fp8" in format else codes_of,
        (scales.view(torch.float8_e4m3fn) if format == "nvfp4" else scales),
    )
    ones, one = torch.ones(1, k), torch.ones(())
    by = torch.ones(1, k, dtype=torch.int8)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        as_weight = q.weight_only_gemm(x, *held, global_scale, None, None, format)
        return as_weight, q.quantized_gemm(
            held[0], held[1], global_scale, None, by, one, None, None, None, format, "int8", "float32"
        )

    as_weight, as_activation = torch.compile(both, backend="quark", fullgraph=True)(ones)
    for y, values_of in (
        (as_weight, lambda: oracle.weight_values(*held, global_scale, None, format, torch.float32)),
        (as_activation.t(), lambda: oracle.activation_values(*held, global_scale, None, format, torch.float32)),
    ):
        # At most two numbers that are not 0 in a row, the second 3 times the first: their sum is exact.
        expected = values_of().sum(-1)
        np.testing.assert_array_equal(y.numpy()[0], expected)
        assert 1 <= np.isnan(expected).sum() <= 2
