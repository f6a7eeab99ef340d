"""How Inductor comes to a provider: what it is told of a fused op, and what is counted."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from quark_inductor.lowering.base import GemmProblem, No, Provider, register_provider, unregister_provider
from quark_inductor.lowering.cpp import Cpp
from quark_inductor.lowering.registry import FUSED_OPS, count_key, kernel_counts
from quark_inductor.lowering.target import Target
from quark_inductor.schemes import ops

q = torch.ops.quark_inductor
FP8 = torch.float8_e4m3fn


def test_every_gemm_has_a_lowering() -> None:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "quark_inductor::" in name
    }
    assert {f.__name__ for f in FUSED_OPS} == {name for name in names if name.endswith("gemm")} == ops.FUSED_OPS
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
    return {
        "x": torch.zeros(m, k, dtype=torch.bfloat16),
        "codes": torch.zeros(m, k // 2, dtype=torch.uint8),
        "x_scale": torch.ones(m, k // 32, dtype=torch.uint8),
        "weight": torch.zeros(n, k // 2, dtype=torch.uint8),
        "w_scale": torch.ones(n, k // 32, dtype=torch.uint8),
        "fp8": torch.zeros(m, k).to(FP8),
        "token": torch.ones(m, 1, dtype=torch.float32),
        "groups": torch.ones(m, 4, dtype=torch.bfloat16),
        "fp8_weight": torch.zeros(n, k).to(FP8),
        "one": torch.ones((), dtype=torch.bfloat16),
        "channel": torch.ones(n, dtype=torch.bfloat16),
        "integers": torch.zeros(m, k, dtype=torch.int8),
        "integer": torch.zeros((), dtype=torch.int32),
        "packed": torch.zeros(k, n // 8, dtype=torch.int32),
        "packed_scale": torch.ones(2, n, dtype=torch.bfloat16),
        "packed_zero": torch.zeros(2, n // 8, dtype=torch.int32),
    }


BY_MXFP4 = {"weight_format": "mxfp4", "weight_scale_ndim": 2}
BY_FP8 = {"weight_format": "fp8_e4m3"}


@pytest.mark.parametrize(
    ("op", "names", "constants", "expected"),
    [
        ("weight_only_gemm", "x weight w_scale - - -", ("mxfp4",), {"dtype": "bfloat16", **BY_MXFP4}),
        (
            "weight_only_gemm",
            "x packed packed_scale - packed_zero channel",
            ("uint4",),
            {
                "dtype": "bfloat16",
                "weight_format": "uint4",
                "weight_scale_ndim": 2,
                "weight_columns": 32,
                "zero_points": True,
            },
        ),
        (
            "quantized_gemm",
            "codes x_scale - - weight w_scale - - -",
            ("mxfp4", "mxfp4", "float16"),
            {"dtype": "float16", "x_format": "mxfp4", "x_granularity": "per_group", **BY_MXFP4},
        ),
        (
            "quantized_gemm",
            "fp8 one - - fp8_weight one - - -",
            ("fp8_e4m3", "fp8_e4m3", "float32"),
            {"dtype": "float32", "x_format": "fp8_e4m3", "x_granularity": "per_tensor", **BY_FP8},
        ),
        (
            "quantized_gemm",
            "fp8 token - - fp8_weight channel - - channel",
            ("fp8_e4m3", "fp8_e4m3", "float32"),
            {
                "dtype": "float32",
                "x_format": "fp8_e4m3",
                "x_granularity": "per_token",
                "weight_scale_ndim": 1,
                **BY_FP8,
            },
        ),
        (
            "quantized_gemm",
            "integers groups - integer weight w_scale - - -",
            ("int8", "mxfp4", "bfloat16"),
            {
                "dtype": "bfloat16",
                "x_format": "int8",
                "x_granularity": "per_group",
                "x_columns": 16,
                "zero_points": True,
                **BY_MXFP4,
            },
        ),
        (
            "prologue_gemm",
            "x - - - weight w_scale - - -",
            ("mxfp4", "even", 0, "mxfp4"),
            {"dtype": "bfloat16", "x_format": "mxfp4", "scale_rule": "even", **BY_MXFP4},
        ),
        (
            "prologue_gemm",
            "x - - - fp8_weight one - - -",
            ("fp8_e4m3", "amax", 16, "fp8_e4m3"),
            {
                "dtype": "bfloat16",
                "x_format": "fp8_e4m3",
                "scale_rule": "amax",
                "group_size": 16,
                "x_columns": 16,
                **BY_FP8,
            },
        ),
        (
            "prologue_gemm",
            "x one - - fp8_weight one - - -",
            ("fp8_e4m3", "given", 0, "fp8_e4m3"),
            {
                "dtype": "bfloat16",
                "x_format": "fp8_e4m3",
                "scale_rule": "given",
                "x_granularity": "per_tensor",
                **BY_FP8,
            },
        ),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_problem_is_described(
    compiled: Callable[..., Any],
    asked: list[GemmProblem],
    op: str,
    names: str,
    constants: tuple[str | int, ...],
    expected: dict[str, Any],
    dynamic: bool,
) -> None:
    """Also what happens to an op that somebody made whom no rule asked: an error that names what each provider said."""
    m, n, k = 3, 24, 64
    tensors = operands(m, n, k)
    args = [tensors.get(name) for name in names.split()]
    if dynamic:
        torch._dynamo.mark_dynamic(args[0], 0)
    with pytest.raises(Exception, match=f"quark_inductor::{op} has no kernel on cpu .*; cpp: never") as error:
        compiled(lambda *a: getattr(q, op)(*a, *constants), *args)
    assert "Call the scheme's emulation instead" in str(error.value)
    assert asked[-1] == GemmProblem(op=op, m=None if dynamic else m, n=n, k=k, **expected)
    assert not [key for key in counters["inductor"] if key.startswith("quark.")]


def test_kernels_are_counted(compiled: Callable[..., Any]) -> None:
    tensors = operands(3, 5, 64)
    x, weight, scale = tensors["x"], tensors["weight"], tensors["w_scale"]
    rest = (None, None, None, weight, scale, None, None, None, "mxfp4", "even", 0, "mxfp4")

    def three(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = q.prologue_gemm(x, *rest), q.prologue_gemm(x + 1, *rest)
        return *both, q.weight_only_gemm(x, weight, scale, None, None, None, "mxfp4")

    before = kernel_counts().get("cpp", 0)
    compiled(three, x)
    counted = {key: count for key, count in counters["inductor"].items() if key.startswith("quark.")}
    assert counted == {count_key("prologue_gemm", "cpp"): 2, count_key("weight_only_gemm", "cpp"): 1}
    assert set(counted) == {"quark.prologue_gemm.cpp", "quark.weight_only_gemm.cpp"}
    assert kernel_counts()["cpp"] == before + 3


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
        assert counters["inductor"][f"quark.prologue_gemm.{provider}"] == 1, provider
