"""Every fused GEMM for every chip, in the interpreter, against float64 products of operands by the oracle.

What runs is what Inductor generates for the chip: the template with its epilogue, and where K is split the kernel that
adds up. The interpreter's sums are float32, in some order.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.providers import triton
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton import template
from quark_inductor.lowering.triton.chips import CHIPS
from quark_inductor.lowering.triton.tiles import Tile

q = torch.ops.quark_inductor
# K is a multiple of it.
STEP = 32
# Those that prologues take, and others for which tiles are larger.
FEW, MANY = (1, 5, 16), (17, 70, 130)


@pytest.fixture(scope="module")
def pairs(gemms: ModuleType) -> list[Any]:
    every = gemms.Pairs(gemms.Columns(weight=64, weight_block=32, activation=64), lambda weight, x: False)
    every.check_all_occur()
    return list(every)


def one_gemm(gemms: ModuleType, oracle: ModuleType, pair: Any, i: int) -> Any:
    """``Gemms`` of a pair, whose size and dtype depend on a number."""

    class One(gemms.Gemms):  # type: ignore[misc, name-defined]
        def size(self, _: int) -> tuple[int, int]:
            k, rows = super().size(0)[1], pair[0].steps[0]
            return rows * -(-(1, 31, 32, 33, 70)[i % 5] // rows), k * (1, 3, 2, 5)[i % 4]

        def dtype(self, _: int) -> torch.dtype:
            dtype: torch.dtype = gemms.DTYPES[i % 3]
            return dtype

    return One([pair], oracle, STEP)


def run_one(on_gpu: Callable[..., list[Tensor]], model: Any, arch: str, inputs: Any, **options: Any) -> list[Tensor]:
    """``model(inputs)``, whose weights are inputs of the graph too."""
    flat, form = pytree.tree_flatten((inputs, model.weights, model.biases))

    def function(*tensors: Tensor) -> Any:
        inputs, weights, biases = pytree.tree_unflatten(list(tensors), form)
        kept = model.weights, model.biases
        model.weights, model.biases = weights, biases
        try:
            return tuple(model(inputs))
        finally:
            model.weights, model.biases = kept

    return on_gpu(function, arch, *flat, **options)


def refused(model: Any, pair: Any, arch: str, m: int) -> bool:
    """Whether the chip cannot have such operands, or the provider says that K cannot be cut for their scales."""
    weight, x = pair
    formats = weight.format, x.format if x else ""
    if arch == "sm_80" and any("fp8" in format or format == "nvfp4" for format in formats):
        return True
    # A group that is computed must lie in those of the weight: here 64 columns in 32.
    return x is not None and x.rule != "" and x.by == "group" and weight.format.endswith("x32")


# Kernels of the others differ from those in sizes of tiles.
MAIN = ("gfx942", "gfx950", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("arch", [*MAIN, *(pytest.param(a, marks=pytest.mark.fuzz) for a in CHIPS if a not in MAIN)])
@pytest.mark.parametrize("precise", [False, True], ids=["", "emulate_precision_casts"])
def test_every_pair_of_formats(
    on_gpu: Callable[..., list[Tensor]],
    gemms: ModuleType,
    oracle: ModuleType,
    pairs: list[Any],
    arch: str,
    precise: bool,
) -> None:
    # Chips differ in what they multiply natively; rounded operands are numbers on all of them.
    chosen = pairs if not precise or arch == "sm_90" else pairs[:: 7 if arch.startswith("gfx") else 9]
    wrong, ran = [], 0
    for i, pair in enumerate(chosen):
        model = one_gemm(gemms, oracle, pair, i)
        has_prologue = pair[1] is not None and pair[1].rule != ""
        m = (FEW if has_prologue else FEW + MANY)[i % (3 if has_prologue else 6)]
        if refused(model, pair, arch, m):
            continue
        inputs = model.inputs(m)
        outputs = run_one(on_gpu, model, arch, inputs, emulate_precision_casts=precise)
        ran += 1
        try:
            (model.check if precise else model.check_either)(inputs, outputs)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    assert ran >= (len(chosen) // 3 if arch == "sm_80" else len(chosen) - 2)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_90", "sm_100"])
def test_k_is_split(
    on_gpu: Callable[..., list[Tensor]], gemms: ModuleType, oracle: ModuleType, generated: ModuleType, arch: str
) -> None:
    """Few tokens by few channels: several programs share a tile, and a second kernel adds up."""
    x = gemms.Activation("fp8_e4m3", "amax", "token")

    class Deep(gemms.Gemms):  # type: ignore[misc, name-defined]
        def size(self, i: int) -> tuple[int, int]:
            return 70, 4096

        def dtype(self, i: int) -> torch.dtype:
            return torch.bfloat16

    model = Deep([(gemms.Weight("fp8_e4m3", "channel"), x)], oracle)
    inputs = model.inputs(5)
    model.check_either(inputs, run_one(on_gpu, model, arch, inputs))


@pytest.mark.parametrize("precise", [False, True], ids=["", "emulate_precision_casts"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_90", "sm_100"])
def test_tiles_lie_in_blocks(
    on_gpu: Callable[..., list[Tensor]], gemms: ModuleType, oracle: ModuleType, arch: str, precise: bool
) -> None:
    """A block of the weight is as high as a tile, or higher: its scale is one number. N ends within a block."""

    class Wide(gemms.Gemms):  # type: ignore[misc, name-defined]
        def size(self, i: int) -> tuple[int, int]:
            return 330, 256

        def dtype(self, i: int) -> torch.dtype:
            return torch.bfloat16

    for rule, by, m in (("amax", "group", 5), ("", "group", 130), ("", "token", 130), ("given", "tensor", 17)):
        x = gemms.Activation("fp8_e4m3", rule, by, 128 if by == "group" else 0)
        model = Wide([(gemms.Weight("fp8_e4m3_128x128"), x)], oracle)
        inputs = model.inputs(m)
        outputs = run_one(on_gpu, model, arch, inputs, emulate_precision_casts=precise)
        (model.check if precise else model.check_either)(inputs, outputs)


@pytest.mark.parametrize(("m", "k"), [(40, 1024), (130, 1024), (130, 768), (40, 128)])
def test_blocks_are_multiplied_in_another_order(
    on_gpu: Callable[..., list[Tensor]],
    gemms: ModuleType,
    oracle: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    k: int,
) -> None:
    """MXFP4 on gfx950, in tiles of 512 and 256 columns: a lane's scales are neighbours. In one of 128 it has one."""

    class Deep(gemms.Gemms):  # type: ignore[misc, name-defined]
        def size(self, i: int) -> tuple[int, int]:
            return 70, k

        def dtype(self, i: int) -> torch.dtype:
            return torch.bfloat16

    sources, make = list[str](), template.kernel

    def kept(*arguments: Any) -> str:
        sources.append(make(*arguments))
        return sources[-1]

    monkeypatch.setattr(template, "kernel", kept)
    model = Deep([(gemms.Weight("mxfp4"), gemms.Activation("mxfp4", "", "block"))], oracle)
    inputs = model.inputs(m)
    model.check_either(inputs, run_one(on_gpu, model, "gfx950", inputs))
    assert ["= block_scales(" in source for source in sources] == [k > 128]


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "sm_100"])
def test_a_tile_of_two_blocks(
    on_gpu: Callable[..., list[Tensor]],
    gemms: ModuleType,
    oracle: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
) -> None:
    """Each half of its columns has a number. N ends within a first half; on sm_100 few tokens are on the right."""

    class Wide(gemms.Gemms):  # type: ignore[misc, name-defined]
        def size(self, i: int) -> tuple[int, int]:
            return 330, 256

        def dtype(self, i: int) -> torch.dtype:
            return torch.bfloat16

    sources, choose, make = list[str](), template.tiles_for, template.kernel

    def wide(*arguments: Any, **options: Any) -> list[Tile]:
        return [dataclasses.replace(tile, n=256, parts=1) for tile in choose(*arguments, **options)]

    def kept(*arguments: Any) -> str:
        sources.append(make(*arguments))
        return sources[-1]

    monkeypatch.setattr(template, "tiles_for", wide)
    monkeypatch.setattr(template, "kernel", kept)
    for by, m in (("group", 130), ("group", 17), ("token", 130)):
        x = gemms.Activation("fp8_e4m3", "", by, 128 if by == "group" else 0)
        model = Wide([(gemms.Weight("fp8_e4m3_128x128"), x)], oracle)
        inputs = model.inputs(m)
        model.check_either(inputs, run_one(on_gpu, model, arch, inputs))
    native = arch != "gfx942"  # whose FP8 is another one
    assert [source.count("w_scale_1 = ") for source in sources] == [native] * 3


