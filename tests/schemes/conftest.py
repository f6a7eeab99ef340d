"""The checkpoints that amd-quark exported, without this project's loader."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.spec import PRESETS, LinearSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"


def changed(spec: LinearSpec, weight: dict[str, Any] | None = None, input: dict[str, Any] | None = None) -> LinearSpec:
    """A spec with other fields of its weight and its input."""
    return dataclasses.replace(
        spec,
        weight=dataclasses.replace(spec.weight, **weight or {}),
        input=None if spec.input is None else dataclasses.replace(spec.input, **input or {}),
    )


PER_CHANNEL, ASYMMETRIC = {"qscheme": "per_channel"}, {"symmetric": False}
# Of the checkpoints that are not named as their preset.
SPECS = {
    "fp8_wo": PRESETS["fp8_weight_only"],
    "fp8_wo_perchannel": changed(PRESETS["fp8_weight_only"], PER_CHANNEL),
    "fp8_perchannel_static": changed(PRESETS["fp8"], PER_CHANNEL),
    "fp8_float32_scale": changed(PRESETS["fp8"], {"scale_type": "float32"}, {"scale_type": "float32"}),
    "fp8_block": changed(PRESETS["fp8_block128"], {"block_size": (16, 64)}, {"group_size": 64}),
    "mxfp4_floor": changed(PRESETS["mxfp4"], {"scale_calculation_mode": "floor"}, {"scale_calculation_mode": "floor"}),
    "mxfp4_ceil": changed(PRESETS["mxfp4"], {"scale_calculation_mode": "ceil"}, {"scale_calculation_mode": "ceil"}),
    "mxfp6_e2m3_fp8": dataclasses.replace(PRESETS["mxfp6_e2m3"], input=PRESETS["fp8"].input),
    "int8_perchannel_static": changed(PRESETS["int8"], PER_CHANNEL),
    "int8_perchannel_asym": changed(PRESETS["int8"], PER_CHANNEL | ASYMMETRIC, ASYMMETRIC),
    "int8_wo_perchannel": PRESETS["int8_weight_only"],
    "uint8_static": changed(PRESETS["int8"], {"dtype": "uint8"} | ASYMMETRIC, {"dtype": "uint8"} | ASYMMETRIC),
    "uint4_wo_32_order": dataclasses.replace(PRESETS["uint4_wo_32"], pack_method="order"),
}
# Linears that read one activation: amd-quark gives them one global scale.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Exported:
    """A checkpoint and the numbers that amd-quark's own reload of it gives."""

    def __init__(self, name: str) -> None:
        # clone(): a matmul takes another path for a tensor whose place in the file happens not to be aligned.
        self.tensors = {n: t.clone() for n, t in load_file(FIXTURES / name / "model.safetensors").items()}
        self.reference = {n: t.clone() for n, t in load_file(FIXTURES / name / "reference.safetensors").items()}
        base_name = name.removesuffix("_fp32")
        self.spec = SPECS[base_name] if base_name in SPECS else PRESETS[base_name]
        self.base = "base_wide" if base_name.endswith("_128") else "base"
        self.dtype = self.reference["logits"].dtype
        self.linears = [n.removesuffix(".weight_sha256") for n in self.reference if n.endswith(".weight_sha256")]
        self.recorded = [n.removesuffix(".output") for n in self.reference if n.endswith(".output")]

    def parameters(self, linear: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{linear}."): t for n, t in self.tensors.items() if n.startswith(f"{linear}.")}

    def float_weight(self, linear: str) -> Tensor:
        """What amd-quark quantized."""
        return load_file(FIXTURES / self.base / "model.safetensors")[f"{linear}.weight"].to(self.dtype)

    def layer(self, linear: str) -> QuarkLinear:
        parameters = self.parameters(linear)
        n, k = parameters["weight"].shape
        if self.spec == PRESETS["mxfp4"]:
            k *= 2
        elif self.spec not in (PRESETS["fp8"], PRESETS["ptpc_fp8"]):  # those have fixtures of a larger model, too
            n, k = self.float_weight(linear).shape
        scheme = scheme_for(self.spec)
        layer = QuarkLinear(k, n, scheme, bias="bias" in parameters, dtype=self.dtype)
        empty = {name: (p.shape, p.dtype) for name, p in layer.state_dict().items()}
        assert empty == {name: (p.shape, p.dtype) for name, p in parameters.items()}
        set_parameters(layer, **parameters)
        scheme.process_weights_after_loading(layer)
        return layer

    def check_weights(self) -> None:
        """Every weight is amd-quark's, bit by bit, in the model's dtype."""
        assert len(self.linears) >= 5
        for linear in self.linears:
            layer = self.layer(linear)
            weight = layer.scheme.dequantize_weight(layer, self.dtype)
            digest = hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).digest()
            assert list(digest) == self.reference[f"{linear}.weight_sha256"].tolist(), linear
            stored = self.reference.get(f"{linear}.weight_dequantized", weight)
            assert torch.equal(weight[: len(stored)], stored), linear

    def check_quantize_weight(self) -> None:
        """The float weights quantized again give the file's bytes."""
        scheme = scheme_for(self.spec)
        for linear in self.linears:
            weight, stored = self.float_weight(linear), self.parameters(linear)
            quantized = scheme.quantize_weight(weight)
            if scheme.name == "nvfp4" and self.spec.input is not None:
                path, _, own = linear.rpartition(".")
                group = next((names for names in TOGETHER if own in names), (own,))
                amax = torch.stack([self.float_weight(f"{path}.{name}").abs().amax() for name in group]).amax()
                quantized = scheme.quantize_shared_weight(weight, amax)
            assert quantized.keys() == {n for n in stored if not n.startswith(("input_", "output_", "bias"))}
            for name, tensor in quantized.items():
                found = [(t.shape, t.dtype, t.reshape(-1).view(torch.uint8).tolist()) for t in (tensor, stored[name])]
                assert found[0] == found[1], (linear, name)

    def check_activations_and_outputs(self) -> None:
        """Every recorded input, quantized and dequantized, bit by bit; the outputs up to the order of a sum."""
        assert self.recorded
        for linear in self.recorded:
            layer, x = self.layer(linear), self.reference[f"{linear}.input"]
            rows = x.reshape(-1, x.shape[-1])
            activation = layer.scheme.fake_quantize_input(layer, rows).reshape(x.shape)
            assert torch.equal(activation, self.reference.get(f"{linear}.input_qdq", x)), linear
            weight = layer.scheme.dequantize_weight(layer, self.dtype)
            y = F.linear(activation, weight, self.tensors.get(f"{linear}.bias"))
            assert torch.equal(layer(x), y), linear
            # 256 roundings of a sum, in float32, and one to the dtype.
            sums = F.linear(activation.abs().double(), weight.abs().double())
            unit = torch.finfo(self.dtype).eps
            error = (y.double() - self.reference[f"{linear}.output"].double()).abs()
            assert (error <= unit * y.double().abs() + 2.0**-15 * sums + 1e-30).all(), linear

    def weight_is_amd_quarks(self, linear: str, weight: Tensor) -> bool:
        """By its digest, and by its numbers where the file has them. Both zeros count the same, as in the files."""
        digest = hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).digest()
        stored = self.reference.get(f"{linear}.weight_dequantized", weight)
        return list(digest) == self.reference[f"{linear}.weight_sha256"].tolist() and torch.equal(weight, stored)

    def output(self, linear: str, weight: Tensor) -> Tensor:
        """What this machine's matmul makes of amd-quark's quantized input and ``weight``."""
        return F.linear(self.reference[f"{linear}.input_qdq"], weight, self.tensors.get(f"{linear}.bias"))

    def check_outputs(self, weight: Callable[[dict[str, Tensor], torch.dtype], Tensor]) -> None:
        """Every recorded output, bit by bit: that of this machine's matmul, and amd-quark's if it adds up likewise.

        Args:
            weight: a dequantized weight from stored parameters, by a source that is not this project.
        """
        assert len(self.recorded) >= 2
        elsewhere = []
        for linear in self.recorded:
            y, stored = self.layer(linear)(self.reference[f"{linear}.input"]), self.reference[f"{linear}.output"]
            here = self.output(linear, weight(self.parameters(linear), self.dtype))
            assert y.dtype == stored.dtype
            assert torch.equal(y, here), linear
            if not torch.equal(here, stored):
                elsewhere.append(linear)
        if elsewhere:
            pytest.skip(f"{elsewhere}: the matmul of this CPU adds up in another order than the one of the fixtures")


