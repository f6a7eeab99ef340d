"""Imports every provider, in order of preference; light enough for a loader, which needs their layouts."""

from quark_inductor.lowering import (
    cpp,  # noqa: F401
    triton,  # noqa: F401
)
