"""``torch.compile(model, backend="quark")`` for models quantized by AMD Quark."""

__version__ = "0.1.0"
