"""The same Linears are fused, into the same kernels, in every way of compiling a model; and none where it is trained.

What is compared is local, as a quantize amplifies a last bit: the model returns what goes into each Linear and what
comes out, and each step is compared with eager code that gets what the compiled step got. A Linear's bound is that of
``test_compiled_schemes.py``: two float32 sums of K products, and two roundings of the result.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from torch._inductor import config, freezing
from torch._inductor.utils import run_and_get_code

import quark_inductor as qi
from quark_inductor.errors import TrainingError
from quark_inductor.patterns.pipeline import collect_results
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS

pytestmark = pytest.mark.usefixtures("fresh", "rounding")

K, HIDDEN = 128, 256
# Which rules make one of each family's Linears what it is.
RULES = {
    "mxfp4": ("block_weight", "block_activation", "block_prologue"),
    "ptpc_fp8": ("fp8_weight", "fp8_activation", "fp8_prologue"),
    "fp8": ("fp8_weight", "fp8_activation", "fp8_prologue"),
    "int8_asymmetric": ("integer_weight", "integer_activation", "integer_prologue"),
    "nvfp4": ("block_weight", "block_activation", "block_prologue"),
    "mxfp4_fp8": ("block_weight", "fp8_activation", "fp8_prologue"),
    "int4_wo_128": ("int4_weight",),
}


class Mlp(nn.Module):
    """The half of a decoder layer that has no attention, and all that it computes on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.gate, self.up = nn.Linear(K, HIDDEN, bias=False), nn.Linear(K, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, K)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        gate, up = self.gate(h), self.up(h)
        act = F.silu(gate) * up
        down = self.down(act)
        return x + down, h, gate, up, act, down


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """``model(family)``: a random quantized :class:`Mlp`, in bfloat16."""

    def made(family: str, module: Callable[[], nn.Module] = Mlp, **options: Any) -> Any:
        torch.manual_seed(0)
        int8 = PRESETS["int8"]
        assert int8.weight is not None
        assert int8.input is not None
        asymmetric = {
            part: dataclasses.replace(spec, symmetric=False)
            for part, spec in (("weight", int8.weight), ("input", int8.input))
        }
        monkeypatch.setitem(PRESETS, "int8_asymmetric", dataclasses.replace(int8, **asymmetric))
        float_model = module().bfloat16()
        return qi.quantize_(float_model, family, calibration=[tokens(64)], **{"exclude": (), **options})

    return made


@pytest.fixture
def rounding() -> Iterator[None]:
    """Inductor rounds where eager code does: else a quantize could read what is never rounded."""
    with config.patch(emulate_precision_casts=True):
        yield


def tokens(*sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, K, generator=generator).bfloat16()


def assert_near(layer: QuarkLinear, x: Tensor, got: Tensor) -> None:
    """A compiled Linear's result, by what went into it."""
    emulated = layer(x).double()
    operand = layer.scheme.fake_quantize_input(layer, x.reshape(-1, layer.in_features)).double()
    weight = layer.scheme.dequantize_weight(layer, x.dtype).double()
    magnitude = operand.abs() @ weight.T.abs() + (0 if layer.bias is None else layer.bias.double().abs())
    bound = magnitude.reshape(emulated.shape) * 2 * layer.in_features * 2.0**-24 + 2 * emulated.abs() * 2.0**-8
    assert ((got.double() - emulated).abs() <= bound).all()


def assert_right(mlp: Mlp, x: Tensor, got: tuple[Tensor, ...]) -> None:
    """Each step of the compiled model, by what the one before it gave."""
    y, h, gate, up, act, down = got
    # One rounding a side, and two.
    torch.testing.assert_close(h, mlp.norm(x), rtol=2.0**-7, atol=0.0)
    torch.testing.assert_close(act, F.silu(gate) * up, rtol=2.0**-6, atol=2.0**-126)
    assert torch.equal(y, x + down)
    for layer, of, result in ((mlp.gate, h, gate), (mlp.up, h, up), (mlp.down, act, down)):
        assert isinstance(layer, QuarkLinear)
        assert_near(layer, of, result)


