"""Imports every scheme, so that it is registered: one line each, in the order they are asked."""

from quark_inductor.schemes import (
    w4a4_mxfp4,  # noqa: F401
    w8a8_fp8,  # noqa: F401
)
