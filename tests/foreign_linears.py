"""Emulated quantized Linears of compressed-tensors, torchao and amd-quark: for test_foreign.py and its benchmark.

Each is ``Linear(256, 64)`` with a bias, quantized by the library's own functions; where the library's forward does not
trace to one graph, what breaks it is taken out, without a change of a value (each place says what).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from quark_inductor.testing import Rewrite

# Module -> distribution.
LIBRARIES = {"compressed_tensors": "compressed-tensors", "torchao": "torchao", "quark": "amd-quark"}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
K, N = 256, 64
WHOLE, GEMM, NONE = "fused whole", "GEMM fused, activation emulated", "not fused"
Case = Callable[[torch.dtype], nn.Module]


def linear(dtype: torch.dtype, n: int = N, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, n, dtype=dtype).eval().requires_grad_(False)


def example(dtype: torch.dtype, dims: int = 3) -> Tensor:
    """Tokens, of which one is zero and one has an outlier."""
    torch.manual_seed(1)
    x = torch.randn(2, 8, K)
    x[0, 3], x[1, 2, 5] = 0, 300
    return x.to(dtype) if dims == 3 else x.to(dtype).flatten(0, 1)


def cases(library: str) -> Mapping[str, Case]:
    """The library's cases by name; only what is called imports the library."""
    return {"compressed_tensors": _compressed_tensors, "torchao": _torchao, "quark": _quark}[library]()


def shapes(library: str, name: str) -> tuple[int, ...]:
    """How many dimensions an input of a case may have: torchao's static INT8 takes no batch, an export one size."""
    if library == "torchao" and name.startswith(("int8 static", "pt2e")):
        return (2,) if name.startswith("int8 static") else (3,)
    return 3, 2


def release(library: str) -> str:
    """Name and version of the distribution."""
    return f"{LIBRARIES[library]} {version(LIBRARIES[library])}"


@contextlib.contextmanager
def traceable(library: str) -> Iterator[None]:
    """Inside, a library's modules are made, called and traced; takes out of amd-quark what is no computation.

    ``implicit_replication`` is for distributed tensors, ``check_min_max_valid`` branches on data, and the counter of
    observed tokens is for a report.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if library == "quark":
            os.environ.setdefault("QUARK_DISABLE_COMPILE", "1")
            from quark.torch.export.nn.modules import realquantizer
            from quark.torch.quantization import tensor_quantize
            from quark.torch.quantization.observer import observer

            stack.enter_context(patch.object(realquantizer, "implicit_replication", contextlib.nullcontext))
            stack.enter_context(patch.object(observer, "check_min_max_valid", lambda *values: True))
            stack.enter_context(patch.object(tensor_quantize, "QUARK_COUNT_OBSERVED_SAMPLES", False))
        yield


def outcome(done: Rewrite) -> tuple[str, tuple[str, ...], str]:
    """What became of a graph's only Linear: how much is fused, by which rules, and why it is no more."""
    if done.result.linears:
        (result,) = done.result.linears
        kind = WHOLE if result.fused else NONE if result.provider == "emulation" else GEMM
        return kind, result.rules, "; ".join(result.refusals)
    ops = {str(node.target).removesuffix(".default") for node in done.before.nodes if node.op == "call_function"}
    gemm = next((op for op in ("aten._int_mm", "aten._scaled_mm", "aten._weight_int4pack_mm_for_cpu") if op in ops), "")
    if gemm:
        return NONE, (), f"it is a quantized GEMM already: {gemm}"
    inputs = [node.meta["val"] for node in done.before.nodes if node.op == "placeholder"]
    if any(not value.is_floating_point() and value.ndim == 2 for value in inputs):
        return NONE, (), "no refusal says why"
    return NONE, (), "the weight is stored in floating point"


# --- compressed-tensors

