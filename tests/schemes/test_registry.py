"""Every scheme module is imported by the registry, and every preset has its scheme."""

import re
from pathlib import Path

import pytest

from quark_inductor.schemes import registry
from quark_inductor.schemes.base import QuarkScheme, registered_schemes, scheme_for
from quark_inductor.schemes.spec import PRESETS

FOLDER = Path(registry.__file__).parent


def test_every_file_with_a_scheme_is_registered_under_its_name() -> None:
    files = {
        path.stem for path in FOLDER.glob("*.py") if re.search(r"^@register_scheme", path.read_text(), re.MULTILINE)
    }
    assert {"w4a4_mxfp4", "w8a8_fp8"} <= files
    own = {name: cls for name, cls in registered_schemes().items() if cls.__module__.startswith("quark_inductor.")}
    assert set(own) == files
    for name, cls in own.items():
        assert cls.__module__ == f"quark_inductor.schemes.{name}"


@pytest.mark.parametrize(
    ("preset", "name"),
    [("mxfp4", "w4a4_mxfp4"), ("fp8", "w8a8_fp8"), ("fp8_dynamic", "w8a8_fp8"), ("ptpc_fp8", "w8a8_fp8")],
)
def test_every_preset_has_its_scheme(preset: str, name: str) -> None:
    scheme = scheme_for(PRESETS[preset])
    assert isinstance(scheme, QuarkScheme)
    assert scheme.name == name
    assert scheme.spec == PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_two_schemes_want_the_same_preset(preset: str) -> None:
    takers = [name for name, cls in registered_schemes().items() if cls.refuses(PRESETS[preset]) is None]
    assert len(takers) == 1
