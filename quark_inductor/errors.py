"""The errors of this package, all derived from :class:`QuarkInductorError`."""

from quark_inductor.schemes.errors import (
    CheckpointError,
    ConfigError,
    DocumentError,
    NotFusedError,
    OptionError,
    QuarkInductorError,
    ShapeError,
    TrainingError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DocumentError",
    "NotFusedError",
    "OptionError",
    "QuarkInductorError",
    "ShapeError",
    "TrainingError",
]