_CT_PRESETS = (
    *("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "W4AFP8", "W4A8", "W8A16"),
    *("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP6A8", "MXFP4xFP8"),
)
# Type and strategy of the weight's scales, then strategy, symmetry and dynamism of the input's; of 8 bits.
_CT_OTHER = {
    "INT8_STATIC_ASYM": ("int", "channel", "tensor", False, False),
    "INT8_DYNAMIC_ASYM": ("int", "channel", "token", False, True),
    "FP8_TENSOR_DYNAMIC": ("float", "tensor", "tensor", True, True),
}


def _ct_scheme(name: str) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    if name not in _CT_OTHER:
        return preset_name_to_scheme(name, ["Linear"])
    kind, weight, strategy, symmetric, dynamic = _CT_OTHER[name]
    common = {"num_bits": 8, "type": kind}
    activations = QuantizationArgs(**common, strategy=strategy, symmetric=symmetric, dynamic=dynamic)
    weights = QuantizationArgs(**common, strategy=weight, symmetric=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)


def _ct_set_parameters(layer: Any, base: str, args: Any, value: Tensor) -> None:
    """The scales and zero points of a tensor, as an observer of compressed-tensors' callers gives them."""
    from compressed_tensors.quantization import QuantizationStrategy
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.quantization.utils.helpers import generate_gparam

    if args is None or args.dynamic is True:
        return
    global_scale = None
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        global_scale = generate_gparam(*torch.aminmax(value.float()))
        getattr(layer, f"{base}_global_scale").data.copy_(global_scale)
    if args.dynamic:  # "local": the global scale only
        return
    if args.strategy == QuantizationStrategy.TENSOR:
        low, high = torch.aminmax(value)
    elif args.strategy == QuantizationStrategy.CHANNEL:
        low, high = torch.aminmax(value, dim=-1, keepdim=True)
    elif args.strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure
        padded = nn.functional.pad(value, (0, -value.shape[1] % columns, 0, -value.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = torch.aminmax(value.unflatten(-1, (-1, args.group_size)), dim=-1)
    computed = calculate_qparams(low, high, args, global_scale=global_scale)
    for name, result in zip(("scale", "zero_point"), computed, strict=True):
        if (parameter := getattr(layer, f"{base}_{name}", None)) is not None:
            parameter.data.copy_(result.reshape(parameter.shape))


class _CtForward(nn.Module):
    """The forward that compressed-tensors gives a Linear, without its ``patch_attr``, which Dynamo cannot trace."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def weight(self) -> Tensor:
        from compressed_tensors.quantization import QuantizationStatus
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        layer = self.layer
        if layer.quantization_status >= QuantizationStatus.COMPRESSED:
            return layer.weight
        return forward_quantize(layer, layer.weight, "weight", layer.quantization_scheme.weights)

    def forward(self, x: Tensor) -> Tensor:
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        weight, activations = self.weight(), self.layer.quantization_scheme.input_activations
        if activations is not None:
            x = forward_quantize(self.layer, x, "input", activations)
        return nn.functional.linear(x, weight.to(x.dtype), self.layer.bias)


class _CtCodes(_CtForward):
    """A compressed Linear that decompresses its weight in each forward; the library does it once, before the first."""

    def __init__(self, layer: Any) -> None:
        from compressed_tensors.compressors.base import BaseCompressor

        super().__init__(layer)
        self.compressor = BaseCompressor.get_value_from_registry(layer.quantization_scheme.format.value)
        # An int64 tensor, which decompress() reads by item(): a graph break.
        shape = getattr(layer, "weight_shape", None)
        self.shape = {} if shape is None else {"weight_shape": tuple(shape.tolist())}

    def weight(self) -> Tensor:
        scheme = self.layer.quantization_scheme
        tensors = (*self.layer.named_parameters(), *self.layer.named_buffers())
        state = {**{name: tensor.data for name, tensor in tensors}, **self.shape}
        if "weight_packed" not in state or scheme.weights.type != "float":
            return self.compressor.decompress(state, scheme)["weight"]
        # What decompress() does with FP4 and FP6, but for the nn.Parameter in which it returns the scale.
        from compressed_tensors.compressors.mxfp6.base import unpack_fp6_from_uint8
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        unpack = unpack_fp6_from_uint8 if scheme.weights.num_bits == 6 else unpack_fp4_from_uint8
        packed = state["weight_packed"]
        codes = unpack(packed, packed.shape[0], packed.shape[1] * 8 // scheme.weights.num_bits)
        scale = self.compressor._decompress_scale(state["weight_scale"], codes.dtype)
        global_scale = state.get("weight_global_scale")
        return dequantize(x_q=codes, scale=scale, args=scheme.weights, global_scale=global_scale, dtype=codes.dtype)


def _ct_layer(name: str, form: str, dtype: torch.dtype) -> nn.Module:
    from compressed_tensors.compressors.base import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    layer: Any = linear(dtype)
    scheme = _ct_scheme(name)
    initialize_module_for_quantization(layer, scheme, force_zero_point=False)
    _ct_set_parameters(layer, "weight", scheme.weights, layer.weight.data)
    _ct_set_parameters(layer, "input", scheme.input_activations, example(dtype))
    layer.quantization_status = QuantizationStatus.FROZEN
    if form == "fake":
        return _CtForward(layer)
    compress_module(layer)
    if form == "codes":
        return _CtCodes(layer)
    decompress_module(layer)
    return _CtForward(layer)


def _compressed_tensors() -> Mapping[str, Case]:
    """Weights quantized and dequantized in each forward, codes dequantized in each, dequantized once before."""
    names = (*_CT_PRESETS, *_CT_OTHER)
    return {
        f"{name} {form}": functools.partial(_ct_layer, name, form)
        for form in ("fake", "codes", "dense")
        for name in names
    }


# --- torchao


def _ao() -> Any:
    """Configurations, granularities and mappings under one roof."""
    import torchao.quantization as quantization
    from torchao.quantization import granularity, quant_primitives

    names = {"MappingType": quant_primitives.MappingType, "PerGroup": granularity.PerGroup}
    names |= {"PerRow": granularity.PerRow, "PerTensor": granularity.PerTensor}
    return SimpleNamespace(**vars(quantization), **{k: v for k, v in names.items() if not hasattr(quantization, k)})


def _ao_quantized(config: Callable[[], Any], dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import quantize_

    model = nn.Sequential(linear(dtype))
    quantize_(model, config())
    assert type(model[0].weight.data) is not Tensor, "torchao quantized nothing"
    return model[0]


def _ao_int8_static(symmetric: bool, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    x = example(dtype, 2)
    scale, zero_point = choose_qparams_affine(
        x, mapping, list(x.shape), torch.int8, scale_dtype=torch.float32, zero_point_dtype=torch.int8, keepdim=True
    )
    return _ao_quantized(
        lambda: _ao().Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale,
            act_quant_zero_point=None if symmetric else zero_point,
            granularity=[_ao().PerTensor(), _ao().PerRow()],
            act_mapping_type=mapping,
            set_inductor_config=False,
        ),
        dtype,
    )


def _with_weight(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    layer = linear(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _ao_mx(element: Any, rule: str, dtype: torch.dtype) -> nn.Module:
    """What ``MXDynamicActivationMXWeightConfig`` makes, but for the swizzle of its scales."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    common = {
        "block_size": 32,
        "kernel_preference": KernelPreference.EMULATED,
        "is_swizzled_scales": False,
        "scaling_mode": ScaleCalculationMode[rule],
    }
    activations = QuantizeTensorToMXKwargs(elem_dtype=element, **common)
    return _with_weight(
        MXTensor.to_mx(linear(dtype).weight.data, element, act_quant_kwargs=activations, **common), dtype
    )


def _ao_nvfp4_weight_only(dtype: torch.dtype) -> nn.Module:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    values = linear(dtype).weight.data
    scale = per_tensor_amax_to_scale(values.abs().max())
    weight = NVFP4Tensor.to_nvfp4(values, per_tensor_scale=scale, is_swizzled_scales=True, use_triton_kernel=False)
    return _with_weight(weight, dtype)


def _ao_fp8_dynamic(granularity: str, dtype: torch.dtype) -> nn.Module:
    """What ``Float8DynamicActivationFloat8WeightConfig`` makes, without its check of the hardware."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import (
        Float8Tensor,
        QuantizeTensorToFloat8Kwargs,
    )

    by = getattr(_ao(), granularity)()
    activations = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, by, kernel_preference=KernelPreference.TORCH)
    weight = Float8Tensor.from_hp(
        linear(dtype).weight.data,
        granularity=by,
        mm_config=Float8MMConfig(use_fast_accum=False),
        kernel_preference=KernelPreference.TORCH,
        act_quant_kwargs=activations,
    )
    return _with_weight(weight, dtype)


def _ao_int4_opaque(dtype: torch.dtype) -> nn.Module:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    return _with_weight(Int4OpaqueTensor.from_hp(linear(dtype).weight.data, [1, 128]), dtype)


def _ao_qat(config: Callable[[], Any], dtype: torch.dtype) -> nn.Module:
    """A Linear of quantization-aware training: weight and activation are quantized and dequantized."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    model = nn.Sequential(linear(dtype))
    quantize_(model, QATConfig(step="prepare", **config()))
    assert type(model[0]) is not nn.Linear, "torchao quantized nothing"
    return model[0].eval()


def _ao_int8_fakes() -> Any:
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    activations = IntxFakeQuantizeConfig(dtype=torch.int8, granularity="per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(dtype=torch.int8, granularity="per_channel")
    return {"activation_config": activations, "weight_config": weights}


def _ao_qat_mxfp4(dtype: torch.dtype) -> nn.Module:
    from torchao.prototype.qat.mx import MXFakeQuantizeConfig, MXFakeQuantizedLinear

    config = MXFakeQuantizeConfig(dtype=torch.float4_e2m1fn_x2)
    return MXFakeQuantizedLinear.from_linear(linear(dtype), config, config)


def _ao_pt2e(dynamic: bool, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    x = example(dtype)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    prepared = prepare_pt2e(torch.export.export(nn.Sequential(linear(dtype)), (x,)).module(), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def _torchao() -> Mapping[str, Case]:
    int4, int8 = torch.int4, torch.int8
    tensors: dict[str, Callable[[], Any]] = {
        "int8 weight only": lambda: _ao().Int8WeightOnlyConfig(set_inductor_config=False),
        "int8 weight only g64": lambda: _ao().Int8WeightOnlyConfig(
            granularity=_ao().PerGroup(64), set_inductor_config=False
        ),
        "int8 dynamic": lambda: _ao().Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "int8 dynamic per tensor": lambda: _ao().Int8DynamicActivationInt8WeightConfig(
            granularity=_ao().PerTensor(), set_inductor_config=False
        ),
        "fp8 weight only": lambda: _ao().Float8WeightOnlyConfig(set_inductor_config=False),
        "intx int4 g32 weight only": lambda: _ao().IntxWeightOnlyConfig(
            weight_dtype=int4, granularity=_ao().PerGroup(32)
        ),
        "intx int8 weight only": lambda: _ao().IntxWeightOnlyConfig(weight_dtype=int8),
        "int8 dynamic int4 g32": lambda: _ao().Int8DynamicActivationIntxWeightConfig(
            weight_dtype=int4, weight_granularity=_ao().PerGroup(32)
        ),
    }
    trained: dict[str, Callable[[], Any]] = {
        "qat fp8 per row": lambda: {
            "base_config": _ao().Float8DynamicActivationFloat8WeightConfig(granularity=_ao().PerRow())
        },
        "qat fp8 per tensor": lambda: {
            "base_config": _ao().Float8DynamicActivationFloat8WeightConfig(granularity=_ao().PerTensor())
        },
        "qat int8 int4": lambda: {"base_config": tensors["int8 dynamic int4 g32"]()},
        "qat int4 weight only": lambda: {"base_config": _ao().Int4WeightOnlyConfig(group_size=128)},
        "qat int8 int8": _ao_int8_fakes,
    }
    elements = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2, "mxfp6_e2m3": "fp6_e2m3"}
    found: dict[str, Case] = {name: functools.partial(_ao_quantized, config) for name, config in tensors.items()}
    found |= {name: functools.partial(_ao_qat, config) for name, config in trained.items()}
    found |= {
        f"{name} {rule.lower()}": functools.partial(_ao_mx, element, rule)
        for name, element in elements.items()
        for rule in ("RCEIL", "FLOOR", "EVEN")
    }
    for name in ("symmetric", "asymmetric"):
        found[f"int8 static {name}"] = functools.partial(_ao_int8_static, name == "symmetric")
    for name in ("PerRow", "PerTensor"):
        found[f"fp8 dynamic {name}"] = functools.partial(_ao_fp8_dynamic, name)
    found |= {"nvfp4 weight only": _ao_nvfp4_weight_only, "int4 opaque": _ao_int4_opaque, "qat mxfp4": _ao_qat_mxfp4}
    return found | {
        "pt2e static": functools.partial(_ao_pt2e, False),
        "pt2e dynamic": functools.partial(_ao_pt2e, True),
    }


# --- amd-quark


def _spec(dtype: str, qscheme: str = "per_tensor", dynamic: bool = False, **more: Any) -> Any:
    from quark.torch.quantization.config.config import QTensorConfig

    observers = {"tensor": "PerTensorMinMaxObserver", "channel": "PerChannelMinMaxObserver"}
    observers["group"] = "PerGroupMinMaxObserver"
    usual = {"ch_axis": None, "group_size": None, "symmetric": True, "scale_type": "float", "round_method": "half_even"}
    observer = observers[qscheme.removeprefix("per_")]
    known = {"dtype": dtype, "qscheme": qscheme, "is_dynamic": dynamic, "observer_cls": observer}
    return QTensorConfig.from_dict(known | usual | more)


def _fp8(**more: Any) -> Any:
    from quark.torch.quantization.config.config import FP8E4M3PerTensorSpec

    return FP8E4M3PerTensorSpec(observer_method="min_max", **({"is_dynamic": False} | more)).to_quantization_spec()


def _mxfp4(mode: str = "even", dynamic: bool = False) -> Any:
    from quark.torch.quantization.config.config import OCP_MXFP4Spec

    return OCP_MXFP4Spec(ch_axis=-1, is_dynamic=dynamic, scale_calculation_mode=mode).to_quantization_spec()


# The specs of weight and input, or the name of a scheme of amd-quark's templates.
_QUARK: Mapping[str, Callable[[], tuple[Any, Any]] | str] = {
    "fp8": lambda: (_fp8(), _fp8()),
    "fp8_float32_scale": lambda: (_fp8(scale_type="float32"), _fp8(scale_type="float32")),
    "fp8_dynamic": lambda: (_fp8(), _fp8(is_dynamic=True)),
    "fp8_wo": lambda: (_fp8(), None),
    "ptpc_fp8": lambda: (
        _spec("fp8_e4m3", "per_channel", ch_axis=0),
        _spec("fp8_e4m3", "per_channel", True, ch_axis=1),
    ),
    "int8": lambda: (_spec("int8"), _spec("int8")),
    "int8_dynamic": lambda: (_spec("int8"), _spec("int8", dynamic=True)),
    "int8_asym": lambda: (_spec("int8", "per_channel", ch_axis=0, symmetric=False), _spec("int8", symmetric=False)),
    "ptpc_int8": lambda: (_spec("int8", "per_channel", ch_axis=0), _spec("int8", "per_channel", True, ch_axis=1)),
    "int4_wo_128": lambda: (_spec("int4", "per_group", ch_axis=-1, group_size=128), None),
    "uint4_wo_128": lambda: (_spec("uint4", "per_group", ch_axis=-1, group_size=128, symmetric=False), None),
    "mxfp4": lambda: (_mxfp4(), _mxfp4(dynamic=True)),
    "mxfp4_ceil": lambda: (_mxfp4("ceil"), _mxfp4("ceil", dynamic=True)),
    "mxfp4_wo": lambda: (_mxfp4(), None),
    **{name: name for name in ("nvfp4", "mxfp6_e2m3", "int4_fp8")},
}


def _quark_config(name: str) -> Any:
    from quark.torch import LLMTemplate
    from quark.torch.quantization.config.config import QConfig, QLayerConfig

    specs = _QUARK[name]
    if isinstance(specs, str):
        return LLMTemplate.get("llama").get_config(scheme=specs, exclude_layers=[])
    weight, activations = specs()
    return QConfig(global_quant_config=QLayerConfig(weight=weight, input_tensors=activations))


class _Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = linear(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _quark_layer(name: str, form: str, dtype: torch.dtype) -> nn.Module:
    from quark.torch import ModelQuantizer
    from quark.torch.export.nn.modules.qparamslinear import QParamsLinear

    quantizer = ModelQuantizer(_quark_config(name))
    layer = quantizer.freeze(quantizer.quantize_model(_Model(dtype), [example(dtype)])).layer
    if form == "loaded":
        state = QParamsLinear(layer, "quark", "reorder").state_dict()
        layer = QParamsLinear(linear(dtype, seed=9), "quark", "reorder", _quark_config(name).global_quant_config)
        layer.load_state_dict(state, assign=True)
    return _without_buffers(layer.eval())


def _without_buffers(layer: nn.Module) -> nn.Module:
    """Observers that assign what they see, where amd-quark's resize and copy into buffers or are made in each forward.

    And MXFP4's generic path in place of the operator that amd-quark has for GPUs only.
    """
    from quark.torch.quantization.observer import observer as observers
    from quark.torch.quantization.tensor_quantize import DynamicScaledFakeQuantize

    def per_tensor(self: Any, x: Tensor) -> Tensor:
        self.min_val, self.max_val = torch.aminmax(x)
        return x

    def per_channel(self: Any, x: Tensor) -> Tensor:
        rows = x.transpose(0, self.ch_axis).float().flatten(1)
        self.min_val, self.max_val = (value.to(x.dtype) for value in torch.aminmax(rows, dim=1))
        return x

    forwards = {observers.PerTensorMinMaxObserver: per_tensor, observers.PerChannelMinMaxObserver: per_channel}
    for module in list(layer.modules()):
        observer: Any = None
        dynamic: Any = module
        if isinstance(module, DynamicScaledFakeQuantize):
            dynamic.fake_quantize_func, dynamic.fake_quantize_func_kwargs = dynamic.fake_quantize, {}
            observer = dynamic.observer
        elif hasattr(module, "update_dynamic_params") and type(module).__name__.startswith("Dynamic"):
            observer = type(dynamic).create_observer(dynamic.qspec, torch.device("cpu"))

            def update(x: Tensor, module: Any = dynamic, observer: Any = observer) -> None:
                observer(x.detach())
                module.scale, module.zero_point = module.calculate_qparams(observer, x)

            dynamic.update_dynamic_params = update
            dynamic.__dict__["_observer"] = observer
        if type(observer) in forwards:
            observer.forward = forwards[type(observer)].__get__(observer)
    return layer


def _quark() -> Mapping[str, Case]:
    """Layers as amd-quark loads a checkpoint, and as it freezes a model: the weight rounded, but in floating point."""
    return {
        f"{name} {form}": functools.partial(_quark_layer, name, form)
        for form in ("loaded", "frozen")
        for name in _QUARK
    }
