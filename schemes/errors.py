"""Every error this package raises on purpose. Each message says what was found, what was expected and what to do."""


class QuarkInductorError(Exception):
    """Base class of every error of this package."""


class ConfigError(QuarkInductorError, ValueError):
    """A ``quantization_config`` that cannot be understood, or asks for something that does not exist."""


class CheckpointError(QuarkInductorError, ValueError):
    """A checkpoint whose files, tensor names, shapes or dtypes are not what its config says."""


class ShapeError(QuarkInductorError, ValueError):
    """A layer whose sizes the scheme cannot represent."""


class OptionError(QuarkInductorError, ValueError):
    """An unknown option of ``torch.compile(backend="quark")``, or a value it cannot take."""


class DocumentError(QuarkInductorError, ValueError):
    """A report or a profile in JSON that cannot be read."""


class NotFusedError(QuarkInductorError, RuntimeError):
    """``quark.strict`` is set and a quantized Linear was left to the emulation."""


class TrainingError(QuarkInductorError, RuntimeError):
    """A gradient was asked through a quantization that has none."""
