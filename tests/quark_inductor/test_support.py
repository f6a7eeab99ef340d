from pathlib import Path

from quark_inductor.schemes.spec import PRESETS
from quark_inductor.support import table


def test_the_readme_has_the_table_the_registry_gives() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("<!-- support-table -->")[2].partition("<!-- /support-table -->")[0]
    assert section.strip() == table(), "run python -m quark_inductor.support and put what it prints into README.md"


def test_every_scheme_has_a_row() -> None:
    assert [row.split("`")[1] for row in table().splitlines()[2:]] == list(PRESETS)
