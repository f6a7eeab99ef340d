"""Imports every rule, in running order."""

from quark_inductor.patterns import (
    block_gemm,  # noqa: F401  isort:skip
    block_prologue,  # noqa: F401  isort:skip
    fp8_gemm,  # noqa: F401
    fp8_prologue,  # noqa: F401  isort:skip
)
