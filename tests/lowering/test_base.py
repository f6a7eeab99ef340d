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
    answers,
    forcing,
    gemm_problem,
    provider_keys,
    provider_names,
    register_provider,
    select,
    unregister_provider,
)
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.errors import OptionError, QuarkInductorError
from quark_inductor.schemes.operands import min_capability

PROVIDERS = ("aiter", "scaled_mm", "scaled_mm_blocks", "triton", "cpp")
CPU, GPU = Target(device_type="cpu", arch="x86_64", isa="portable"), Target(device_type="cuda", arch="gfx950")


def problem(**changes: Any) -> GemmProblem:
    both = {"x_format": "mxfp4", "weight_format": "mxfp4", "weight_scale_ndim": 2, "scale_rule": "even"}
    return GemmProblem(**{"op": "prologue_gemm", "m": None, "n": 64, "k": 64, "dtype": "bfloat16", **both, **changes})


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
    assert provider_names() == (*PROVIDERS, "emulation")
    add("another", None)
    assert provider_names() == (*PROVIDERS, "another", "emulation")


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
    assert chosen.refusals[-2:] == ("cpp: makes CPU kernels, the device is cuda", "first: on strike")


def test_nobody_can(add: Callable[..., type[Provider]]) -> None:
    add("first", No("on strike"))
    chosen = select(GPU, problem())
    assert chosen.provider is None
    assert chosen.refusals[-2:] == ("cpp: makes CPU kernels, the device is cuda", "first: on strike")


def test_a_reason_that_several_give_stands_once(add: Callable[..., type[Provider]]) -> None:
    for name, reason in (("first", "on strike"), ("second", "asleep"), ("third", "on strike")):
        add(name, No(reason))
    assert select(GPU, problem()).refusals[-2:] == ("first, third: on strike", "second: asleep")


