"""Who runs a fused op: providers are asked in order, and each says why it cannot."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quark_inductor.lowering import registry  # noqa: F401
from quark_inductor.lowering.base import (
    EMULATION,
    GemmProblem,
    No,
    Provider,
    provider_names,
    register_provider,
    select,
    unregister_provider,
)
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.errors import OptionError, QuarkInductorError

CPU, GPU = Target(device_type="cpu", arch="x86_64", isa="portable"), Target(device_type="cuda", arch="gfx950")


def problem(**changes: Any) -> GemmProblem:
    return GemmProblem(**{"op": "mx_gemm", "m": None, "n": 64, "k": 64, "dtype": "bfloat16", **changes})


@pytest.fixture
def add() -> Iterator[Callable[..., type[Provider]]]:
    added: list[str] = []

    def make(provider_name: str, answer: No | None) -> type[Provider]:
        class Made(Provider):
            name = provider_name

            def can_run(self, target: Target, problem: GemmProblem) -> No | None:
                return answer

            def lower(self, target: Target, problem: GemmProblem, args: Any) -> Any:
                raise NotImplementedError

        register_provider(Made)
        added.append(provider_name)
        return Made

    yield make
    for name in added:
        unregister_provider(name)


def test_the_emulation_is_last(add: Callable[..., type[Provider]]) -> None:
    assert provider_names() == ("cpp", "emulation")
    add("another", None)
    assert provider_names() == ("cpp", "another", "emulation")


def test_names_are_unique(add: Callable[..., type[Provider]]) -> None:
    add("another", None)
    for name in ("another", "cpp", EMULATION):
        with pytest.raises(QuarkInductorError, match=f"two providers are named '{name}'"):
            add(name, None)


def test_the_first_that_can_is_chosen(add: Callable[..., type[Provider]]) -> None:
    add("first", No("on strike"))
    second = add("second", None)
    add("third", None)
    chosen = select(GPU, problem())
    assert type(chosen.provider) is second
    assert chosen.refusals == ("cpp: makes CPU kernels, the device is cuda", "first: on strike")


def test_nobody_can(add: Callable[..., type[Provider]]) -> None:
    add("first", No("on strike"))
    chosen = select(GPU, problem())
    assert chosen.provider is None
    assert chosen.refusals == ("cpp: makes CPU kernels, the device is cuda", "first: on strike")


def test_a_forced_provider_is_the_only_one_asked(add: Callable[..., type[Provider]]) -> None:
    second = add("second", None)
    chosen = select(CPU, problem(), "second")
    assert type(chosen.provider) is second
    assert chosen.refusals == ("cpp: option quark.provider is 'second'",)
    assert select(CPU, problem(), "cpp").provider.name == "cpp"


def test_the_emulation_forced(add: Callable[..., type[Provider]]) -> None:
    add("second", None)
    chosen = select(CPU, problem(), EMULATION)
    assert chosen.provider is None
    assert chosen.refusals == (
        "cpp: option quark.provider is 'emulation'",
        "second: option quark.provider is 'emulation'",
    )


def test_an_unknown_provider() -> None:
    with pytest.raises(OptionError, match="there is no provider 'cpq'; expected one of cpp, emulation"):
        select(CPU, problem(), "cpq")


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (GPU, {}, "makes CPU kernels, the device is cuda"),
        (CPU, {"op": "int8_gemm"}, "has no kernel for int8_gemm; it has fp8_gemm, fp8_prologue_gemm, mx_gemm"),
        (CPU, {"dtype": "float64"}, "the result's dtype is float64; it makes bfloat16, float16, float32"),
        (CPU, {"k": 48}, "K = 48 is not a multiple of 32"),
        (CPU, {"op": "mx_prologue_gemm", "k": 33}, "K = 33 is not a multiple of 32"),
    ],
)
def test_what_cpp_refuses(target: Target, changes: dict[str, Any], reason: str) -> None:
    chosen = select(target, problem(**changes))
    assert chosen.provider is None
    assert chosen.refusals[0].startswith(f"cpp: {reason}")


@pytest.mark.parametrize("op", ["mx_gemm", "mx_prologue_gemm", "fp8_gemm", "fp8_prologue_gemm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("m", [None, 1, 600])
def test_what_cpp_runs(op: str, dtype: str, m: int | None) -> None:
    for n, k in ((1, 32), (33, 96), (4096, 14336)):
        assert select(CPU, problem(op=op, dtype=dtype, m=m, n=n, k=k)).provider.name == "cpp"


@pytest.mark.parametrize("op", ["fp8_gemm", "fp8_prologue_gemm"])
def test_fp8_of_any_k(op: str) -> None:
    assert select(CPU, problem(op=op, k=33)).provider.name == "cpp"
