"""How an activation is quantized and dequantized: one class for each family of formats, shared by the schemes.

A quantizer holds no tensor: a static one's scale lives on the layer, under the checkpoint's name (``input_scale``, or
``output_scale`` for a quantized output).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes import operands
from quark_inductor.schemes.errors import ConfigError
from quark_inductor.schemes.numerics import fp8, integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.ops import dtype_name
from quark_inductor.schemes.spec import TensorSpec


class ActivationQuantizer(ABC):
    """Quantizes and dequantizes ``x [M, K]`` as a spec says.

    Attributes:
        spec: how.
        role: ``"input"`` or ``"output"``, the beginning of its parameters' names.
    """

    def __init__(self, spec: TensorSpec, role: str) -> None:
        self.spec = spec
        self.role = role

    @classmethod
    @abstractmethod
    def refuses(cls, spec: TensorSpec) -> str | None:
        """Why this class is not the one for ``spec``, or ``None`` if it is."""

    @property
    def group_size(self) -> int:
        """K must be a multiple of this."""
        return 1 if self.spec.group_size is None else self.spec.group_size

    def tensors(self, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Stored parameters, uninitialized, of a layer that is not fused; none if all is computed at run time."""
        return {}

    def calibrated(self, amin: Tensor, amax: Tensor) -> Mapping[str, Tensor]:
        """Stored parameters from the smallest and largest value seen, both ``[]`` in the activation's dtype."""
        return {}

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One set of stored parameters from those of fused shards, ``[shards]`` each: the largest scale."""
        return {name: tensor.amax() for name, tensor in tensors.items()}

    @abstractmethod
    def fake_quantize(self, layer: Any, x: Tensor) -> Tensor:
        """``x`` quantized and dequantized, in its dtype, with the stored parameters of ``layer``."""

    def _stored(self, layer: Any, name: str) -> Tensor:
        tensor: Tensor = getattr(layer, f"{self.role}_{name}")
        return tensor


class Fp8Activation(ActivationQuantizer):
    """FP8: static per tensor (``input_scale []``), dynamic per tensor, per token, or by groups along K.

    Per token means one scale a row of the flattened ``[tokens, K]`` input, as vLLM runs it; amd-quark's own emulation
    takes one scale per index of dimension 1, which is the same for a 3-D input of batch 1 only. See
    :mod:`quark_inductor.schemes.numerics.fp8` for rounding, NaN and zeros.
    """

    @classmethod
    def refuses(cls, spec: TensorSpec) -> str | None:
        """Any FP8 spec of one stage; only per-tensor scales can be static."""
        return _refuses(spec, tuple(fp8.DTYPES))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return fp8.DTYPES[self.spec.dtype]

    def tensors(self, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """``input_scale []`` if static."""
        if self.spec.is_dynamic:
            return {}
        return {f"{self.role}_scale": torch.empty((), dtype=_scale_dtype(self.spec) or params_dtype)}

    def calibrated(self, amin: Tensor, amax: Tensor) -> Mapping[str, Tensor]:
        """``input_scale`` if static."""
        if self.spec.is_dynamic:
            return {}
        scale = fp8.dynamic_scale(torch.stack((amin, amax)), "per_tensor", self.dtype, _scale_dtype(self.spec))
        return {f"{self.role}_scale": scale}

    def fake_quantize(self, layer: Any, x: Tensor) -> Tensor:
        """See :class:`ActivationQuantizer`."""
        spec, dtype = self.spec, self.dtype
        # On gfx94x the weight was turned into "fnuz" at load: then so is what it is multiplied with.
        if self.role == "input" and getattr(layer, "is_fnuz", False):
            dtype = fp8.FNUZ
        if spec.qscheme == "per_group":
            assert spec.group_size is not None
            codes, scales = fp8.quantize_groups(x, spec.group_size, dtype)
            return fp8.dequantize_groups(codes, scales, x.dtype)
        if not spec.is_dynamic:
            scale = self._stored(layer, "scale")
        elif spec.qscheme == "per_channel":
            scale = fp8.dynamic_scale(x, "per_token", dtype)
        else:
            scale = fp8.dynamic_scale(x, "per_tensor", dtype, _scale_dtype(spec))
        return fp8.dequantize(fp8.quantize(x, scale, dtype), scale, x.dtype)


class IntegerActivation(ActivationQuantizer):
    """Integers of 8 or 4 bits: static per tensor (``input_scale``, ``input_zero_point``), or dynamic.

    Dynamic: per tensor, per token (a row, see :class:`Fp8Activation`) or by groups along K.
    """

    @classmethod
    def refuses(cls, spec: TensorSpec) -> str | None:
        """Any integer spec of one stage; only per-tensor scales can be static."""
        return _refuses(spec, tuple(integer.BOUNDS))

    def tensors(self, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """``input_scale`` float32 ``[]`` and ``input_zero_point []`` if static."""
        if self.spec.is_dynamic:
            return {}
        zero_point = torch.empty((), dtype=integer.codes_dtype(self.spec.dtype))
        return {f"{self.role}_scale": torch.empty((), dtype=torch.float32), f"{self.role}_zero_point": zero_point}

    def calibrated(self, amin: Tensor, amax: Tensor) -> Mapping[str, Tensor]:
        """``input_scale`` and ``input_zero_point`` if static."""
        if self.spec.is_dynamic:
            return {}
        scale, zero_point = integer.parameters(torch.stack((amin, amax)), self.spec.dtype, self.spec.symmetric, None)
        zero_point = zero_point.to(integer.codes_dtype(self.spec.dtype))
        return {f"{self.role}_scale": scale, f"{self.role}_zero_point": zero_point}

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The range that holds every shard's range, as vLLM joins them."""
        scale, zero_point = (tensors[f"{self.role}_{name}"] for name in ("scale", "zero_point"))
        if (scale == scale[0]).all() and (zero_point == zero_point[0]).all():
            return {name: tensor[0] for name, tensor in tensors.items()}
        if self.spec.symmetric:
            return super().merged(tensors)
        low, high = integer.BOUNDS[self.spec.dtype]
        smallest = ((low - zero_point.float()) * scale).amin()
        largest = ((high - zero_point.float()) * scale).amax()
        joint = (largest - smallest) / (high - low)
        joint_zero_point = (low - torch.round(smallest / joint)).clamp(low, high).to(zero_point.dtype)
        return {f"{self.role}_scale": joint, f"{self.role}_zero_point": joint_zero_point}

    def fake_quantize(self, layer: Any, x: Tensor) -> Tensor:
        """See :class:`ActivationQuantizer`."""
        spec = self.spec
        if not spec.is_dynamic:
            scale, zero_point = self._stored(layer, "scale"), self._stored(layer, "zero_point")
            codes = integer.quantize(x, scale, zero_point, spec.dtype)
            return integer.dequantize(codes, scale, zero_point, x.dtype)
        if spec.group_size is not None:
            groups = integer.quantize_groups(x, spec.group_size, spec.dtype, spec.symmetric)
            return integer.dequantize_groups(*groups, x.dtype)
        axis = None if spec.qscheme == "per_tensor" else -1
        scale, zero_point = integer.parameters(x, spec.dtype, spec.symmetric, axis)
        codes = integer.quantize(x, scale, zero_point, spec.dtype)
        return integer.dequantize(codes, scale, zero_point, x.dtype)


