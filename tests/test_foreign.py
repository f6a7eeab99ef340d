"""Linears quantized by compressed-tensors, torchao and amd-quark: fused where the mathematics is that of a rule.

``pip install compressed-tensors torchao`` for two of them; amd-quark wants an environment of its own, as
``fixtures/make_fixtures.py`` has it. Tested with compressed-tensors 0.20, torchao 0.18 and amd-quark 0.13. What is
fused, and why the rest is not: ``benchmarks/foreign.md``.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quark_inductor.testing import Rewrite, rewrite

pytestmark = [pytest.mark.foreign]


def _load() -> ModuleType:
    """``foreign_linears.py``, which the benchmark reads, too. Tests are no package from which it could be imported."""
    spec = importlib.util.spec_from_file_location("foreign_linears", Path(__file__).with_name("foreign_linears.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


foreign = _load()

Outcome = tuple[str, tuple[str, ...]]


def whole(*rules: str) -> Outcome:
    return foreign.WHOLE, rules


def gemm(*rules: str) -> Outcome:
    return foreign.GEMM, rules


NOT_FUSED: Outcome = (foreign.NONE, ())
FP8 = ("fp8_weight", "fp8_activation", "fp8_prologue")
# What is fused, of all cases; two outcomes are those of bfloat16 and of float32.
FUSED: Mapping[tuple[str, str], Outcome | tuple[Outcome, Outcome]] = {
    ("compressed_tensors", "FP8_DYNAMIC fake"): gemm("fp8_weight"),
    ("compressed_tensors", "FP8_DYNAMIC codes"): gemm("fp8_weight"),
    ("compressed_tensors", "W8A8 codes"): gemm("integer_weight"),
    ("compressed_tensors", "INT8_STATIC_ASYM codes"): gemm("integer_weight"),
    ("compressed_tensors", "INT8_DYNAMIC_ASYM codes"): gemm("integer_weight"),
    ("compressed_tensors", "W4A16_ASYM codes"): (NOT_FUSED, whole("integer_weight")),
    ("torchao", "intx int8 weight only"): (NOT_FUSED, whole("integer_weight")),
    ("torchao", "qat fp8 per row"): (whole("fp8_weight", "fp8_activation"), whole(*FP8)),
    ("quark", "fp8 loaded"): whole(*FP8),
    ("quark", "fp8_float32_scale loaded"): whole(*FP8),
    ("quark", "fp8_dynamic loaded"): whole(*FP8),
    ("quark", "fp8_wo loaded"): whole("fp8_weight"),
    ("quark", "ptpc_fp8 loaded"): gemm("fp8_weight"),
    # Their activation is quantized and dequantized by one op of torch, which no rule looks into.
    ("quark", "int8 loaded"): whole("integer_weight"),
    ("quark", "int8_dynamic loaded"): whole("integer_weight"),
}
# No refusal: a GEMM that torch runs on codes, or a weight of which the graph has no codes.
NO_QDQ = re.compile(r"the weight is stored in floating point|it is a quantized GEMM already: aten\.\w+")
# A refusal: a node of the graph and that of the nearest pattern, or the check that failed.
NODE = re.compile(
    r"the nearest is \w+, which has [\w.]+ where this graph has ([\w.]+|an input)"
    r"|the nearest is \w+, whose [\w.]+ has|the (weight|activation)'s scale has shape \([\d, ]+\)"
)
CASES = [
    (library, name, dtype, dims)
    for library in foreign.LIBRARIES
    for name in foreign.cases(library)
    for dtype in foreign.DTYPES
    for dims in foreign.shapes(library, name)
    # What differs between two and three dimensions does not depend on the dtype.
    if dims == foreign.shapes(library, name)[0] or dtype == "bf16"
]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """A library that is installed; its modules can be traced."""
    pytest.importorskip(request.param, reason=f"{foreign.LIBRARIES[request.param]} is not installed")
    with foreign.traceable(request.param):
        yield request.param


def expected(library: str, name: str, dtype: str) -> Outcome:
    found = FUSED.get((library, name), NOT_FUSED)
    if isinstance(found[0], tuple):
        return found[list(foreign.DTYPES).index(dtype)]  # type: ignore[return-value]
    return found  # type: ignore[return-value]


def rewritten(library: str, name: str, dtype: str, dims: int) -> tuple[Rewrite, torch.Tensor]:
    """What the rules make of a case, and what the library computes in eager mode."""
    layer = foreign.cases(library)[name](foreign.DTYPES[dtype])
    x = foreign.example(foreign.DTYPES[dtype], dims)
    eager = layer(x)
    return rewrite(layer, x), eager


@pytest.mark.parametrize(("library", "name", "dtype", "dims"), CASES, indirect=["library"])
def test_equal_mathematics_is_fused(library: str, name: str, dtype: str, dims: int) -> None:
    done, eager = rewritten(library, name, dtype, dims)
    kind, rules, reason = foreign.outcome(done)
    assert (kind, rules) == expected(library, name, dtype), reason
    assert sum(done.fused.get(op, 0) for op in ("weight_only_gemm", "quantized_gemm", "prologue_gemm")) == bool(rules)
    if kind != foreign.WHOLE:
        refused = [refusal.reason for refusal in done.refusals]
        assert [reason] == refused if NODE.search(reason) else NO_QDQ.fullmatch(reason) and not refused, reason
    # Bit for bit: a fused op is interpreted as the emulation that it says it is. A row of zeros is NaN in torchao.
    torch.testing.assert_close(done.output, eager, rtol=0, atol=0, equal_nan=True)


def test_every_expectation_is_of_a_case() -> None:
    assert set(FUSED) <= {(library, name) for library, name, *_ in CASES}


@pytest.mark.parametrize(
    ("library", "name", "dims", "reason"),
    [
        ("compressed_tensors", "FP8 codes", 3, r"weight's scale has shape \(1,\), the weight \(64, 256\)"),
        ("torchao", "pt2e static", 3, "this graph has quantized_decomposed.dequantize_per_channel"),
        # One scale a position, over the batch, is not one a token; without a batch it is one a column.
        ("quark", "ptpc_fp8 loaded", 2, r"activation's scale has shape \(256,\), expected \[\], \[M, 1\]"),
    ],
    indirect=["library"],
)
def test_refusal_names_what_differs(library: str, name: str, dims: int, reason: str) -> None:
    done, _ = rewritten(library, name, "bf16", dims)
    assert re.search(reason, foreign.outcome(done)[2])
    (refusal,) = done.refusals
    assert re.search(reason, refusal.reason)


@pytest.mark.parametrize("library", foreign.LIBRARIES, indirect=True)
def test_a_wrong_scale_shows(library: str) -> None:
    """The comparison sees a difference of one weight's scale."""
    name = {"compressed_tensors": "FP8_DYNAMIC codes", "torchao": "intx int8 weight only", "quark": "fp8 loaded"}[
        library
    ]
    layer = foreign.cases(library)[name](torch.float32)
    x = foreign.example(torch.float32)
    eager = layer(x)
    scales = [
        tensor for key, tensor in layer.state_dict().items() if key.endswith(("weight_scale", "weight_quantizer.scale"))
    ]
    scales = scales or [layer.weight.scale]  # torchao's are in its tensor
    scales[0].view(-1)[0] *= 2
    assert not torch.equal(rewrite(layer, x).output, eager)
