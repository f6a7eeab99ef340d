"""Every scheme against what amd-quark exported and computed, of one small model in each of its formats, bit for bit.

``test_w4a4_mxfp4.py`` and ``test_w8a8_fp8.py`` have the same for the larger model, with an oracle in numpy.
"""

from collections.abc import Callable
from typing import Any

import pytest

Exports = Callable[[str], Any]
QUANTIZED = [
    "mxfp4_weight_only",
    "mxfp4_floor",
    "mxfp4_ceil",
    "mxfp4_fp8",
    "mxfp4_fp8_dynamic",
    "mxfp4_fp8_token",
    "mxfp4_mxfp6_e2m3",
    "mxfp4_mxfp8",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp6_e2m3_fp8",
    "nvfp4",
    "nvfp4_weight_only",
    "amdfp4",
    "amdfp4_g32",
    "fp8_dynamic",
    "fp8_e5m2",
    "fp8_float32_scale",
    "fp8_perchannel_static",
    "fp8_wo",
    "fp8_wo_perchannel",
    "fp8_block",
    "int8",
    "int8_dynamic",
    "int8_perchannel_asym",
    "int8_perchannel_static",
    "int8_wo_128",
    "int8_wo_perchannel",
    "ptpc_int8",
    "uint8_static",
    "int4_wo_32",
    "int4_wo_128",
    "int4_wo_per_channel",
    "int4_wa_64",
    "uint4_wo_32",
    "uint4_wo_32_order",
    "uint4_wo_128",
    "uint4_wo_per_channel",
    "int4_fp8",
]
QUANTIZED += [f"{name}_fp32" for name in QUANTIZED if name not in ("fp8_float32_scale", "uint4_wo_32_order")]


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_weight_is_amd_quarks(name: str, exported: Exports) -> None:
    exported(name).check_weights()


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizing_the_float_weights_gives_amd_quarks_bytes(name: str, exported: Exports) -> None:
    exported(name).check_quantize_weight()


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_recorded_activation_is_amd_quarks(name: str, exported: Exports) -> None:
    exported(name).check_activations_and_outputs()