@pytest.fixture(scope="session")
def exported() -> Callable[[str], Exported]:
    """Of a fixture's name."""
    return functools.cache(Exported)


# What a static input is quantized with, if its values lie between -4 and 4, and any output.
STATIC = {"input_scale": 4 / 127.5, "input_scale_2": 4 / (6 * 448), "input_zero_point": 3, "output_scale": 0.125}


def quantized_linear(
    spec: str | LinearSpec,
    n: int = 48,
    k: int = 128,
    *,
    seed: int = 1,
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> QuarkLinear:
    """A loaded Linear with random weights of a standard deviation of ``size``, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    scheme = scheme_for(PRESETS[spec] if isinstance(spec, str) else spec)
    layer = QuarkLinear(k, n, scheme, bias=True, dtype=dtype)
    weight = (torch.randn(n, k, generator=generator) * size).to(dtype)
    set_parameters(layer, **scheme.quantize_weight(weight), bias=torch.randn(n, generator=generator).to(dtype))
    for name, value in STATIC.items():
        if name in layer._parameters:
            value = 4 / 448 if name == "input_scale" and "fp8" in scheme.spec.input.dtype else value
            zero = name == "input_zero_point" and scheme.spec.input.symmetric
            set_parameters(layer, **{name: torch.tensor(0 if zero else value, dtype=getattr(layer, name).dtype)})
    scheme.process_weights_after_loading(layer)
    return layer


@pytest.fixture(scope="session")
def linear() -> Callable[..., QuarkLinear]:
    """:func:`quantized_linear`."""
    return quantized_linear


@pytest.fixture(scope="session")
def layout() -> Callable[..., dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Shapes and dtypes of what ``create_weights`` makes for output features of shards and K, in float16."""

    def created(spec: str | LinearSpec, widths: list[int], k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        layer = torch.nn.Module()
        scheme_for(PRESETS[spec] if isinstance(spec, str) else spec).create_weights(
            layer, output_partition_sizes=widths, input_size_per_partition=k, params_dtype=torch.float16
        )
        assert not any(p.requires_grad for p in layer.parameters())
        return {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}

    return created


@pytest.fixture(scope="session")
def spec_with() -> Callable[..., LinearSpec]:
    """:func:`changed`."""
    return changed
