"""How Inductor comes to a provider: what it is told of a fused op, and what is counted."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from quark_inductor.lowering.base import GemmProblem, No, Provider, register_provider, unregister_provider
from quark_inductor.lowering.cpp import Cpp
from quark_inductor.lowering.registry import FUSED_OPS, count_key
from quark_inductor.lowering.target import Target

q = torch.ops.quark_inductor
FP8 = torch.float8_e4m3fn


def test_every_gemm_has_a_lowering() -> None:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "quark_inductor::" in name
    }
    assert {f.__name__ for f in FUSED_OPS} == {name for name in names if name.endswith("gemm")}
    for fused in FUSED_OPS:
        assert getattr(q, fused.__name__).default in torch._inductor.lowering.lowerings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[GemmProblem]:
    """What providers are asked, everybody refusing."""
    problems: list[GemmProblem] = []

    def can_run(self: Cpp, target: Target, problem: GemmProblem) -> No:
        problems.append(problem)
        return No("never")

    monkeypatch.setattr(Cpp, "can_run", can_run)
    return problems


def operands(m: int, n: int, k: int) -> dict[str, torch.Tensor]:
    scales = {
        "x_scale": torch.ones(m, k // 32, dtype=torch.uint8),
        "w_scale": torch.ones(n, k // 32, dtype=torch.uint8),
    }
    return {
        "x": torch.zeros(m, k, dtype=torch.bfloat16),
        "codes": torch.zeros(m, k // 2, dtype=torch.uint8),
        "weight": torch.zeros(n, k // 2, dtype=torch.uint8),
        "fp8": torch.zeros(m, k).to(FP8),
        "fp8_weight": torch.zeros(n, k).to(FP8),
        "one": torch.ones((), dtype=torch.bfloat16),
        **scales,
    }


@pytest.mark.parametrize(
    ("op", "names", "strings", "expected"),
    [
        (
            "block_gemm",
            "codes x_scale weight w_scale -",
            ("mxfp4", "mxfp4", "float16"),
            {"dtype": "float16", "formats": ("mxfp4", "mxfp4")},
        ),
        (
            "block_prologue_gemm",
            "x weight w_scale -",
            ("mxfp4", "even", "mxfp4"),
            {"dtype": "bfloat16", "formats": ("mxfp4", "mxfp4")},
        ),
        ("fp8_gemm", "fp8 one fp8_weight one -", ("float32",), {"dtype": "float32"}),
        (
            "fp8_prologue_gemm",
            "x - fp8_weight one -",
            ("per_token",),
            {"dtype": "bfloat16", "granularity": "per_token"},
        ),
        (
            "fp8_prologue_gemm",
            "x one fp8_weight one -",
            ("per_tensor",),
            {"dtype": "bfloat16", "granularity": "per_tensor"},
        ),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_problem_is_described(
    compiled: Callable[..., Any],
    asked: list[GemmProblem],
    op: str,
    names: str,
    strings: tuple[str, ...],
    expected: dict[str, Any],
    dynamic: bool,
) -> None:
    """Also what happens to an op that somebody made whom no rule asked: an error that names what each provider said."""
    m, n, k = 3, 5, 64
    tensors = operands(m, n, k)
    args = [tensors.get(name) for name in names.split()]
    if dynamic:
        torch._dynamo.mark_dynamic(args[0], 0)
    with pytest.raises(Exception, match=f"quark_inductor::{op} has no kernel on cpu .*: cpp: never") as error:
        compiled(lambda *a: getattr(q, op)(*a, *strings), *args)
    assert "Call the scheme's emulation instead" in str(error.value)
    assert asked[-1] == GemmProblem(op=op, m=None if dynamic else m, n=n, k=k, **expected)
    assert not [key for key in counters["inductor"] if key.startswith("quark.")]


def test_kernels_are_counted(compiled: Callable[..., Any]) -> None:
    tensors = operands(3, 5, 64)
    x, weight, scale = tensors["x"], tensors["weight"], tensors["w_scale"]

    def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = q.block_prologue_gemm(x, weight, scale, None, "mxfp4", "even", "mxfp4")
        return first, q.block_prologue_gemm(x + 1, weight, scale, None, "mxfp4", "even", "mxfp4")

    compiled(twice, x)
    counted = {key: count for key, count in counters["inductor"].items() if key.startswith("quark.")}
    assert counted == {"quark.block_prologue_gemm.cpp": 2} == {count_key("block_prologue_gemm", "cpp"): 2}


@pytest.fixture
def second() -> Iterator[type[Provider]]:
    """A provider that can do what cpp can, and is asked after it."""

    @register_provider
    class Second(Provider):
        name = "second"

        def can_run(self, target: Target, problem: GemmProblem) -> No | None:
            return None

        def lower(self, target: Target, problem: GemmProblem, args: Any) -> Any:
            return Cpp().lower(target, problem, args)

    yield Second
    unregister_provider(Second.name)


def test_a_forced_provider_makes_the_kernel(compiled: Callable[..., Any], second: type[Provider]) -> None:
    """``quark.provider`` says who may, to the rules and to the lowerings alike."""
    weight, channel = torch.ones(5, 64).to(FP8), torch.ones(5)
    scale = torch.tensor(0.5)

    def fp8_linear(x: torch.Tensor) -> torch.Tensor:
        codes = (x / scale).clamp(-448.0, 448.0).to(FP8)
        return torch.nn.functional.linear(codes.float() * scale, weight.float() * channel.unsqueeze(-1))

    for provider in ("cpp", "second"):
        counters.clear()
        compiled(fp8_linear, torch.ones(3, 64), **{"quark.provider": provider})
        assert counters["inductor"][f"quark.fp8_prologue_gemm.{provider}"] == 1, provider
