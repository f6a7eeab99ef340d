"""The kernels of several experts in one call, against float64 products of operands by the oracle, expert by expert.

A pair of formats has one weight for each expert, packed into panels as loaded models have them, or not. Operands are
those of the emulation, rounded as it rounds them or not at all.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from quark_inductor.lowering import target
from quark_inductor.lowering.cpp.panel64 import NAME, Panel64
from quark_inductor.schemes.layout import Stored

q = torch.ops.quark_inductor
E, K, N = 5, 64, 72

SUFFIXES = ("", "_scale", "_scale_2", "_zero_point")


@pytest.fixture(scope="module")
def pairs(gemms: ModuleType) -> Any:
    return gemms.Pairs(gemms.Columns(weight=16, weight_block=32, activation=16), lambda weight, x: False)


def turned(tensor: Tensor, by: int) -> Tensor:
    """The same numbers in other places; of a number, another one."""
    if tensor.ndim == 0:
        return (tensor * (1 + by / 4)).to(tensor.dtype)
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return raw.roll(by, 0).view(tensor.dtype)


class Experts(nn.Module):
    """A grouped GEMM of each pair of formats, of :class:`gemms.Gemms` of the same formats and sizes."""

    def __init__(self, gemms: ModuleType, oracle: ModuleType, pairs: Sequence[Any], packed: bool) -> None:
        super().__init__()
        self.gemms, self.packed = gemms, packed
        self.of_each = [gemms.Gemms(pairs, oracle, step=16) for _ in range(E)]
        for e, own in enumerate(self.of_each):
            own.weights = [{name: turned(t, e) for name, t in held.items()} for held in own.weights]
            own.biases = [None if bias is None else turned(bias, e) for bias in own.biases]
            own.values = own.weight_values()
        self.pairs = self.of_each[0].pairs
        self.arguments = [self.of_weight(i) for i in range(len(self.pairs))]

    def of_weight(self, i: int) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """Arguments of the ops: tensors with one of each expert, and what is said of a packed one."""
        weight = self.pairs[i][0]
        held = [own.weights[i] for own in self.of_each]
        all_of = {name: torch.stack([tensors[name] for tensors in held]) for name in held[0]}
        bias = None if self.of_each[0].biases[i] is None else torch.stack([own.biases[i] for own in self.of_each])
        last: tuple[Any, ...] = ()
        if self.packed:
            blocks = weight.format in self.gemms.BLOCK_SIZES
            first = held[0][""]
            transposed = weight.by == "group" and first.dtype == torch.int32
            stored = Stored(format=weight.format, shape=tuple(first.shape), transposed=transposed)
            names = ("", "_scale") if blocks else ("",)
            parts = [[tensors[name].contiguous() for name in names] for tensors in held]
            all_of[""] = torch.stack([Panel64().pack(part, stored) for part in parts])
            if blocks:
                del all_of["_scale"]
            last = NAME, *first.shape
        return (*(all_of.get(name) for name in SUFFIXES), bias), last

    def inputs(self, rows: int) -> list[dict[str, Tensor]]:
        """Activations of all experts; a scale that is one number is one for each."""
        return [
            {
                name: torch.stack([turned(t, e) for e in range(E)]) if t.ndim == 0 and name != "" else t
                for name, t in held.items()
            }
            for held in self.of_each[0].inputs(rows)
        ]

    def forward(self, inputs: list[dict[str, Tensor]], offsets: Tensor) -> list[Tensor]:
        outputs = []
        for i, ((weight, x), held) in enumerate(zip(self.pairs, inputs, strict=True)):
            by_weight, last = self.arguments[i]
            of_x = tuple(held.get(name) for name in SUFFIXES)
            if x is None:
                op, before = q.weight_only_gemm, (held[""], *by_weight, weight.format)
            elif x.rule == "":
                dtype = str(self.of_each[0].dtype(i)).removeprefix("torch.")
                op, before = q.quantized_gemm, (*of_x, *by_weight, x.format, weight.format, dtype)
            else:
                op, before = q.prologue_gemm, (*of_x, *by_weight, x.format, x.rule, x.columns, weight.format)
            outputs.append(op(*before, *last, offsets=offsets))
        return outputs

    def check(self, inputs: list[dict[str, Tensor]], offsets: Tensor, outputs: list[Tensor]) -> None:
        ends = offsets.tolist()
        for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if begin == end:
                continue
            own = [
                {name: t[begin:end] if name == "" or t.ndim == 2 else t[e] for name, t in held.items()}
                for held in inputs
            ]
            self.of_each[e].check_either(own, [y[begin:end] for y in outputs])
        for y in outputs:
            assert torch.equal(y[ends[-1] :], torch.zeros_like(y[ends[-1] :]))


def split(rows: int, seed: int = 0) -> Tensor:
    """Where each expert's rows end: some have none, and the last rows are nobody's."""
    generator = torch.Generator().manual_seed(seed + rows)
    ends = torch.randint(0, rows + 1, (E,), generator=generator).sort().values
    if rows > 2:
        ends[2] = ends[1]
    return ends.to(torch.int32)


def any_rows(inputs: list[dict[str, Tensor]], rows: int) -> list[dict[str, Tensor]]:
    """Mark the number of rows as not known before run time."""
    for tensor in torch.utils._pytree.tree_leaves(inputs):
        if tensor.ndim and len(tensor) == rows:
            torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


def check_any_number_of_rows(model: Experts, rows: Sequence[int]) -> str:
    compiled = torch.compile(model, backend="quark", fullgraph=True)
    first, offsets = any_rows(model.inputs(rows[0]), rows[0]), split(rows[0])
    outputs, (code,) = run_and_get_code(compiled, first, offsets)
    model.check(first, offsets, outputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in rows[1:]:
            inputs = model.inputs(m)
            ends = [split(m), torch.full((E,), m, dtype=torch.int32), torch.zeros(E, dtype=torch.int32)]
            for offsets in ends if m == rows[-1] else ends[:1]:
                model.check(inputs, offsets, compiled(inputs, offsets))
    return str(code)


ROWS = (37, 2, 9, 300, 33)


def of_parts(first: int) -> list[Any]:
    """One part by default, every sixth among what is slow, the others among what takes long."""
    others = (i for i in range(24) if i != first)
    slow, fuzz = pytest.mark.slow, pytest.mark.fuzz
    return [first, *(pytest.param(i, marks=slow if i % 6 == first % 6 else fuzz) for i in others)]


@pytest.mark.parametrize("part", of_parts(0))
def test_packed(oracle: ModuleType, gemms: ModuleType, pairs: Any, part: int) -> None:
    """Every pair, a twenty-fourth of them at a time."""
    model = Experts(gemms, oracle, list(pairs)[part::24], packed=True)
    code = check_any_number_of_rows(model, ROWS)
    assert code.count("is_expert = e <") == len(model.pairs)


@pytest.mark.parametrize("part", of_parts(3))
def test_as_stored(oracle: ModuleType, gemms: ModuleType, pairs: Any, part: int) -> None:
    model = Experts(gemms, oracle, list(pairs)[part::24], packed=False)
    code = check_any_number_of_rows(model, ROWS)
    assert code.count("quark::generic::tile(") == len(model.pairs)


# --- one pair at a time


def chosen(pairs: Any, *formats: tuple[str, str]) -> list[Any]:
    """Of the formats of a weight and of an activation (``""``: float) the first pair."""
    found = [
        next(pair for pair in pairs if (pair[0].format, "" if pair[1] is None else pair[1].format) == wanted)
        for wanted in formats
    ]
    assert len(found) == len(formats)
    return found


SOME = (("mxfp4", "mxfp4"), ("fp8_e4m3", "fp8_e4m3"), ("int8", "int8"))


@pytest.mark.parametrize(
    "isa",
    ["avx2", *(pytest.param(i, marks=pytest.mark.slow) for i in ("portable", "avx512_vnni", "avx512_bf16", "amx"))],
)
def test_every_level_of_instructions(
    oracle: ModuleType, gemms: ModuleType, pairs: Any, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not target.current().has(isa):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", isa)
    target.current.cache_clear()
    assert target.current().isa == isa
    code = check_any_number_of_rows(Experts(gemms, oracle, chosen(pairs, *SOME), packed=True), (37, 3, 80))
    names = {"portable": "portable", "avx2": "avx2", "avx512_vnni": "vnni"}
    assert f"quark::{names.get(isa, '')}" in code


class Down(nn.Module):
    """MXFP4 experts with biases, and the product with a weight of each row."""

    def __init__(self, dtype: torch.dtype, n: int = N) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.codes = torch.randint(0, 256, (E, n, K // 2), generator=generator, dtype=torch.uint8)
        self.scales = torch.randint(120, 127, (E, n, K // 32), generator=generator, dtype=torch.uint8)
        stored = Stored(format="mxfp4", shape=(n, K // 2))
        self.packed = torch.stack(
            [Panel64().pack(list(pair), stored) for pair in zip(self.codes, self.scales, strict=True)]
        )
        self.bias, self.n = torch.randn(E, n, generator=generator).to(dtype), n

    def gemm(self, x: Tensor, offsets: Tensor) -> Tensor:
        by_weight = self.packed, None, None, None, self.bias
        formats = "mxfp4", "even", 0, "mxfp4", NAME, self.n, K // 2
        y: Tensor = q.prologue_gemm(x, None, None, None, *by_weight, *formats, offsets=offsets)
        return y

    def forward(self, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        return self.gemm(x, offsets) * weights

    def check(self, oracle: ModuleType, x: Tensor, weights: Tensor, offsets: Tensor, y: Tensor) -> None:
        """In float32: a rounding more than a product has, relative to the result."""
        operand = oracle.quantized_values(x, None, None, None, "mxfp4", "even", 0).astype(np.float64)
        begin = 0
        for e, end in enumerate(offsets.tolist()):
            values = oracle.weight_values(self.codes[e], self.scales[e], None, None, "mxfp4", x.dtype)
            rows, by = operand[begin:end], weights[begin:end].double().numpy()
            bias = self.bias[e].double().numpy()
            exact = (rows @ values.T.astype(np.float64) + bias) * by
            magnitude = (np.abs(rows) @ np.abs(values.T.astype(np.float64)) + np.abs(bias)) * np.abs(by)
            error = np.abs(y[begin:end].double().numpy() - exact)
            assert (error <= (K + 4) * 2.0**-24 * magnitude).all()
            begin = end
        assert torch.equal(y[begin:], torch.zeros_like(y[begin:]))


def rows_of(m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, K, generator=generator).to(dtype)
    return x, torch.rand(m, 1, generator=generator).to(dtype) - 0.25, split(m)


def test_an_epilogue_is_in_the_kernel(oracle: ModuleType, isa: str) -> None:
    model, args = Down(torch.float32), rows_of(23)
    y, (code,) = run_and_get_code(torch.compile(model, backend="quark", fullgraph=True), *args)
    model.check(oracle, *args, y)
    # One kernel, which multiplies by the weights of the rows, and nothing else computes.
    assert code.count("async_compile.cpp_pybinding(") == 1
    assert counters["inductor"]["cpp_epilogue_fusion_counter"] >= 1


def test_one_function_for_1_to_300_rows(oracle: ModuleType) -> None:
    model = Down(torch.float32)
    compiled = torch.compile(model, backend="quark", fullgraph=True)
    first = rows_of(5)
    for tensor in first[:2]:
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled(*first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (*range(2, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 300):
            args = rows_of(m)
            model.check(oracle, *args, compiled(*args))
    model.check(oracle, *rows_of(1), compiled(*rows_of(1)))


@pytest.mark.parametrize("ends", [[0, 0, 0, 0, 0], [7, 7, 7, 7, 7], [0, 0, 0, 0, 7], [1, 2, 3, 4, 5], [0, 3, 3, 3, 7]])
def test_who_has_rows(oracle: ModuleType, ends: list[int]) -> None:
    """One compiled function, reused from case to case; a NaN in a row of nobody stays there unseen."""
    model, (x, weights, _) = Down(torch.float32), rows_of(7)
    offsets = torch.tensor(ends, dtype=torch.int32)
    x[ends[-1] :] = torch.nan
    y = torch.compile(model, backend="quark", fullgraph=True)(x, weights, offsets)
    model.check(oracle, x, weights, offsets, y)


def test_two_runs_and_any_number_of_threads_give_the_same_bits() -> None:
    """Threads share rows and channels, not sums."""
    model, args, results = Down(torch.bfloat16), rows_of(50, torch.bfloat16), []
    for threads in (1, 2):
        torch._dynamo.reset()
        with torch._inductor.config.patch("cpp.threads", threads):
            compiled = torch.compile(model, backend="quark", fullgraph=True)
            _, (code,) = run_and_get_code(compiled, *args)
            assert f"num_threads({threads})" in code
            results += [compiled(*args) for _ in range(2)]
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("m", [1, 4])
def test_a_number_of_rows_known_when_compiling(oracle: ModuleType, m: int) -> None:
    model, args = Down(torch.float32), rows_of(m)
    y = torch.compile(model, backend="quark", fullgraph=True, dynamic=False)(*args)
    model.check(oracle, *args, y)


def test_nobody_has_rows_when_there_are_none() -> None:
    args = torch.zeros(0, K), torch.zeros(0, 1), torch.zeros(E, dtype=torch.int32)
    y = torch.compile(Down(torch.float32), backend="quark", fullgraph=True)(*args)
    assert y.shape == (0, N)
