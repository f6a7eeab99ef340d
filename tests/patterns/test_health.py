"""The rules leave a healthy graph: calls of our ops as specified, the same after a second run and in any order."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from quark_inductor import testing
from quark_inductor.patterns import base
from quark_inductor.patterns.base import Options, arguments, registered_rules
from quark_inductor.patterns.pipeline import GraphResult, run_rules
from quark_inductor.schemes.base import QuarkLinear

# The tables of schemes/operands.py, written down once more.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3, E5M2, FNUZ = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
# Of a block format: elements a block, bits an element, dtypes of codes and scales, whether it has a global scale.
BLOCKS: dict[str, tuple[int, int, torch.dtype, torch.dtype, bool]] = {
    "mxfp4": (32, 4, torch.uint8, torch.uint8, False),
    "mxfp6_e2m3": (32, 6, torch.uint8, torch.uint8, False),
    "mxfp6_e3m2": (32, 6, torch.uint8, torch.uint8, False),
    "mxfp8_e4m3": (32, 8, E4M3, torch.uint8, False),
    "mxfp8_e5m2": (32, 8, E5M2, torch.uint8, False),
    "nvfp4": (16, 4, torch.uint8, E4M3, True),
    "amdfp4_g16": (16, 4, torch.uint8, torch.uint8, False),
    "amdfp4_g32": (32, 4, torch.uint8, torch.uint8, False),
}
FP8 = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2, "fp8_e4m3fnuz": FNUZ}
CODES = {"int8": torch.int8, "uint8": torch.uint8, "int4": torch.int8, "uint4": torch.uint8}


def check_graph(graph: Graph) -> int:
    """Assert of every fused op in a graph what ``schemes/operands.py`` says of it; returns how many there are."""
    fused = [
        node
        for node in graph.nodes
        if str(node.target).startswith("quark_inductor.") and str(node.target).endswith("gemm.default")
    ]
    for node in fused:
        _check(node)
    return len(fused)


def _check(node: Node) -> None:
    named: dict[str, Any] = arguments(node)
    t = {name: a.meta["val"] for name, a in named.items() if isinstance(a, Node)}
    y: Tensor = node.meta["val"]
    assert y.dtype in FLOATS
    n, k = y.shape[-1], _weight(named["weight_format"], t, y.shape[-1])
    assert isinstance(n, int)
    assert isinstance(k, int)
    assert t["x"].shape[:-1] == y.shape[:-1]
    assert ("bias" in t) <= (tuple(t["bias"].shape) == (n,) if "bias" in t else True)
    op = str(node.target).split(".")[1]
    if op == "quantized_gemm":
        assert named["out_dtype"] == str(y.dtype).removeprefix("torch.")
        _codes(named["x_format"], t, k)
    else:
        assert t["x"].dtype == y.dtype
        assert t["x"].shape[-1] == k
    if op == "prologue_gemm":
        given = named["scale_rule"] == "given"
        assert ("x_scale" in t) == given
        assert not (given and named["group_size"])
        integer = named["x_format"] in CODES
        assert ("x_zero_point" in t) <= (given and integer)
        block = BLOCKS.get(named["x_format"])
        assert ("x_scale_2" in t) == bool(block and block[4])
        for name in ("x_scale", "x_zero_point"):
            assert name not in t or t[name].ndim == 0 or t[name].shape == (*y.shape[:-1], 1)


def _codes(format: str, t: dict[str, Tensor], k: int) -> None:
    rows = t["x"].shape[:-1]
    if format in BLOCKS:
        size, bits, codes, scales, has_global = BLOCKS[format]
        assert (t["x"].dtype, t["x_scale"].dtype) == (codes, scales)
        assert (t["x"].shape[-1], t["x_scale"].shape) == (k * bits // 8, (*rows, k // size))
        assert ("x_scale_2" in t) == has_global
        assert "x_zero_point" not in t
        return
    assert t["x"].dtype == {**FP8, **CODES}[format]
    assert t["x"].shape[-1] == k
    scale = t["x_scale"]
    assert scale.dtype in FLOATS
    assert scale.ndim == 0 or (scale.shape[:-1] == rows and k % scale.shape[-1] == 0)
    assert ("x_zero_point" in t) <= (format in CODES)
    assert "x_scale_2" not in t


def _weight(format: str, t: dict[str, Tensor], n: int) -> int:
    """K, after checking the weight's tensors."""
    weight, scale = t["weight"], t["weight_scale"]
    *experts, rows, entries = weight.shape
    if format in BLOCKS:
        size, bits, codes, scales, has_global = BLOCKS[format]
        assert (weight.dtype, scale.dtype) == (codes, scales)
        assert rows == n
        assert scale.shape == (*experts, n, entries * 8 // bits // size)
        assert ("weight_scale_2" in t) == has_global
        return entries * 8 // bits
    assert scale.dtype in FLOATS
    base, _, blocks = (
        format.partition("fnuz")[0].rpartition("_") if "x" in format.rsplit("_", 1)[-1] else (format, "", "")
    )
    if base in FP8:
        assert weight.dtype == FP8[base]
        assert rows == n
        if blocks:
            r, c = map(int, blocks.split("x"))
            assert tuple(scale.shape) == (-(-n // r), -(-entries // c))
        else:
            assert scale.ndim == 0 or tuple(scale.shape) in ((*experts, n), (*experts, n, 1))
        return entries
    zero_point = t.get("weight_zero_point")
    if format in ("int8", "uint8"):
        assert weight.dtype == CODES[format]
        assert rows == n
        assert scale.ndim == 0 or (scale.shape[0] == n and (scale.ndim == 1 or entries % scale.shape[1] == 0))
        assert zero_point is None or zero_point.shape == scale.shape
        return entries
    assert weight.dtype == torch.int32
    assert zero_point is not None
    assert zero_point.dtype == torch.int32
    if scale.ndim == 2:
        assert (entries * 8, scale.shape[1], zero_point.shape[1]) == (n, n, n // 8)
        assert scale.shape[0] == zero_point.shape[0]
        assert rows % scale.shape[0] == 0
        return rows
    assert (rows, tuple(zero_point.shape)) == (n, (n // 8,))
    assert tuple(scale.shape) == (() if format == "int4_fp8" else (n,))
    assert ("weight_scale_2" in t) == (format == "int4_fp8")
    return entries * 8


# --- the tests

K, N = 128, 128


class Block(nn.Module):
    """Two Linears that read one activation, one that reads their product, norms and views between."""

    def __init__(self, linear: Callable[..., QuarkLinear], scheme: str, dtype: torch.dtype) -> None:
        super().__init__()
        make = lambda bias: linear(scheme, K, N, bias=bias, dtype=dtype)  # noqa: E731
        self.gate, self.up, self.down = make(True), make(False), make(True)
        self.norm = nn.RMSNorm(K, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        y: Tensor = self.down(torch.nn.functional.silu(self.gate(normed)) * self.up(normed))
        return x + y


@pytest.fixture
def graph(linear: Callable[..., QuarkLinear]) -> Callable[[str, torch.dtype], Graph]:
    """The graph of a block before the rules, 3-D input and dynamic shapes."""

    def make(scheme: str, dtype: torch.dtype) -> Graph:
        done = testing.rewrite(Block(linear, scheme, dtype), torch.randn(2, 3, K).to(dtype), dynamic=True)
        return done.before

    return make


def applied(graph: Graph, **options: Any) -> tuple[Graph, GraphResult]:
    """The rules on a copy."""
    result = Graph()
    result.output(result.graph_copy(graph, {}))
    done = run_rules(result, Options(**options))
    GraphModule(nn.Module(), result).graph.lint()
    return result, done


# One of each pair of families, and of each form of scale.
FAMILIES = (
    "mxfp4",
    "mxfp4_fp8",
    "nvfp4",
    "amdfp4",
    "fp8",
    "ptpc_fp8",
    "fp8_block128",
    "int8",
    "ptpc_int8",
    "int8_wo_128",
    "int4_wo_32",
    "int4_wa_64",
    "int4_fp8",
)


@pytest.mark.parametrize("scheme", FAMILIES)
def test_health(graph: Callable[[str, torch.dtype], Graph], scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = graph(scheme, torch.bfloat16)
    once, result = applied(before)
    assert check_graph(once) == 3
    assert sum(linear.fused for linear in result.linears) == 3
    # A second run finds nothing to do.
    twice, again = applied(once)
    assert testing.graph_text(twice) == testing.graph_text(once)
    assert sum(p.matches for p in again.passes if p.name != "select_providers") == 0
    assert [linear.fused for linear in again.linears] == [True] * 3
    # Rules of one stage may run in any order.
    monkeypatch.setattr(base, "_RULES", dict(reversed(base._RULES.items())))
    reordered, _ = applied(before)
    assert testing.graph_text(reordered) == testing.graph_text(once)


@pytest.mark.parametrize("scheme", FAMILIES)
def test_what_nobody_runs_is_as_it_was(graph: Callable[[str, torch.dtype], Graph], scheme: str) -> None:
    """The same graph as without any rule, however often."""
    before = graph(scheme, torch.bfloat16)
    emulated, result = applied(before, provider="emulation")
    assert [linear.provider for linear in result.linears] == ["emulation"] * 3
    assert all("option quark.provider is 'emulation'" in refusal.reason for refusal in result.unfused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_RULES", {})
        untouched, _ = applied(before)
    assert testing.graph_text(emulated) == testing.graph_text(untouched)
    again, _ = applied(emulated, provider="emulation")
    assert testing.graph_text(again) == testing.graph_text(emulated)


def test_the_stages() -> None:
    """What the order of a rule's registration may not change."""
    stages = [rule.stage for rule in registered_rules()]
    assert stages == sorted(stages, key=base.STAGES.index)
    assert set(stages) == set(base.STAGES)


def test_the_spec_fails_on_a_wrong_operand(graph: Callable[[str, torch.dtype], Graph]) -> None:
    """A check that cannot fail checks nothing."""
    done, _ = applied(graph("mxfp4", torch.bfloat16))
    node = next(n for n in done.nodes if "prologue_gemm" in str(n.target))
    names = [a.name for a in node.target._schema.arguments]
    for name, wrong in (
        ("weight_scale", "weight"),
        ("weight", "weight_scale"),
        ("x_scale", "weight_scale"),
        ("bias", "x"),
    ):
        broken = copy.copy(list(node.args))
        broken[names.index(name)] = node.args[names.index(wrong)]
        was, node.args = node.args, tuple(broken)
        with pytest.raises(AssertionError):
            check_graph(done)
        node.args = was
    assert check_graph(done) == 3
