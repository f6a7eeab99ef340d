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
        dtype: element format: ``"fp4"``, ``"fp6_e2m3"``, ``"fp6_e3m2"``, ``"fp8_e4m3"``, ``"fp8_e5m2"``,
            ``"int8"``, ``"uint8"``, ``"int4"``, ``"uint4"``.
        qscheme: what shares a scale: ``"per_tensor"``, ``"per_channel"`` (a row: an output channel of a weight, a token
            of an activation), ``"per_group"`` (``group_size`` neighbours along the last dimension) or ``"per_block"``
            (``block_size`` rows and columns).
        group_size: elements a group, with ``"per_group"``.
        block_size: rows and columns, with ``"per_block"``.
        is_dynamic: the scale is computed from the tensor at run time instead of stored.
        symmetric: integers: the zero point is 0. Always true for the other formats.
        scale_format: of a group's scale: ``"e8m0"``, ``"e5m3"``, ``"float32"``, or ``None`` for the model's dtype.
        scale_type: ``"float32"``: the scale is computed and stored in float32; ``None``: in the model's dtype.
        scale_calculation_mode: scale rule of E8M0: ``"even"``, ``"floor"``, ``"ceil"``, ``"rceil"``.
        second: the second stage of a two-stage spec. If it ``is_scale_quant`` it quantizes the first one's scales
            (NVFP4: FP4 groups whose scales are FP8), else the first one's codes (INT4-FP8: FP8, then INT4).
        is_scale_quant: this is a second stage that quantizes scales.
    """

    dtype: str
    qscheme: str
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    is_dynamic: bool = False
    symmetric: bool = True
    scale_format: str | None = None
    scale_type: str | None = None
    scale_calculation_mode: str | None = None
    second: "TensorSpec | None" = None
    is_scale_quant: bool = False

    def __str__(self) -> str:
        size = self.group_size or (self.block_size and "x".join(map(str, self.block_size)))
        parts = [self.dtype, self.qscheme + (f" {size}" if size else "")]
        parts += [str(v) for v in (self.scale_format, self.scale_calculation_mode) if v]
        parts += ["scale float32"] * (self.scale_type == "float32") + ["asymmetric"] * (not self.symmetric)
        parts += ["of the scales"] * self.is_scale_quant
        text = " ".join([*parts, "dynamic" if self.is_dynamic else "static"])
        return text if self.second is None else f"{text} + {self.second}"

    @property
    def block_format(self) -> str | None:
        """Name of the block format (:data:`.numerics.block.BLOCK_FORMATS`) this is, or ``None``."""
        if self.qscheme != "per_group" or (self.second is not None and not self.second.is_scale_quant):
            return None
        second = self.second.dtype if self.second is not None else None
        return _BLOCK_FORMATS.get((self.dtype, self.group_size, self.scale_format, second))


_BLOCK_FORMATS: dict[tuple[str, int | None, str | None, str | None], str] = {
    ("fp4", 32, "e8m0", None): "mxfp4",
    ("fp6_e2m3", 32, "e8m0", None): "mxfp6_e2m3",
    ("fp6_e3m2", 32, "e8m0", None): "mxfp6_e3m2",
    ("fp8_e4m3", 32, "e8m0", None): "mxfp8_e4m3",
    ("fp8_e5m2", 32, "e8m0", None): "mxfp8_e5m2",
    ("fp4", 16, "float32", "fp8_e4m3"): "nvfp4",
    ("fp4", 16, "e5m3", None): "amdfp4_g16",
    ("fp4", 32, "e5m3", None): "amdfp4_g32",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """How a Linear is quantized.

    Attributes:
        weight: its weight; ``None`` with a quantized output only: amd-quark leaves the rest of an excluded k_proj.
        input: its input, or ``None``: it stays as it is.
        output: its output, quantized and dequantized (the FP8 KV cache, FP8 attention), or ``None``.
        pack_method: order of 4-bit integers in an int32: ``"reorder"`` or ``"order"``; ``"reorder"`` for all else.
    """

    weight: TensorSpec | None
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    pack_method: str = "reorder"

    def __str__(self) -> str:
        text = f"weight {self.weight or 'not quantized'}, input {self.input or 'not quantized'}"
        text += f", output {self.output}" if self.output else ""
        return text + (", packed in order" if self.pack_method == "order" else "")


def _mx(dtype: str, mode: str = "even", **more: Any) -> TensorSpec:
    return TensorSpec(
        dtype=dtype, qscheme="per_group", group_size=32, scale_format="e8m0", scale_calculation_mode=mode, **more
    )


def _fp8(qscheme: str = "per_tensor", dtype: str = "fp8_e4m3", **more: Any) -> TensorSpec:
    return TensorSpec(dtype=dtype, qscheme=qscheme, **more)


def _amdfp4(group_size: int, **more: Any) -> TensorSpec:
    return TensorSpec(dtype="fp4", qscheme="per_group", group_size=group_size, scale_format="e5m3", **more)


def _nvfp4(**more: Any) -> TensorSpec:
    second = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor", scale_type="float32", is_scale_quant=True)
    return TensorSpec(
        dtype="fp4",
        qscheme="per_group",
        group_size=16,
        scale_format="float32",
        scale_type="float32",
        second=second,
        **more,
    )


def _integer(dtype: str, group_size: int | None, **more: Any) -> TensorSpec:
    qscheme = "per_group" if group_size else "per_channel"
    return TensorSpec(dtype=dtype, qscheme=qscheme, group_size=group_size, symmetric=dtype[0] != "u", **more)


def _int8(qscheme: str = "per_tensor", **more: Any) -> TensorSpec:
    return TensorSpec(dtype="int8", qscheme=qscheme, **more)


# The scheme names users write, amd-quark's where it has one.
PRESETS: dict[str, LinearSpec] = {
    "mxfp4": LinearSpec(weight=_mx("fp4"), input=_mx("fp4", is_dynamic=True)),
    "mxfp4_weight_only": LinearSpec(weight=_mx("fp4")),
    "mxfp4_fp8": LinearSpec(weight=_mx("fp4"), input=_fp8()),
    "mxfp4_fp8_dynamic": LinearSpec(weight=_mx("fp4"), input=_fp8(is_dynamic=True)),
    "mxfp4_fp8_token": LinearSpec(weight=_mx("fp4"), input=_fp8("per_channel", is_dynamic=True)),
    "mxfp4_mxfp6_e2m3": LinearSpec(weight=_mx("fp4"), input=_mx("fp6_e2m3", is_dynamic=True)),
    "mxfp4_mxfp8": LinearSpec(weight=_mx("fp4"), input=_mx("fp8_e4m3", is_dynamic=True)),
    "mxfp6_e2m3": LinearSpec(weight=_mx("fp6_e2m3"), input=_mx("fp6_e2m3", is_dynamic=True)),
    "mxfp6_e3m2": LinearSpec(weight=_mx("fp6_e3m2"), input=_mx("fp6_e3m2", is_dynamic=True)),
    "mxfp8": LinearSpec(weight=_mx("fp8_e4m3", "rceil"), input=_mx("fp8_e4m3", "rceil", is_dynamic=True)),
    "nvfp4": LinearSpec(weight=_nvfp4(), input=_nvfp4(is_dynamic=True)),
    "nvfp4_weight_only": LinearSpec(weight=_nvfp4()),
    "amdfp4": LinearSpec(weight=_amdfp4(16), input=_amdfp4(16, is_dynamic=True)),
    "amdfp4_g32": LinearSpec(weight=_amdfp4(32), input=_amdfp4(32, is_dynamic=True)),
    "fp8": LinearSpec(weight=_fp8(), input=_fp8()),
    "fp8_dynamic": LinearSpec(weight=_fp8(), input=_fp8(is_dynamic=True)),
    "fp8_weight_only": LinearSpec(weight=_fp8()),
    "fp8_e5m2": LinearSpec(weight=_fp8(dtype="fp8_e5m2"), input=_fp8(dtype="fp8_e5m2")),
    "ptpc_fp8": LinearSpec(weight=_fp8("per_channel"), input=_fp8("per_channel", is_dynamic=True)),
    "fp8_block128": LinearSpec(
        weight=_fp8("per_block", block_size=(128, 128), scale_type="float32"),
        input=_fp8("per_group", group_size=128, is_dynamic=True),
    ),
    "int8": LinearSpec(weight=_int8(), input=_int8()),
    "int8_dynamic": LinearSpec(weight=_int8(), input=_int8(is_dynamic=True)),
    "int8_weight_only": LinearSpec(weight=_int8("per_channel")),
    "int8_wo_128": LinearSpec(weight=_integer("int8", 128)),
    "ptpc_int8": LinearSpec(weight=_int8("per_channel"), input=_int8("per_channel", is_dynamic=True)),
    **{
        f"{dtype}_wo_{group or 'per_channel'}": LinearSpec(weight=_integer(dtype, group))
        for dtype in ("int4", "uint4")
        for group in (32, 64, 128, None)
    },
    "int4_wa_64": LinearSpec(weight=_integer("int4", 64), input=_integer("int4", 64, is_dynamic=True)),
    "int4_fp8": LinearSpec(
        weight=_fp8(scale_type="float32", second=TensorSpec(dtype="int4", qscheme="per_channel", scale_type="float32")),
        input=_fp8(is_dynamic=True, scale_type="float32"),
    ),
}
