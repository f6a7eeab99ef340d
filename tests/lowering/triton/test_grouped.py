"""Every fused GEMM of several experts for every chip, in the interpreter, against float64 products of each expert's.

What runs is what Inductor generates for the chip, from ``offsets`` that only the kernel sees.
"""

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quark_inductor.lowering._inductor import select_choice
from quark_inductor.lowering.base import GemmProblem, forcing
from quark_inductor.lowering.triton import grouped, template

q = torch.ops.quark_inductor
# K is a multiple of it.
STEP = 32
MAIN = ("gfx942", "gfx950", "sm_90", "sm_100", "sm_120")
OTHERS = ("gfx1100", "sm_80", "sm_89")
# Rows of each expert, and of nobody at the end. In the mean an expert has so few that the GEMM quantizes, or more.
FEW = ((5, 0, 1, 0), (0, 17, 2, 3, 4), (1, 0), (0, 0, 40, 0), (7, 1, 0, 0, 3), (0, 0, 6))
MANY = ((40, 0, 33, 1, 9), (0, 150, 3, 70), (130, 0), (16, 16, 16, 5))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """With a first dimension of experts; each lies in memory as it did."""
    if tensors[0].ndim == 2 and not tensors[0].is_contiguous():
        return torch.stack([t.t() for t in tensors]).transpose(1, 2)
    return torch.stack(list(tensors))


