"""Imports every rule, in running order."""

from quark_inductor.patterns import (
    fp8_gemm,  # noqa: F401
    fp8_prologue,  # noqa: F401  isort:skip
    mx_gemm,  # noqa: F401  isort:skip
    mx_prologue,  # noqa: F401  isort:skip
)