def mxfp4(m: int, n: int = 96, k: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    weight = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(118, 124, (n, k // 32), generator=generator, dtype=torch.uint8)
    return torch.randn(m, k, generator=generator).bfloat16(), weight, scale


def by_mxfp4(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = q.prologue_gemm(x, None, None, None, weight, scale, None, None, bias, "mxfp4", "even", 0, "mxfp4")
    return y


@pytest.mark.parametrize("k", [64, 4096], ids=["whole", "split"])
@pytest.mark.parametrize("arch", ["gfx950", "sm_90"])
def test_an_epilogue_is_fused(
    on_gpu: Callable[..., list[Tensor]], generated: ModuleType, fake_gpu: ModuleType, arch: str, k: int
) -> None:
    """Bias, activation and residual are part of the kernel that writes the result."""
    x, weight, scale = mxfp4(5, k=k)
    bias, residual = torch.randn(96).bfloat16(), torch.randn(5, 96).bfloat16()

    def layer(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (F.silu(by_mxfp4(x, weight, scale, bias)) + residual,)

    inputs = x, weight, scale, bias, residual
    (y,) = on_gpu(layer, arch, *inputs)
    (expected,) = layer(*inputs)
    # The product is rounded to bfloat16 once, silu and the sum are too; |silu'| < 1.1.
    product = by_mxfp4(x, weight, scale, bias).float()
    assert ((y.float() - expected.float()).abs() <= 4 * 2.0**-8 * (product.abs() + residual.float().abs() + 1)).all()
    code = fake_gpu.gpu_code(generated.graph_of(layer, *inputs).graph, arch)
    kinds = [kernel.kind for kernel in generated.kernels(code)]
    assert kinds[0] == "template"
    assert len(kinds) == (1 if k == 64 else 2)


# --- what it refuses


GFX950 = Target(device_type="cuda", arch="gfx950")
PROBLEM = GemmProblem(
    op="prologue_gemm",
    m=16,
    n=96,
    k=256,
    dtype="bfloat16",
    weight_format="mxfp4",
    weight_scale_ndim=2,
    x_format="mxfp4",
    scale_rule="even",
)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (Target(device_type="cpu", arch="x86_64"), {}, "for GPUs, the device is cpu"),
        (Target(device_type="cuda", arch="gfx90a"), {}, "does not know gfx90a; it knows gfx942, gfx950, .*"),
        (GFX950, {"op": "toy"}, "has no kernel for toy; it has prologue_gemm, quantized_gemm, weight_only_gemm"),
        (
            GFX950,
            {"dtype": "float64"},
            "the result's dtype is float64; it makes bfloat16, float16, float32: choose one with load\\(dtype=\\)",
        ),
        (GFX950, {"layout": "panel64"}, "has no kernel for the layout panel64, which unpack_\\(\\) undoes"),
        (GFX950, {"experts": 8}, "has no kernel for experts"),
        (GFX950, {"scale_rule": "floor"}, "scale rule 'floor' takes a logarithm, .*"),
        (GFX950, {"m": 0}, "there are no rows"),
        (GFX950, {"m": 17}, "quantizes up to 16 tokens in the GEMM, M is 17"),
        (GFX950, {"m": None}, "quantizes up to 16 tokens in the GEMM, M is not known: compile with dynamic=False"),
        (GFX950, {"x_format": "fp8_e4m3", "scale_rule": "given", "m": 65}, "quantizes up to 64 tokens .*"),
        (GFX950, {"weight_format": "fp8_e4m3fnuz"}, "the chip has no FP8 of the kind fnuz"),
        (GFX950, {"experts": 4, "grouped": True, "m": 65}, "quantizes up to 16 tokens an expert .*, their mean is 17"),
        (
            GFX950,
            {"experts": 4, "grouped": True, "m": None},
            "quantizes up to 16 tokens an expert .* is not known: compile with dynamic=False",
        ),
        (GFX950, {"k": 40}, "K = 40 is not a multiple of 16"),
        (
            GFX950,
            {"weight_format": "fp8_e4m3_16x24", "weight_columns": 24},
            "24 columns share a scale of the weight; .*",
        ),
        (GFX950, {"group_size": 96, "x_columns": 96}, "the activation is quantized by groups of 96; .*"),
        (GFX950, {"group_size": 64, "x_columns": 64, "weight_columns": 32}, "the activation is quantized by .*"),
        (Target(device_type="cuda", arch="sm_80"), {"x_format": "mxfp8_e4m3"}, "Triton has no FP8 on this chip"),
    ],
)
def test_refusals(target: Target, changes: dict[str, Any], reason: str) -> None:
    import re

    provider = triton.Triton()
    assert provider.can_run(GFX950, PROBLEM) is None
    assert provider.can_run(GFX950, dataclasses.replace(PROBLEM, experts=4, grouped=True, m=64)) is None
    of_each = dataclasses.replace(PROBLEM, experts=4, grouped=True, m=None, x_format="nvfp4", weight_format="nvfp4")
    assert provider.can_run(GFX950, of_each) is None
    answer = provider.can_run(target, dataclasses.replace(PROBLEM, **changes))
    assert answer is not None
    assert re.fullmatch(reason, answer.reason)