class BlockActivation(ActivationQuantizer):
    """A block format (:data:`.numerics.block.BLOCK_FORMATS`), quantized at run time.

    A format with a global scale has it stored, as ``input_scale_2 []`` float32, a multiplier, or computed too if its
    second stage is dynamic.
    """

    def __init__(self, spec: TensorSpec, role: str) -> None:
        super().__init__(spec, role)
        assert spec.block_format is not None
        self.name = spec.block_format
        self.format = BLOCK_FORMATS[self.name]
        self.stores_global_scale = spec.second is not None and not spec.second.is_dynamic
        self.scale_rule = spec.scale_calculation_mode or ("sequential" if self.format.has_global_scale else "nearest")
        self.zero_scale = operands.zero_scale(self.name)

    @classmethod
    def refuses(cls, spec: TensorSpec) -> str | None:
        """Block formats, dynamic."""
        if spec.block_format is None or not spec.is_dynamic:
            return f"takes the block formats {', '.join(BLOCK_FORMATS)}, dynamic"
        return None

    def tensors(self, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """``input_scale_2`` if the format has a static global scale."""
        if not self.stores_global_scale:
            return {}
        return {f"{self.role}_scale_2": torch.empty((), dtype=torch.float32)}

    def calibrated(self, amin: Tensor, amax: Tensor) -> Mapping[str, Tensor]:
        """``input_scale_2``: the largest magnitude over the largest of elements and of block scales."""
        if not self.stores_global_scale:
            return {}
        return {f"{self.role}_scale_2": self.format.global_scale(torch.maximum(amin.abs(), amax.abs()))}

    def fake_quantize(self, layer: Any, x: Tensor) -> Tensor:
        """See :class:`ActivationQuantizer`."""
        scale = None
        if self.stores_global_scale:
            scale = self._stored(layer, "scale_2")
        elif self.format.has_global_scale:
            scale = self.format.global_scale(x.abs().amax() if x.numel() else x.new_zeros(()))
        q = torch.ops.quark_inductor
        # Arguments that are the schema's defaults do not come into a traced graph.
        codes, scales = q.block_quantize(x, self.name, self.scale_rule, scale)
        result: Tensor = q.block_dequantize(codes, scales, self.name, dtype_name(x.dtype), scale, self.zero_scale)
        return result


KINDS: tuple[type[ActivationQuantizer], ...] = (BlockActivation, Fp8Activation, IntegerActivation)


def _refuses(spec: TensorSpec, dtypes: tuple[str, ...]) -> str | None:
    if spec.dtype not in dtypes or spec.second is not None:
        return f"takes {' or '.join(dtypes)} of one stage"
    schemes = ("per_tensor", "per_channel", "per_group") if spec.is_dynamic else ("per_tensor",)
    if spec.qscheme not in schemes or spec.scale_format is not None:
        return f"takes {', '.join(schemes)} {'dynamic' if spec.is_dynamic else 'static'} scales in floating point"
    return None


def _scale_dtype(spec: TensorSpec) -> torch.dtype | None:
    return torch.float32 if spec.scale_type == "float32" else None


def activation_quantizer(spec: TensorSpec, role: str) -> ActivationQuantizer:
    """The quantizer of a spec.

    Raises:
        ConfigError: none takes it; says why each refused.
    """
    refusals = []
    for kind in KINDS:
        reason = kind.refuses(spec)
        if reason is None:
            return kind(spec, role)
        refusals.append(f"{kind.__name__} {reason}")
    raise ConfigError(f"no quantizer for the {role} [{spec}]: {'; '.join(refusals)}")
