"""What a quantized tensor and a quantized Linear are: frozen descriptions, in amd-quark's own words.

The fields and their values are those of a checkpoint's ``quantization_config`` (amd-quark 0.13,
``quark/torch/quantization/config/config.py: QTensorConfig``), reduced to what decides a number.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        dtype: element format: ``"fp4"``, ``"fp8_e4m3"``, ...
        qscheme: what shares a scale: ``"per_tensor"``, ``"per_channel"`` (a row: an output channel of a weight, a token
            of an activation) or ``"per_group"`` (``group_size`` neighbours along the last dimension).
        group_size: elements a group, with ``"per_group"``.
        is_dynamic: the scale is computed from the tensor at run time instead of stored.
        scale_format: ``"e8m0"``, or ``None`` for a floating-point scale.
        scale_calculation_mode: scale rule of E8M0: ``"even"``.
    """

    dtype: str
    qscheme: str
    group_size: int | None = None
    is_dynamic: bool = False
    scale_format: str | None = None
    scale_calculation_mode: str | None = None

    def __str__(self) -> str:
        parts = [self.dtype, self.qscheme + (f" {self.group_size}" if self.group_size else "")]
        parts += [str(v) for v in (self.scale_format, self.scale_calculation_mode) if v]
        return " ".join([*parts, "dynamic" if self.is_dynamic else "static"])


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """How a Linear is quantized: its weight, and its input (``None``: the input stays as it is)."""

    weight: TensorSpec
    input: TensorSpec | None

    def __str__(self) -> str:
        return f"weight {self.weight}, input {self.input or 'not quantized'}"


_MXFP4: dict[str, Any] = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
_FP8_TENSOR = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor")
_FP8_TENSOR_DYNAMIC = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor", is_dynamic=True)

# The scheme names users write, amd-quark's where it has one.
PRESETS: dict[str, LinearSpec] = {
    "mxfp4": LinearSpec(
        weight=TensorSpec(**_MXFP4, scale_calculation_mode="even"),
        input=TensorSpec(**_MXFP4, scale_calculation_mode="even", is_dynamic=True),
    ),
    "fp8": LinearSpec(weight=_FP8_TENSOR, input=_FP8_TENSOR),
    "fp8_dynamic": LinearSpec(weight=_FP8_TENSOR, input=_FP8_TENSOR_DYNAMIC),
    "ptpc_fp8": LinearSpec(
        weight=TensorSpec(dtype="fp8_e4m3", qscheme="per_channel"),
        input=TensorSpec(dtype="fp8_e4m3", qscheme="per_channel", is_dynamic=True),
    ),
}
