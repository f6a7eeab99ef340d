"""Imports every provider, in order of preference; light enough for a loader, which needs their layouts."""

# The order is not that of the alphabet. Nobody else imports these files, as whoever is imported first is first.
from quark_inductor.lowering import aiter  # noqa: F401  isort: skip
from quark_inductor.lowering import scaled_mm  # noqa: F401  isort: skip
from quark_inductor.lowering import scaled_mm_blocks  # noqa: F401  isort: skip
from quark_inductor.lowering.triton import provider as triton  # noqa: F401  isort: skip
from quark_inductor.lowering import cpp  # noqa: F401  isort: skip
