"""The function behind ``backend="quark"``: how torch finds it, its options, and a user's own passes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V

from quark_inductor.backend import quark, split_options
from quark_inductor.errors import OptionError
from quark_inductor.quantize import quantize_

pytestmark = pytest.mark.usefixtures("fresh")
FIXTURES = Path(__file__).parents[1] / "fixtures"


def model(scheme: str = "ptpc_fp8") -> nn.Module:
    torch.manual_seed(0)
    return quantize_(nn.Sequential(nn.Linear(64, 32), nn.ReLU()), scheme)


def kernels() -> int:
    return sum(n for key, n in counters["inductor"].items() if key.startswith("quark."))


# --- how torch finds it


def python(code: str, tmp_path: Path) -> str:
    """Output of a fresh process that starts in an empty folder."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_importing_anything_of_ours(tmp_path: Path) -> None:
    """The entry point: a plain float model, in a process that has imported torch."""
    code = """
import sys, torch
before = [m for m in sys.modules if m.startswith("quark_inductor")]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.GELU())
x = torch.randn(3, 16)
assert "quark" in torch.compiler.list_backends()
with torch.no_grad():
    y = torch.compile(model, backend="quark", fullgraph=True)(x)
    torch.testing.assert_close(y, model(x))
print(before, "quark_inductor.patterns.pipeline" in sys.modules)
"""
    assert python(code, tmp_path) == "[] True\n"


def test_with_a_checkpoint(tmp_path: Path) -> None:
    """All a user writes: load, compile, call; here a part of the model, tests/test_compiled_model.py has whole ones."""
    code = f"""
import torch, quark_inductor
from torch._dynamo.utils import counters
model = quark_inductor.load({str(FIXTURES / "mxfp4")!r})
mlp = torch.compile(model.model.layers[0].mlp, backend="quark")
with torch.inference_mode():
    assert mlp(torch.ones(1, 2, 128, dtype=torch.bfloat16)).isfinite().all()
print(counters["inductor"]["quark.prologue_gemm.cpp"])
"""
    assert python(code, tmp_path) == "3\n"


def test_a_model_in_training_mode_of_torch_trains() -> None:
    """A float model: the backend is Inductor, for gradients too."""
    torch.manual_seed(0)
    plain, x = nn.Linear(16, 8), torch.randn(3, 16)
    with torch.enable_grad():
        torch.compile(plain, backend="quark", fullgraph=True)(x).square().sum().backward()
        got, plain.weight.grad = plain.weight.grad, None
        plain(x).square().sum().backward()
    torch.testing.assert_close(got, plain.weight.grad)


def test_the_function_itself_is_a_backend() -> None:
    quantized, x = model(), torch.randn(3, 64)
    torch.testing.assert_close(torch.compile(quantized, backend=quark, fullgraph=True)(x), quantized(x))
    assert kernels() == 1


