"""``torch.compile(model, backend="quark")`` for models quantized by AMD Quark.

Importing this package is cheap: what a name needs is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quark_inductor.backend import aoti_configs
    from quark_inductor.hf import register_hf
    from quark_inductor.loading import load
    from quark_inductor.merging import merge_shared_input_
    from quark_inductor.profile import profile_compile
    from quark_inductor.quantize import quantize_
    from quark_inductor.report import explain
    from quark_inductor.saving import save

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "aoti_configs",
    "explain",
    "load",
    "merge_shared_input_",
    "profile_compile",
    "quantize_",
    "register_hf",
    "save",
]

_HOMES = {
    "aoti_configs": "backend",
    "explain": "report",
    "load": "loading",
    "merge_shared_input_": "merging",
    "profile_compile": "profile",
    "quantize_": "quantize",
    "register_hf": "hf",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