def assert_fused(results: list[Any], family: str) -> None:
    """All three Linears, by the rules of their family, into one kernel each."""
    (result,) = results
    assert [(r.layer, r.provider, r.rules, r.fused) for r in result.linears] == [
        (name, "cpp", RULES[family], True) for name in ("gate", "up", "down")
    ]
    assert result.unfused == ()
    op = "weight_only_gemm" if len(RULES[family]) == 1 else "prologue_gemm"
    kernels = {key: n for key, n in counters["inductor"].items() if key.startswith("quark.")}
    assert kernels == {f"quark.{op}.cpp": 3}


def all_families(*some: str) -> list[Any]:
    """These in the fast run; kernels take their time."""
    return [name if name in some else pytest.param(name, marks=pytest.mark.fuzz) for name in RULES]


# --- ways of compiling


def compiled(mlp: Mlp, **options: Any) -> Any:
    return torch.compile(mlp, backend="quark", fullgraph=True, **options)


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model: Any, family: str, context: Any) -> None:
    mlp, x = model(family), tokens(5)
    with context(), collect_results() as results:
        assert_right(mlp, x, compiled(mlp)(x))
    assert_fused(results, family)


@pytest.mark.parametrize("family", all_families("int8_asymmetric"))
def test_freezing(model: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights become constants of the graph, after the rules: they are not folded.

    By the configuration, as Dynamo must know it too: with ``options={"freezing": True}`` nothing is frozen.
    """
    mlp, x = model(family), tokens(5)
    frozen: list[Any] = []
    freeze = freezing.freeze
    monkeypatch.setattr(freezing, "freeze", lambda *args: frozen.append(freeze(*args)) or frozen[-1])
    with collect_results() as results, config.patch(freezing=True):
        assert_right(mlp, x, compiled(mlp)(x))
    ((_, kept),) = frozen
    assert len(kept) == 1  # the activation
    assert_fused(results, family)


@pytest.mark.parametrize("family", all_families("mxfp4_fp8"))
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(model: Any, family: str, mode: str) -> None:
    mlp, x = model(family), tokens(5)
    with collect_results() as results:
        got = compiled(mlp, mode=mode)
        assert_right(mlp, x, got(x))
        assert_right(mlp, x, got(x))  # where a recording would be replayed
    assert_fused(results, family)


@pytest.mark.parametrize("family", all_families("ptpc_fp8"))
def test_cpp_wrapper(model: Any, family: str) -> None:
    mlp, x = model(family), tokens(5)
    with collect_results() as results, config.patch(cpp_wrapper=True):
        got, (code,) = run_and_get_code(compiled(mlp), x)
    assert "inductor_entry_impl" in code  # it is C++ indeed
    assert_right(mlp, x, got)
    assert_fused(results, family)


# Of each kind of weight one, with two scales, one, a zero point and groups among them.
@pytest.mark.slow
@pytest.mark.parametrize("family", all_families("nvfp4", "ptpc_fp8", "int8_asymmetric", "int4_wo_128"))
def test_ahead_of_time(model: Any, family: str, tmp_path: Path) -> None:
    """``torch.export`` and AOTInductor: one package for any number of tokens."""
    mlp = model(family)
    exported = torch.export.export(mlp, (tokens(5),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    with collect_results() as results:
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "mlp.pt2"), inductor_configs=qi.aoti_configs()
        )
    assert_fused(results, family)
    loaded = torch._inductor.aoti_load_package(path)
    for count in (2, 5, 37):
        assert_right(mlp, tokens(count), loaded(tokens(count)))


# --- any number of tokens


@pytest.mark.parametrize("family", all_families("mxfp4"))
def test_one_graph_for_every_batch_and_length(model: Any, family: str) -> None:
    mlp = model(family)
    run = compiled(mlp, dynamic=True)
    with collect_results() as results:
        assert_right(mlp, tokens(2, 5), run(tokens(2, 5)))
    assert_fused(results, family)
    for linear in results[0].linears:
        assert (linear.problem.m, linear.problem.k) == (None, HIDDEN if linear.layer == "down" else K)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, length in ((2, 2), (3, 2), (2, 3), (5, 33), (33, 8)):
            assert_right(mlp, tokens(batch, length), run(tokens(batch, length)))
    assert counters["stats"]["unique_graphs"] == 1


def guards_of(mlp: Mlp, backend: str) -> list[str]:
    """What must hold for the compiled code to be used again."""
    torch._dynamo.reset()
    torch.compile(mlp, backend=backend, fullgraph=True, dynamic=True)(tokens(2, 5))
    (entry,) = _debug_get_cache_entry_list(Mlp.forward.__code__)
    lines = str(entry.guard_manager).splitlines()
    # Without what numbers objects, and which backend it was.
    return [re.sub(r"0x[0-9a-f]+|\d{6,}|___\d+", "", line) for line in lines if "current_backend" not in line]


@pytest.mark.parametrize("family", all_families("mxfp4"))
def test_no_guard_is_added(model: Any, family: str) -> None:
    """The checks of the rules only ask what is known of a size: they would guard on it otherwise."""
    mlp = model(family)
    theirs, ours = guards_of(mlp, "inductor"), guards_of(mlp, "quark")
    assert any("size" in line for line in theirs)
    assert ours == theirs


# --- training


class Head(nn.Module):
    """A float Linear behind a quantized one, which needs no gradient then."""

    def __init__(self) -> None:
        super().__init__()
        self.quantized, self.head = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.quantized(x)
        return self.head(h), h


class Stem(nn.Module):
    """A float Linear before a quantized one: its gradient would come through the quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.quantized = nn.Linear(K, K), nn.Linear(K, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x)
        return self.quantized(h), h


@pytest.mark.parametrize("family", all_families("nvfp4"))
def test_a_trained_head(model: Any, family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its gradient is that of eager code; no rule runs, and a warning says so."""
    net, x = model(family, Head, exclude=("head",)), tokens(5)
    net.head.requires_grad_()
    with torch.enable_grad(), caplog.at_level(logging.WARNING, logger="quark_inductor"), collect_results() as results:
        y, h = compiled(net)(x)
        y.square().sum().backward()
    assert results == []
    assert caplog.messages == ["a training graph: no rule runs, the quantized Linears stay emulated"]
    assert not any(key.startswith("quark.") for key in counters["inductor"])
    assert_near(net.quantized, x, h)
    # The gradient by hand, in float64, from what the compiled code computed: y and a product of 5 rows, rounded once.
    outer = 2 * y.detach().double().T @ h.double()
    bound = 2 * y.detach().double().abs().T @ h.double().abs() * 2.0**-7
    assert ((net.head.weight.grad.double() - outer).abs() <= bound).all()
    assert net.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["mxfp4", "nvfp4", "fp8", "ptpc_fp8", "mxfp4_fp8", "int8_asymmetric"])
def test_a_trained_stem(model: Any, family: str) -> None:
    """Codes have no gradient: an error says so, in eager code and compiled, before anything is computed."""
    net, x = model(family, Stem, exclude=("stem",)), tokens(5)
    net.stem.requires_grad_()
    with torch.enable_grad():
        with pytest.raises(TrainingError, match="no_grad"):
            net(x)
        with pytest.raises(Exception, match="Quantized Linears are for inference"):
            compiled(net)(x)


def test_a_weight_only_linear_lets_a_gradient_through(model: Any) -> None:
    """That of the emulation, which is exact: what is trained before it learns."""
    net, x = model("int4_wo_128", Stem, exclude=("stem",)), tokens(5)
    net.stem.requires_grad_()
    with torch.enable_grad():
        y, _ = compiled(net)(x)
        y.sum().backward()
    weight = net.quantized.scheme.dequantize_weight(net.quantized, torch.bfloat16).double()
    # A sum over the outputs, rounded, and one over the 5 tokens.
    exact, magnitude = 5 * weight.sum(0), 5 * weight.abs().sum(0)
    bound = magnitude * HIDDEN * 2.0**-24 + exact.abs() * 2 * 2.0**-8
    assert ((net.stem.bias.grad.double() - exact).abs() <= bound).all()