def test_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch._dynamo.reset()`` calls the ``reset`` of backends that have one; afterwards everything compiles anew."""
    quantized, x = model(), torch.randn(3, 64)
    compiled = torch.compile(quantized, backend="quark", fullgraph=True)
    first = compiled(x)
    called: list[None] = []
    before = quark.reset
    monkeypatch.setattr(quark, "reset", lambda: (called.append(None), before()))
    torch._dynamo.reset()
    assert called == [None]
    assert torch.equal(compiled(x), first)
    assert kernels() == 2


# --- options


def test_options_are_split() -> None:
    own, theirs = split_options(
        None, {"quark.strict": True, "quark.provider": "cpp", "max-autotune": True, "epilogue_fusion": False}
    )
    assert (own.strict, own.provider) == (True, "cpp")
    assert theirs == {"max_autotune": True, "epilogue_fusion": False}
    own, theirs = split_options(None, None)
    assert (own.strict, own.provider, theirs) == (False, None, {})


def test_mode_and_options_together() -> None:
    """torch.compile gives one or the other; called directly, options come after the mode."""
    _, theirs = split_options("max-autotune-no-cudagraphs", {"max_autotune": False})
    assert theirs["max_autotune"] is False
    assert theirs["coordinate_descent_tuning"] is True
    assert split_options("default", {})[1] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quark.strickt": True}, "there is no option 'quark.strickt'; ours are quark.provider, quark.strict"),
        (
            {"epilogue_fusoin": True},
            "there is no option 'epilogue_fusoin': ours start with 'quark.', every other must be",
        ),
        ({"strict": True}, "there is no option 'strict': ours start with 'quark.'"),
        ({"quark.strict": "yes"}, "quark.strict is 'yes'; expected True or False"),
        ({"quark.strict": 1}, "quark.strict is 1; expected True or False"),
        (
            {"quark.provider": "tpu"},
            "quark.provider is 'tpu'; expected one of aiter, scaled_mm, scaled_mm_blocks, triton, cpp, emulation",
        ),
        (
            {"quark.provider": 3},
            "quark.provider is 3; expected one of aiter, scaled_mm, scaled_mm_blocks, triton, cpp, emulation",
        ),
        ({"max_autotune": "yes"}, "max_autotune"),
        ({"freezing": 1.5}, "freezing"),
        ({1: True}, "there is no option 1"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[Any, Any], message: str) -> None:
    """Said before anything is compiled, with what would be right."""
    with pytest.raises(OptionError) as error:
        split_options(None, options)
    assert message in str(error.value)
    with pytest.raises(Exception, match="OptionError") as raised:
        torch.compile(model(), backend="quark", options=options)(torch.randn(3, 64))
    assert message in str(raised.value)


def test_an_unknown_mode() -> None:
    with pytest.raises(OptionError, match=r"there is no mode 'fast'; expected one of default, .*max-autotune"):
        split_options("fast", None)
    with pytest.raises(Exception, match="there is no mode 'fast'"):
        torch.compile(model(), backend="quark", mode="fast")(torch.randn(3, 64))


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_modes(mode: str | None) -> None:
    quantized, x = model(), torch.randn(3, 64)
    y = torch.compile(quantized, backend="quark", fullgraph=True, mode=mode)(x)
    # 64 products and two scales in float32 on either side: gamma_66 is below 2^-17, the magnitudes' sum below 2^5.
    torch.testing.assert_close(y, quantized(x), rtol=0, atol=2.0**-11)
    assert kernels() == 1


def test_inductor_options_reach_inductor() -> None:
    """``fallback_by_default`` and the like are many; this one shows in the code."""
    seen: list[bool] = []

    class Look(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(torch._inductor.config.epilogue_fusion)

        def uuid(self) -> Any:
            return None

    for value in (True, False):
        torch._dynamo.reset()
        options = {"epilogue_fusion": value, "post_grad_custom_post_pass": Look()}
        torch.compile(model(), backend="quark", options=options)(torch.randn(3, 64))
    assert seen == [True, False]
    assert torch._inductor.config.epilogue_fusion is True


# --- a user's own passes


class Note(CustomGraphPass):
    """Writes down which ops of ours are in the graph when it runs."""

    def __init__(self, name: str, notes: list[tuple[str, set[str]]]) -> None:
        self.name, self.notes = name, notes

    def __call__(self, graph: torch.fx.Graph) -> None:
        ours = {str(n.target).split(".")[1] for n in graph.nodes if str(n.target).startswith("quark_inductor.")}
        self.notes.append((self.name, ours))

    def uuid(self) -> Any:
        return self.name


BEFORE = {"block_quantize", "block_dequantize", "unpack_weight"}


@pytest.mark.parametrize("through", ["options", "config"])
@pytest.mark.parametrize("provider", [None, "emulation"])
def test_they_run_too(through: str, provider: str | None) -> None:
    """Before our rules, and after our late decomposition."""
    notes: list[tuple[str, set[str]]] = []
    passes = {
        "joint_custom_pre_pass": Note("joint", notes),
        "post_grad_custom_post_pass": Note("post", notes),
    }
    options = {"quark.provider": provider, **(passes if through == "options" else {})}
    with torch._inductor.config.patch(passes if through == "config" else {}):
        quantized, x = model("mxfp4"), torch.randn(3, 64)
        y = torch.compile(quantized, backend="quark", fullgraph=True, options=options)(x)
    torch.testing.assert_close(y, quantized(x))
    assert notes == [("joint", BEFORE), ("post", {"prologue_gemm"} if provider is None else set())]


def test_a_list_of_them() -> None:
    """Torch 2.13 takes a list where 2.11 takes one pass."""
    notes: list[tuple[str, set[str]]] = []
    pair = [Note("first", notes), Note("second", notes)]
    torch.compile(model("mxfp4"), backend="quark", options={"joint_custom_pre_pass": pair})(torch.randn(3, 64))
    assert notes == [("first", BEFORE), ("second", BEFORE)]


def test_options_come_before_the_config() -> None:
    notes: list[tuple[str, set[str]]] = []
    options = {"post_grad_custom_post_pass": Note("option", notes)}
    with torch._inductor.config.patch(post_grad_custom_post_pass=Note("config", notes)):
        torch.compile(model("mxfp4"), backend="quark", options=options)(torch.randn(3, 64))
        before = torch._inductor.config.post_grad_custom_post_pass
        assert before.name == "config"  # ours were there for one compile only
    assert [name for name, _ in notes] == ["option"]


def test_a_pass_may_change_the_graph() -> None:
    """What a user's pass makes of a graph is what our rules see."""

    class Double(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
            with graph.inserting_after(relu), V.fake_mode:
                twice = graph.call_function(torch.ops.aten.mul.Tensor, (relu, 2))
                twice.meta = dict(relu.meta)
            relu.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)

        def uuid(self) -> Any:
            return "double"

    quantized, x = model("mxfp4"), torch.randn(3, 64)
    y = torch.compile(quantized, backend="quark", fullgraph=True, options={"joint_custom_pre_pass": Double()})(x)
    torch.testing.assert_close(y, quantized(x) * 2)
    assert kernels() == 1


def test_two_graphs_of_one_model() -> None:
    """A graph break: each half is compiled, and fused."""
    first, second, x = model(), quantize_(nn.Sequential(nn.Linear(32, 16)), "ptpc_fp8"), torch.randn(3, 64)

    def broken(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    torch.testing.assert_close(torch.compile(broken, backend="quark")(x), broken(x))
    assert kernels() == 2