class Grouped:
    """A GEMM of each expert, by one op.

    Args:
        gemms: ``gemms.py``.
        oracle: ``oracle.py``.
        pair: formats of weight and activation.
        i: decides size, dtype, bias, and whether experts have scales of their own where one is given for all.
        counts: rows of each expert, and of nobody.
    """

    def __init__(self, gemms: ModuleType, oracle: ModuleType, pair: Any, i: int, counts: Sequence[int]) -> None:
        self.weight, self.x = pair

        class One(gemms.Gemms):  # type: ignore[misc, name-defined]
            def size(self, _: int) -> tuple[int, int]:
                k, rows = super().size(0)[1], pair[0].steps[0]
                return rows * -(-(1, 31, 32, 33, 70)[i % 5] // rows), k * (1, 3, 2, 5)[i % 4]

            def dtype(self, _: int) -> torch.dtype:
                dtype: torch.dtype = gemms.DTYPES[i % 3]
                return dtype

        generator = torch.Generator().manual_seed(i)
        one = One([pair], oracle, STEP)
        (n, k), dtype = one.size(0), one.dtype(0)
        self.experts = []
        for _ in counts[1:]:
            expert = copy.copy(one)
            expert.weights = [gemms.weight_tensors(self.weight, n, k, dtype, generator)]
            expert.biases = [torch.randn(n, generator=generator).to(dtype) if i % 2 else None]
            expert.values = expert.weight_values()
            self.experts.append(expert)
        held = [e.weights[0] for e in self.experts]
        self.tensors = {suffix: stacked([of[suffix] for of in held]) for suffix in held[0]}
        self.bias = [stacked([e.biases[0] for e in self.experts])] if i % 2 else []
        self.ends = torch.tensor(counts[:-1]).cumsum(0).to(torch.int32)
        self.input = gemms.activation_tensors(self.x, sum(counts), k, dtype, generator)
        for suffix in ("_scale", "_scale_2", "_zero_point"):
            if suffix in self.input and self.input[suffix].ndim == 0 and (i % 3 or "_zero_point" in self.input):
                others = [
                    gemms.activation_tensors(self.x, 1, k, dtype, generator)[suffix] * (1 + j)
                    for j in range(len(self.experts))
                ]
                self.input[suffix] = torch.stack(others)
        self.arguments, self.dtype = gemms.arguments, dtype

    def __call__(
        self, held: dict[str, Tensor], weight: dict[str, Tensor], bias: list[Tensor], offsets: Tensor
    ) -> Tensor:
        x, format = self.x, self.weight.format
        by_weight = *self.arguments(weight), *(bias or [None])
        if x is None:
            y = q.weight_only_gemm(held[""], *by_weight, format, offsets=offsets)
        elif x.rule == "":
            dtype = str(self.dtype).removeprefix("torch.")
            y = q.quantized_gemm(*self.arguments(held), *by_weight, x.format, format, dtype, offsets=offsets)
        else:
            rest = x.format, x.rule, x.columns, format
            y = q.prologue_gemm(*self.arguments(held), *by_weight, *rest, offsets=offsets)
        result: Tensor = y
        return result

    def run(self, on_gpu: Callable[..., list[Tensor]], arch: str, **options: Any) -> Tensor:
        flat, form = pytree.tree_flatten((self.input, self.tensors, self.bias, self.ends))

        def function(*tensors: Tensor) -> tuple[Tensor]:
            return (self(*pytree.tree_unflatten(list(tensors), form)),)

        (y,) = on_gpu(function, arch, *flat, **options)
        return y

    def check(self, y: Tensor, *, precise: bool) -> None:
        """Each expert's rows are its products, and those of nobody are zeros."""
        begin = 0
        for e, (expert, end) in enumerate(zip(self.experts, self.ends.tolist(), strict=True)):
            if begin == end:
                continue
            own = {
                suffix: t[begin:end] if suffix == "" or t.ndim == 2 else t[e] if t.ndim else t
                for suffix, t in self.input.items()
            }
            (expert.check if precise else expert.check_either)([own], [y[begin:end]])
            begin = end
        assert torch.equal(y[begin:], torch.zeros_like(y[begin:]))


@pytest.fixture(scope="module")
def pairs(gemms: ModuleType) -> list[Any]:
    every = gemms.Pairs(gemms.Columns(weight=64, weight_block=32, activation=64), lambda weight, x: False)
    return list(every)


def parameters() -> list[Any]:
    """A fifth of the pairs for each chip, another for each, and the rest for those with time."""
    found = []
    for arch in (*MAIN, *OTHERS):
        for part in range(len(MAIN)):
            by_default = arch == MAIN[part]
            marks = [] if by_default else [pytest.mark.fuzz]
            found.append(pytest.param(arch, part, marks=marks, id=f"{arch}-{part}"))
    return found


@pytest.mark.parametrize(("arch", "part"), parameters())
@pytest.mark.parametrize("precise", [False, True], ids=["", "emulate_precision_casts"])
def test_every_pair_of_formats(
    on_gpu: Callable[..., list[Tensor]],
    gemms: ModuleType,
    oracle: ModuleType,
    pairs: list[Any],
    arch: str,
    part: int,
    precise: bool,
) -> None:
    wrong, ran = [], 0
    chosen = list(enumerate(pairs))[part :: len(MAIN)]
    for i, (weight, x) in chosen if not precise else chosen[::4]:
        formats = weight.format, x.format if x else ""
        if arch == "sm_80" and any("fp8" in format or format == "nvfp4" for format in formats):
            continue
        # A group that is computed must lie in those of the weight: here 64 columns in 32.
        has_prologue = x is not None and x.rule != ""
        if has_prologue and x.by == "group" and weight.format.endswith("x32"):
            continue
        counts = (FEW if has_prologue else FEW + MANY)[i % (len(FEW) if has_prologue else len(FEW + MANY))]
        case = Grouped(gemms, oracle, (weight, x), i, counts)
        y = case.run(on_gpu, arch, emulate_precision_casts=precise)
        ran += 1
        try:
            case.check(y, precise=precise)
        except AssertionError as error:
            wrong.append(f"{counts}: {error}")
    assert not wrong, "\n".join(wrong)
    assert ran


def test_many_experts(on_gpu: Callable[..., list[Tensor]], gemms: ModuleType, oracle: ModuleType) -> None:
    """More than rows; most have none."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.multinomial(torch.ones(140), 60, True, generator=generator).bincount(minlength=140).tolist()
    case = Grouped(gemms, oracle, (gemms.Weight("mxfp4"), gemms.Activation("mxfp4", "even")), 2, counts)
    case.check(case.run(on_gpu, "gfx950"), precise=False)


def test_there_are_as_many_programs_as_tiles() -> None:
    """Or more, whatever the offsets are."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        experts, height = int(torch.randint(1, 9, (), generator=generator)), 16
        counts = torch.randint(0, 40, (experts + 1,), generator=generator)
        counts *= torch.rand(experts + 1, generator=generator) > 0.4
        rows = int(counts.sum())
        programs, *others = grouped.grid(
            rows, 5, {"BLOCK_M": height, "BLOCK_N": 1, "EXPERTS": experts}, cdiv=lambda a, b: -(-a // b), min=min
        )
        assert others == [1, 1]
        assert int((counts + height - 1).div(height, rounding_mode="floor").sum()) * 5 <= programs
        assert programs <= 5 * rows


def test_a_program_writes_no_rows_of_others(interpreter: Any, generated: ModuleType, fake_gpu: ModuleType) -> None:
    """Which one writes last is not known on a GPU."""
    inputs, written = some_gemm(), list[Tensor]()

    def run_one_program(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        arguments["out_ptr0"].fill_(torch.nan)
        after = interpreter.run(kernel.interpreted, kernel.name, arguments, (1, 1, 1))
        written.append(after["out_ptr0"])

    with forcing("triton"):
        code = fake_gpu.gpu_code(generated.graph_of(lambda *t: (by_experts(*t),), *inputs).graph, "sm_90")
    generated.call(code, inputs, run_one_program)
    rows = written[0].isfinite().any(1)
    assert rows.tolist() == [True] * 3 + [False] * 21


def some_gemm() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 256, generator=generator).bfloat16()
    weight = torch.randint(0, 256, (3, 96, 128), generator=generator, dtype=torch.uint8)
    scale = torch.randint(118, 124, (3, 96, 8), generator=generator, dtype=torch.uint8)
    offsets = torch.tensor([3, 3, 19], dtype=torch.int32)
    return x, weight, scale, offsets, torch.randn(3, 96, generator=generator).bfloat16()


def by_experts(x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    rest = "mxfp4", "even", 0, "mxfp4"
    y: Tensor = q.prologue_gemm(x, None, None, None, weight, scale, None, None, bias, *rest, offsets=offsets)
    return y


@pytest.mark.parametrize("arch", ["gfx950", "sm_90"])
def test_an_epilogue_is_fused(
    on_gpu: Callable[..., list[Tensor]], generated: ModuleType, fake_gpu: ModuleType, arch: str
) -> None:
    """What follows is part of the kernel that writes the result, also where it is not of an expert's product."""
    inputs = *some_gemm(), torch.randn(24, 96).bfloat16()

    def layer(*tensors: Tensor) -> tuple[Tensor]:
        return (torch.nn.functional.silu(by_experts(*tensors[:-1])) + tensors[-1] + 1,)

    (y,) = on_gpu(layer, arch, *inputs)
    (expected,) = layer(*inputs)
    product, residual = by_experts(*inputs[:-1]).float(), inputs[-1].float()
    # The product is rounded to bfloat16 once, what follows too; |silu'| < 1.1.
    assert ((y.float() - expected.float()).abs() <= 4 * 2.0**-8 * (product.abs() + residual.abs() + 2)).all()
    code = fake_gpu.gpu_code(generated.graph_of(layer, *inputs).graph, arch)
    assert [kernel.kind for kernel in generated.kernels(code)] == ["template"]


def test_what_is_measured(generated: ModuleType, fake_gpu: ModuleType) -> None:
    """Tiles, by offsets with which no row is nobody's."""
    seen: list[tuple[list[str], Any]] = []

    def first(name: str, choices: list[Any], inputs: Any, layout: Any, made: Any) -> Any:
        seen.append(([choice.name for choice in choices], [inputs[place].get_dtype() for place in made]))
        return select_choice(name, choices[:1], inputs, layout)

    with forcing("triton"), patch.object(template, "select_choice", first):
        graph = generated.graph_of(lambda *t: (by_experts(*t),), *some_gemm()).graph
        fake_gpu.gpu_code(graph, "sm_90", max_autotune=True)
    ((names, made),) = seen
    assert len(names) >= 2
    assert all(name.startswith("triton_quark_prologue_gemm") for name in names)
    assert made == [torch.int32]
    problem = GemmProblem(op="prologue_gemm", m=25, n=96, k=256, dtype="bfloat16", experts=3, grouped=True)
    assert grouped.some_offsets(problem).tolist() == [8, 16, 25]
