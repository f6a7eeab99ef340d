"""Imports every scheme, so that it is registered: one line each, in the order they are asked."""

from quark_inductor.schemes import (
    amdfp4,  # noqa: F401  isort:skip
    experts,  # noqa: F401  isort:skip  not a scheme: compiled code calls its op
    mxfp8_online,  # noqa: F401  isort:skip
    mxfp8_online_moe,  # noqa: F401  isort:skip  of experts, by itself
    nvfp4,  # noqa: F401  isort:skip
    ocp_mx,  # noqa: F401  isort:skip
    unquantized,  # noqa: F401  isort:skip
    w4a4_mxfp4,  # noqa: F401
    w4a8_int4_fp8,  # noqa: F401  isort:skip
    w4a8_mxfp4_fp8,  # noqa: F401  isort:skip
    w4a16_int4,  # noqa: F401  isort:skip
    w8a8_fp8,  # noqa: F401  isort:skip
    w8a8_int8,  # noqa: F401  isort:skip
)