def test_what_a_provider_finds_is_in_the_cache_key(
    add: Callable[..., type[Provider]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add("first", None)
    before = provider_keys()
    assert [key[0] for key in before] == [*PROVIDERS, "first"]
    monkeypatch.setattr(first, "found", lambda self: ("a library",))
    assert provider_keys() == (*before[:-1], ("first", "a library"))


def test_a_forced_provider_is_the_only_one_asked(add: Callable[..., type[Provider]]) -> None:
    second = add("second", None)
    chosen = select(CPU, problem(), "second")
    assert type(chosen.provider) is second
    assert chosen.refusals == (f"{', '.join(PROVIDERS)}: option quark.provider is 'second': leave it out to ask all",)
    assert select(CPU, problem(), "cpp").provider.name == "cpp"


def test_the_emulation_forced(add: Callable[..., type[Provider]]) -> None:
    add("second", None)
    chosen = select(CPU, problem(), EMULATION)
    assert chosen.provider is None
    assert chosen.refusals == (
        f"{', '.join(PROVIDERS)}, second: option quark.provider is 'emulation': leave it out to ask all",
    )


def test_an_unknown_provider() -> None:
    with pytest.raises(
        OptionError,
        match="there is no provider 'cpq'; expected one of aiter, scaled_mm, scaled_mm_blocks, triton, cpp, emulation",
    ):
        select(CPU, problem(), "cpq")


def test_forcing_holds_inside(add: Callable[..., type[Provider]]) -> None:
    """What is asked for by name is stronger."""
    second = add("second", None)
    with forcing("second"):
        assert type(select(CPU, problem()).provider) is second
        with forcing(EMULATION):
            assert select(CPU, problem()).provider is None
        assert select(CPU, problem(), "cpp").provider.name == "cpp"
    assert select(CPU, problem()).provider.name == "cpp"


def test_a_problem_in_words() -> None:
    assert str(problem()) == "prologue_gemm of mxfp4 even and mxfp4"
    assert str(problem(op="quantized_gemm", scale_rule="")) == "quantized_gemm of mxfp4 and mxfp4"
    of_floats = problem(op="weight_only_gemm", x_format="", scale_rule="", weight_format="int4")
    assert str(of_floats) == "weight_only_gemm of bfloat16 and int4"


# --- what a problem is made of


def described(op: str, **args: Any) -> GemmProblem:
    """Of arguments whose tensors are a shape and a dtype's name."""
    return gemm_problem(op, args, lambda tensor: list(tensor[0]), lambda tensor: tensor[1])


def test_the_problem_of_a_weight() -> None:
    x, weight = ([None, 64], "float16"), ([24, 32], "uint8")
    found = described(
        "weight_only_gemm", x=x, weight=weight, weight_scale=([24, 2], "uint8"), bias=None, weight_format="mxfp4"
    )
    assert found == GemmProblem(
        op="weight_only_gemm", m=None, n=24, k=64, dtype="float16", weight_format="mxfp4", weight_scale_ndim=2
    )


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [([], "per_tensor"), ([3, 1], "per_token"), ([None, 1], "per_token"), ([3, 4], "per_group")],
)
def test_the_problem_of_quantized_operands(shape: list[int | None], granularity: str) -> None:
    """The dtype is the one asked for: codes have none."""
    found = described(
        "quantized_gemm",
        x=([3, 64], "int8"),
        x_scale=(shape, "float32"),
        weight=([64, 3], "int32"),
        weight_scale=([4, 24], "float32"),
        x_format="int8",
        weight_format="int4",
        out_dtype="bfloat16",
    )
    assert found == GemmProblem(
        op="quantized_gemm",
        m=3,
        n=24,
        k=64,
        dtype="bfloat16",
        weight_format="int4",
        weight_scale_ndim=2,
        weight_columns=16,
        x_format="int8",
        x_granularity=granularity,
        x_columns=64 // shape[-1] if granularity == "per_group" else 0,
    )


def test_the_problem_of_a_prologue() -> None:
    found = described(
        "prologue_gemm",
        x=([3, 64], "bfloat16"),
        x_scale=None,
        weight=([24, 64], "float8_e4m3fn"),
        weight_scale=([], "float32"),
        x_format="fp8_e4m3",
        scale_rule="amax",
        group_size=16,
        weight_format="fp8_e4m3",
    )
    assert found == GemmProblem(
        op="prologue_gemm",
        m=3,
        n=24,
        k=64,
        dtype="bfloat16",
        weight_format="fp8_e4m3",
        x_format="fp8_e4m3",
        scale_rule="amax",
        group_size=16,
        x_columns=16,
    )


# --- the provider cpp


LOGARITHM = "takes a logarithm, which two libraries round differently: quantize with 'even'"


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (GPU, {}, "makes CPU kernels, the device is cuda"),
        (
            CPU,
            {"op": "int8_gemm"},
            "has no kernel for int8_gemm; it has prologue_gemm, quantized_gemm, weight_only_gemm",
        ),
        (
            CPU,
            {"dtype": "float64"},
            "the result's dtype is float64; it makes bfloat16, float16, float32: choose one with load(dtype=)",
        ),
        (CPU, {"k": 48}, "K = 48 is not a multiple of 32"),
        (CPU, {"k": 40, "x_format": "nvfp4", "weight_format": "int8"}, "K = 40 is not a multiple of 16"),
        (CPU, {"k": 33, "x_format": "fp8_e4m3", "weight_format": "mxfp4"}, "K = 33 is not a multiple of 32"),
        (CPU, {"op": "weight_only_gemm", "k": 33, "x_format": ""}, "K = 33 is not a multiple of 32"),
        (CPU, {"scale_rule": "floor"}, f"scale rule 'floor' {LOGARITHM}"),
        (CPU, {"scale_rule": "ceil", "x_format": "mxfp6_e2m3"}, f"scale rule 'ceil' {LOGARITHM}"),
        (CPU, {"weight_format": "fp8_e4m3fnuz"}, "has no kernel for fp8_e4m3fnuz"),
        (CPU, {"weight_format": "fp8_e4m3fnuz_128x128"}, "has no kernel for fp8_e4m3fnuz_128x128"),
        (CPU, {"x_format": "fp8_e4m3fnuz"}, "has no kernel for fp8_e4m3fnuz"),
    ],
)
def test_what_cpp_refuses(target: Target, changes: dict[str, Any], reason: str) -> None:
    chosen = select(target, problem(**changes))
    assert chosen.provider is None
    assert chosen.refusals[-1] == f"cpp: {reason}"


