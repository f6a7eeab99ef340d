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


OF = {
    "mxfp4": "w4a4_mxfp4",
    "mxfp4_weight_only": "ocp_mx",
    "mxfp4_fp8": "w4a8_mxfp4_fp8",
    "mxfp4_fp8_dynamic": "w4a8_mxfp4_fp8",
    "mxfp4_fp8_token": "w4a8_mxfp4_fp8",
    "mxfp4_mxfp6_e2m3": "ocp_mx",
    "mxfp4_mxfp8": "ocp_mx",
    "mxfp6_e2m3": "ocp_mx",
    "mxfp6_e3m2": "ocp_mx",
    "mxfp8": "mxfp8_online",
    "nvfp4": "nvfp4",
    "nvfp4_weight_only": "nvfp4",
    "amdfp4": "amdfp4",
    "amdfp4_g32": "amdfp4",
    "int4_wa_64": "w4a16_int4",
    "int4_fp8": "w4a8_int4_fp8",
    **dict.fromkeys(
        ["fp8", "fp8_dynamic", "fp8_weight_only", "fp8_e5m2", "ptpc_fp8", "fp8_block128"],
        "w8a8_fp8",
    ),
    **dict.fromkeys(["int8", "int8_dynamic", "int8_weight_only", "int8_wo_128", "ptpc_int8"], "w8a8_int8"),
    **dict.fromkeys([f"int4_wo_{group}" for group in ("32", "64", "128", "per_channel")], "w4a16_int4"),
    **dict.fromkeys([f"uint4_wo_{group}" for group in ("32", "64", "128", "per_channel")], "w4a16_int4"),
}


def test_the_table_has_every_preset() -> None:
    assert set(OF) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_scheme(preset: str) -> None:
    scheme = scheme_for(PRESETS[preset])
    assert isinstance(scheme, QuarkScheme)
    assert scheme.name == OF[preset]
    assert scheme.spec == PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_whoever_else_wants_a_preset_is_a_base_of_its_scheme(preset: str) -> None:
    """Then the order in which schemes are registered decides nothing."""
    takers = [cls for cls in registered_schemes().values() if cls.refuses(PRESETS[preset]) is None]
    assert type(scheme_for(PRESETS[preset])) in takers
    assert all(issubclass(type(scheme_for(PRESETS[preset])), cls) for cls in takers)


@pytest.mark.parametrize("cls", registered_schemes().values(), ids=registered_schemes().keys())
def test_a_min_capability_is_a_compute_capability_times_ten(cls: type[QuarkScheme]) -> None:
    assert cls.get_min_capability() in (0, 70, 75, 80, 89, 90, 100)
