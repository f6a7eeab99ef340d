"""Imports every rule. They run by stage; those of one stage in any order."""

from quark_inductor.patterns import (
    block_activation,  # noqa: F401
    block_prologue,  # noqa: F401
    block_weight,  # noqa: F401
    fp8_activation,  # noqa: F401
    fp8_prologue,  # noqa: F401
    fp8_weight,  # noqa: F401
    int4_weight,  # noqa: F401
    integer_activation,  # noqa: F401
    integer_prologue,  # noqa: F401
    integer_weight,  # noqa: F401
)