@pytest.mark.parametrize(
    "formats",
    [
        {},
        {"op": "quantized_gemm", "scale_rule": ""},
        {"op": "weight_only_gemm", "scale_rule": "", "x_format": ""},
        {"x_format": "mxfp6_e2m3"},
        {"x_format": "mxfp8_e4m3", "scale_rule": "rceil", "weight_format": "mxfp8_e4m3"},
        {"x_format": "nvfp4", "scale_rule": "sequential", "weight_format": "nvfp4"},
        {"x_format": "fp8_e4m3", "scale_rule": "amax", "weight_format": "fp8_e4m3", "weight_scale_ndim": 1},
        {"x_format": "int8", "scale_rule": "given", "x_granularity": "per_tensor", "weight_format": "int8"},
        {"x_format": "fp8_e5m2", "scale_rule": "amax", "group_size": 32, "weight_format": "uint4_order"},
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("m", [None, 1, 127])
def test_what_cpp_runs(formats: dict[str, Any], dtype: str, m: int | None) -> None:
    for n, k in ((1, 32), (33, 96), (4096, 14336)):
        assert select(CPU, problem(dtype=dtype, m=m, n=n, k=k, **formats)).provider.name == "cpp"


def test_the_generic_kernel_is_for_few_tokens() -> None:
    """Where the emulation is faster, it runs; formats with kernels of their own have no such limit."""
    int8: dict[str, Any] = {"op": "weight_only_gemm", "weight_format": "int8"}
    assert select(CPU, problem(**int8, m=127)).provider.name == "cpp"
    chosen = select(CPU, problem(**int8, m=128))
    assert chosen.provider is None
    assert chosen.refusals[-1] == (
        "cpp: from M = 128 on the generic kernel is slower than the compiled emulation; M is 128: "
        "weights packed by load or quantize_ have faster ones"
    )
    mxfp4: dict[str, Any] = {"op": "prologue_gemm", "x_format": "mxfp4", "scale_rule": "even", "weight_format": "mxfp4"}
    assert select(CPU, problem(**mxfp4, m=4096)).provider.name == "cpp"


@pytest.mark.parametrize("op", ["weight_only_gemm", "quantized_gemm", "prologue_gemm"])
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "int8", "uint8"])
def test_8_bits_of_any_k(op: str, format: str) -> None:
    assert (
        select(CPU, problem(op=op, k=33, x_format=format, weight_format=format, scale_rule="")).provider.name == "cpp"
    )


# --- compute capabilities


# Of a weight's format; tests/schemes/test_operands.py compares them with the schemes'.
NEEDED = {
    "mxfp4": 70,
    "mxfp8_e4m3": 70,
    "nvfp4": 75,
    "amdfp4_g16": 70,
    "fp8_e4m3": 89,
    "fp8_e5m2_128x128": 89,
    "int8": 75,
    "uint8": 75,
    "int4": 70,
    "uint4_order": 70,
    "int4_fp8": 89,
}


@pytest.mark.parametrize("format", NEEDED)
@pytest.mark.parametrize("capability", [61, 70, 75, 86, 89, 90, 100, 120])
def test_below_its_min_capability_nobody_is_asked(
    format: str, capability: int, add: Callable[..., type[Provider]]
) -> None:
    """Not even the one who could, nor one that is forced."""
    able = add("able", None)
    target, needed = Target(device_type="cuda", arch=f"sm_{capability}"), NEEDED[format]
    assert min_capability(format) == needed
    for forced in (None, "able"):
        chosen = select(target, problem(weight_format=format), forced)
        if capability < needed:
            assert chosen.provider is None
            assert chosen.refusals == (
                f"sm_{capability} is below compute capability {needed / 10}, from which weights in {format} have "
                "hardware kernels",
            )
        else:
            assert type(chosen.provider) is able


@pytest.mark.parametrize("arch", ["gfx906", "gfx942", "gfx1100", "x86_64", ""])
def test_only_nvidia_has_compute_capabilities(arch: str, add: Callable[..., type[Provider]]) -> None:
    able = add("able", None)
    target = Target(device_type="cuda", arch=arch)
    assert type(select(target, problem(weight_format="fp8_e4m3")).provider) is able


def test_a_format_of_somebody_elses_needs_what_most_do(add: Callable[..., type[Provider]]) -> None:
    able = add("able", None)
    other = problem(op="toy_gemm", weight_format="toy")
    assert type(select(Target(device_type="cuda", arch="sm_70"), other).provider) is able
    assert select(Target(device_type="cuda", arch="sm_61"), other).provider is None


def test_all_are_asked(add: Callable[..., type[Provider]]) -> None:
    """Those after the first that can, too."""
    add("first", None)
    add("second", No("too large"))
    cpu = Target(device_type="cpu", arch="x86_64")
    said = answers(cpu, problem(op="toy_gemm", weight_format="toy"))
    assert tuple(said) == provider_names()[:-1]
    assert said["first"] is None
    assert said["second"] == No("too large")
    below = answers(Target(device_type="cuda", arch="sm_70"), problem(weight_format="fp8_e4m3"))
    assert {answer and answer.reason.partition(",")[0] for answer in below.values()} == {
        "sm_70 is below compute capability 8.9"
    }
