"""The errors of this package, all derived from :class:`QuarkInductorError`."""

from quark_inductor.schemes.errors import (
    CheckpointError,
    ConfigError,
    NotFusedError,
    OptionError,
    QuarkInductorError,
    ReportError,
    ShapeError,
    TrainingError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "NotFusedError",
    "OptionError",
    "QuarkInductorError",
    "ReportError",
    "ShapeError",
    "TrainingError",
]
