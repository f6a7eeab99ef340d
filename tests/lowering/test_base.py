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
from quark_inductor.schemes import registry as schemes  # noqa: F401
from quark_inductor.schemes.base import scheme_for
from quark_inductor.schemes.errors import OptionError, QuarkInductorError
from quark_inductor.schemes.ops import MIN_CAPABILITY
from quark_inductor.schemes.spec import PRESETS

CPU, GPU = Target(device_type="cpu", arch="x86_64", isa="portable"), Target(device_type="cuda", arch="gfx950")


def problem(**changes: Any) -> GemmProblem:
    return GemmProblem(**{"op": "block_gemm", "m": None, "n": 64, "k": 64, "dtype": "bfloat16", **changes})


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
        (CPU, {"op": "int8_gemm"}, "has no kernel for int8_gemm; it has fp8_gemm, fp8_prologue_gemm, block_gemm"),
        (CPU, {"dtype": "float64"}, "the result's dtype is float64; it makes bfloat16, float16, float32"),
        (CPU, {"k": 48}, "K = 48 is not a multiple of 32"),
        (CPU, {"op": "block_prologue_gemm", "k": 33}, "K = 33 is not a multiple of 32"),
        (CPU, {"formats": ("mxfp4", "nvfp4")}, "has no kernel for nvfp4; it has mxfp4"),
        (CPU, {"formats": ("mxfp6_e2m3", "mxfp4")}, "has no kernel for mxfp6_e2m3; it has mxfp4"),
        (CPU, {"op": "block_prologue_gemm", "formats": ("mxfp8_e4m3",) * 2}, "has no kernel for mxfp8_e4m3; it has"),
    ],
)
def test_what_cpp_refuses(target: Target, changes: dict[str, Any], reason: str) -> None:
    chosen = select(target, problem(**changes))
    assert chosen.provider is None
    assert chosen.refusals[0].startswith(f"cpp: {reason}")


@pytest.mark.parametrize("op", ["block_gemm", "block_prologue_gemm", "fp8_gemm", "fp8_prologue_gemm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("m", [None, 1, 600])
def test_what_cpp_runs(op: str, dtype: str, m: int | None) -> None:
    for n, k in ((1, 32), (33, 96), (4096, 14336)):
        assert select(CPU, problem(op=op, dtype=dtype, m=m, n=n, k=k)).provider.name == "cpp"


NEEDED = {"block_gemm": 70, "block_prologue_gemm": 70, "fp8_gemm": 89, "fp8_prologue_gemm": 89}


def test_every_fused_op_has_its_min_capability() -> None:
    """That of a scheme whose Linears become the op."""
    assert NEEDED == MIN_CAPABILITY
    for spec in PRESETS.values():
        scheme = scheme_for(spec)
        if scheme.fused_op is not None:
            assert MIN_CAPABILITY[scheme.fused_op] == scheme.get_min_capability()


@pytest.mark.parametrize("op", NEEDED)
@pytest.mark.parametrize("capability", [61, 70, 75, 86, 89, 90, 100, 120])
def test_below_its_min_capability_nobody_is_asked(op: str, capability: int, add: Callable[..., type[Provider]]) -> None:
    """Not even the one who could, nor one that is forced."""
    able = add("able", None)
    target, needed = Target(device_type="cuda", arch=f"sm_{capability}"), NEEDED[op]
    for forced in (None, "able"):
        chosen = select(target, problem(op=op), forced)
        if capability < needed:
            assert chosen.provider is None
            assert chosen.refusals == (
                f"sm_{capability} is below compute capability {needed / 10}, from which {op} has hardware kernels",
            )
        else:
            assert type(chosen.provider) is able


@pytest.mark.parametrize("arch", ["gfx906", "gfx942", "gfx1100", "x86_64", ""])
def test_only_nvidia_has_compute_capabilities(arch: str, add: Callable[..., type[Provider]]) -> None:
    able = add("able", None)
    assert type(select(Target(device_type="cuda", arch=arch), problem(op="fp8_gemm")).provider) is able


def test_an_op_without_a_min_capability_is_anybodys(add: Callable[..., type[Provider]]) -> None:
    able = add("able", None)
    assert type(select(Target(device_type="cuda", arch="sm_61"), problem(op="toy_gemm")).provider) is able


@pytest.mark.parametrize("op", ["fp8_gemm", "fp8_prologue_gemm"])
def test_fp8_of_any_k(op: str) -> None:
    assert select(CPU, problem(op=op, k=33)).provider.name == "cpp"
