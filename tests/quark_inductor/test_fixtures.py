"""Every checkpoint amd-quark exported gives amd-quark's numbers, bit by bit.

Weights, quantized activations, outputs of Linears, logits, against what amd-quark's own reload of the same files
computed (``tests/fixtures/make_fixtures.py``). A zero may have either sign: digests and comparisons are of ``x + 0.0``.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quark_inductor as qi
from quark_inductor.schemes.base import QuarkLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/reference.safetensors"))

# Rows of special.input whose numbers are not amd-quark's, with the reason. fixtures/values.py says what each row is.
_NAN_BLOCK = "amd-quark passes a NaN or an infinity on, element by element; here its block is NaN, as OCP MX has it"
_INFINITE = "an infinite scale: what 0 * infinity becomes as an integer is not defined; neither result is finite"
_NAN_CODE = "an integer cannot be NaN: which code a NaN gets is not defined"
_TINY_SCALE = "E8M0 ends at 2**-127, amd-quark goes on with what bfloat16 or float32 can hold"
EXCEPTIONS: dict[tuple[str, int], str] = {
    **{(name, row): _NAN_BLOCK for name in ("amdfp4", "amdfp4_g32") for row in (1, 2)},
    ("nvfp4", 2): _NAN_BLOCK,
    ("int8", 1): _NAN_CODE,
    ("int8_perchannel_asym", 1): _NAN_CODE,
    ("int8_dynamic", 2): _INFINITE,
    ("mxfp4_floor", 11): _TINY_SCALE,
    ("mxfp4_ceil", 11): _TINY_SCALE,
    ("mxfp4_floor", 12): _TINY_SCALE,
}


@functools.cache
def reference(name: str) -> dict[str, Tensor]:
    # clone(): a matmul takes another path for a tensor whose place in the file happens not to be aligned.
    return {n: t.clone() for n, t in load_file(FIXTURES / name / "reference.safetensors").items()}


@functools.cache
def loaded(name: str) -> Any:
    return qi.load(FIXTURES / name)


def digest(x: Tensor) -> list[int]:
    return list(hashlib.sha256((x + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).digest())


def linear(name: str, module: str) -> QuarkLinear:
    found = loaded(name).get_submodule(module)
    assert isinstance(found, QuarkLinear)
    return found


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


@pytest.mark.parametrize("name", NAMES)
def test_weights(name: str) -> None:
    digests = {n: t for n, t in reference(name).items() if n.endswith(".weight_sha256")}
    dtype = loaded(name).dtype
    for key, expected in digests.items():
        layer = linear(name, key.removesuffix(".weight_sha256"))
        assert digest(layer.scheme.dequantize_weight(layer, dtype)) == expected.tolist(), key
    quantized = [n for n, m in loaded(name).named_modules() if isinstance(m, QuarkLinear) and m.scheme.spec.weight]
    assert {k.removesuffix(".weight_sha256") for k in digests} == set(quantized) != set()


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_weights_where_they_are_kept(name: str) -> None:
    for key, expected in reference(name).items():
        if key.endswith(".weight_dequantized"):
            layer = linear(name, key.removesuffix(".weight_dequantized"))
            ours = layer.scheme.dequantize_weight(layer, expected.dtype)
            assert torch.equal(ours[: len(expected)], expected), key


@pytest.mark.parametrize("name", NAMES)
def test_quantized_activations(name: str) -> None:
    for key, expected in reference(name).items():
        if key.endswith(".input_qdq") and not key.startswith("special."):
            module = key.removesuffix(".input_qdq")
            layer, x = linear(name, module), reference(name)[f"{module}.input"]
            ours = layer.scheme.fake_quantize_input(layer, x.flatten(0, -2)).view(x.shape)
            assert torch.equal(ours, expected), key


@pytest.mark.parametrize("name", [n for n in NAMES if "special.input" in reference(n)])
def test_special_activations(name: str) -> None:
    layer, numbers = linear(name, "model.layers.0.self_attn.q_proj"), reference(name)
    rows = numbers.get("special.rows", torch.arange(numbers["special.input"].shape[1])).tolist()
    assert len(rows) == numbers["special.input"].shape[1]
    different = set()
    for row, x, expected in zip(rows, numbers["special.input"][0], numbers["special.input_qdq"][0], strict=True):
        if not same(layer.scheme.fake_quantize_input(layer, x[None])[0], expected).all():
            different.add(row)
    excepted = {row for (scheme, row) in EXCEPTIONS if scheme == name.removesuffix("_fp32")}
    assert different <= excepted, f"rows {sorted(different - excepted)}"


def test_every_exception_is_one() -> None:
    """A row that gives amd-quark's numbers after all has no business in the list."""
    for (scheme, row), reason in EXCEPTIONS.items():
        different = False
        for name in (n for n in (scheme, f"{scheme}_fp32") if n in NAMES):
            layer, numbers = linear(name, "model.layers.0.self_attn.q_proj"), reference(name)
            at = numbers["special.rows"].tolist().index(row)
            x, expected = numbers["special.input"][0, at], numbers["special.input_qdq"][0, at]
            different |= not same(layer.scheme.fake_quantize_input(layer, x[None])[0], expected).all()
        assert different, f"{scheme}, row {row}: {reason}"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_linears(name: str, adds_up_alike: bool) -> None:
    """Bit by bit where this CPU adds up as the one of the fixtures, else within the error of a sum of K products."""
    for key, expected in reference(name).items():
        module = key.removesuffix(".output")
        x = reference(name).get(f"{module}.input")
        if not key.endswith(".output") or x is None or module.endswith(".experts"):
            continue
        ours = linear(name, module)(x)
        if adds_up_alike:
            assert torch.equal(ours, expected), key
        else:
            bound = (
                2 * x.shape[-1] * 2.0**-24 * expected.abs().max().float() + expected.abs() * torch.finfo(x.dtype).eps
            )
            assert ((ours - expected).abs() <= bound).all(), key


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("moe_")])
def test_outputs_of_experts(name: str, adds_up_alike: bool) -> None:
    if not adds_up_alike:
        pytest.skip("this CPU adds up in another order than the one of the fixtures")
    numbers, module = reference(name), "model.layers.0.mlp.experts"
    x, index, weights = (numbers[f"{module}.{part}"] for part in ("input", "top_k_index", "top_k_weights"))
    assert torch.equal(loaded(name).get_submodule(module)(x, index, weights), numbers[f"{module}.output"])


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, adds_up_alike: bool) -> None:
    if not adds_up_alike:
        pytest.skip("this CPU adds up in another order than the one of the fixtures")
    with torch.no_grad():
        logits = loaded(name)(reference(name)["ids"]).logits
    assert torch.equal(logits, reference(name)["logits"])


def test_quantized_outputs_are_the_kv_cache() -> None:
    """k_proj and v_proj give FP8 numbers, before the rotary embedding; so does q_proj with FP8 attention."""
    for name, modules in {
        "fp8_kv_fp8": ("k_proj", "v_proj"),
        "mxfp4_kv_fp8": ("k_proj", "v_proj"),
        "mxfp4_kv_excluded": ("k_proj", "v_proj"),
        "fp8_attn_fp8": ("q_proj", "k_proj", "v_proj"),
    }.items():
        for m in ("q_proj", "k_proj", "v_proj"):
            layer = linear(name, f"model.layers.0.self_attn.{m}") if m in modules else None
            if layer is None:
                continue
            x = reference(name)["model.layers.0.self_attn.q_proj.input"]
            y = layer(x)
            codes = (y / layer.output_scale).to(torch.float8_e4m3fn)
            assert torch.equal(codes.to(y.dtype) * layer.output_scale, y), (name, m)
            kept = reference(name).get(f"model.layers.0.self_attn.{m}.output")
            assert kept is None or torch.equal(y, kept), (name, m)
