"""The house itself: packaging, floors, lean imports, types. Nothing here knows a format, a rule or a kernel."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
FLOORS = {"schemes": 1, "lowering": 2, "patterns": 3, "quark_inductor": 4}
MAY_IMPORT_INDUCTOR = {"patterns/_inductor.py", "lowering/_inductor.py"}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def python(code: str, *, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=cwd, **env)


def sources() -> list[Path]:
    """Every file of the four folders that belongs to the package, relative to the root."""
    files = (path for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.is_file())
    return sorted(path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts)


def installed_name(path: Path) -> Path:
    """``schemes/spec.py`` -> ``quark_inductor/schemes/spec.py``."""
    return path if path.parts[0] == "quark_inductor" else Path("quark_inductor") / path


# --- packaging


def test_every_package_is_listed() -> None:
    folders = [path.parent for path in sources() if path.name == "__init__.py"]
    expected = {".".join(installed_name(folder).parts): folder.as_posix() for folder in folders}
    assert set(FLOORS) <= set(expected.values())
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert setuptools["package-dir"] == expected
    assert sorted(setuptools["packages"]) == sorted(expected)


def test_wheel_contains_every_file(tmp_path: Path) -> None:
    for name in (*FLOORS, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = python("import setuptools.build_meta as b; b.build_wheel('dist')", cwd=tmp_path)
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {installed_name(path).as_posix() for path in sources()}
    assert {"quark_inductor/py.typed", "quark_inductor/schemes/numerics/__init__.py"} <= names


@pytest.mark.parametrize("name", [name for name in FLOORS if name != "quark_inductor"])
def test_bare_name_is_refused(name: str) -> None:
    result = python(f"import {name}", cwd=ROOT)
    assert f"ImportError: import quark_inductor.{name}, not {name}" in result.stderr


def test_version() -> None:
    assert importlib.import_module("quark_inductor").__version__ == PROJECT["version"]


def test_entry_points_exist() -> None:
    declared = {**PROJECT["scripts"], **PROJECT["entry-points"]["torch_dynamo_backends"]}
    assert set(declared) == {"quark-inductor", "quark"}
    for target in declared.values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name)), target


def requirements() -> list[Requirement]:
    groups = [
        PROJECT["dependencies"],
        *PROJECT["optional-dependencies"].values(),
        PYPROJECT["build-system"]["requires"],
    ]
    return [Requirement(line) for group in groups for line in group]


def test_aiter_is_never_a_dependency() -> None:
    """The package of that name on PyPI is not AMD's AITER."""
    assert "aiter" not in {canonicalize_name(requirement.name) for requirement in requirements()}


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in pins.values() if not re.fullmatch(r"[0-9.]+(rc\d+|\.post\d+)?", version)]
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    not_run_by_ci = {"quark-inductor"}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in not_run_by_ci or pins.get(name, "no pin") in requirement.specifier, requirement


# --- floors


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that is imported, lazily or not, and of every ``torch._inductor`` in use."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch._inductor":
            yield node.lineno, "torch._inductor"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(path: str, source: str) -> list[str]:
    """What the file at ``path`` imports and must not."""
    found = []
    own_floor = FLOORS[path.split("/")[0]]
    for line, name in imports(ast.parse(source)):
        first, second = (*name.split("."), "")[:2]
        if name.startswith("."):
            found.append(f"{path}:{line}: relative import {name}")
        elif first == "torch" and second == "_inductor" and path not in MAY_IMPORT_INDUCTOR:
            found.append(f"{path}:{line}: {name} outside {sorted(MAY_IMPORT_INDUCTOR)}")
        elif first in FLOORS and first != "quark_inductor":
            found.append(f"{path}:{line}: {name} is installed as quark_inductor.{name}")
        elif first == "quark_inductor" and FLOORS.get(second, 4) > own_floor:
            found.append(f"{path}:{line}: {name} is on a higher floor")
    return found


def test_imports_go_down_only() -> None:
    files = [path.as_posix() for path in sources() if path.suffix == ".py"]
    assert [found for path in files for found in violations(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("lowering/a.py", "from quark_inductor.schemes.spec import LinearSpec", True),
        ("lowering/a.py", "from quark_inductor import schemes", True),
        ("lowering/a.py", "from quark_inductor import patterns", False),
        ("lowering/a.py", "def f():\n    import quark_inductor.patterns.base", False),
        ("schemes/a.py", "import quark_inductor", False),
        ("schemes/a.py", "from quark_inductor import __version__", False),
        ("schemes/a.py", "importlib.import_module('quark_inductor.lowering')", False),
        ("schemes/a.py", "from . import ops", False),
        ("schemes/a.py", "import lowering", False),
        ("patterns/a.py", "from quark_inductor.lowering.base import select", True),
        ("quark_inductor/a.py", "from quark_inductor.patterns import pipeline", True),
        ("quark_inductor/backend.py", "from torch._inductor.compile_fx import compile_fx", False),
        ("lowering/a.py", "from torch import _inductor", False),
        ("lowering/a.py", "import torch\ntorch._inductor.config.freezing = True", False),
        ("lowering/_inductor.py", "from torch._inductor import ir", True),
        ("lowering/a.py", "import torch._inductor_like", True),
    ],
)
def test_floor_check(path: str, source: str, allowed: bool) -> None:
    assert (violations(path, source) == []) is allowed


# --- lean import


def test_import_is_lean(tmp_path: Path) -> None:
    heavy = ["torch._inductor.lowering", "triton", "transformers", "aiter", "safetensors"]
    for name in ("triton", "aiter"):  # so that an import behind `try` shows where neither is installed
        (tmp_path / f"{name}.py").touch()
    code = (
        "import json, sys, torch; before = set(sys.modules); import quark_inductor;"
        f"print(json.dumps(sorted((set(sys.modules) - before) & set({heavy}))))"
    )
    result = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


# --- types


def mypy(tree: Path) -> subprocess.CompletedProcess[str]:
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", "--no-color-output"]
    return run(sys.executable, "-m", "mypy", *options, "-p", "quark_inductor", cwd=tree)


def test_types(tmp_path: Path) -> None:
    """From the root mypy does not find the three mapped folders, and says that all is well."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install -e '.[dev]'")
    for path in sources():
        link = tmp_path / installed_name(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / path)
    result = mypy(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr

    for floor in ("quark_inductor/planted.py", "quark_inductor/lowering/planted.py"):
        (tmp_path / floor).write_text("from torch import Tensor\n\n\ndef f(x: Tensor) -> Tensor:\n    return x.shape\n")
    result = mypy(tmp_path)
    assert "quark_inductor/planted.py:5: error" in result.stdout
    assert "quark_inductor/lowering/planted.py:5: error" in result.stdout


# --- what the files say


def test_no_file_names_a_machine() -> None:
    """No path of somebody's computer and no package index: where packages come from is the user's choice."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    assert ROOT / "pyproject.toml" in files
    paths = rb"(?<![\w.])/(?:work|root|home|mnt|opt(?!/rocm))/"
    indexes = rb"index-url|find-links|pypi\.org/simple|pythonhosted\.org|download\.pytorch\.org"
    found = {str(file.relative_to(ROOT)): re.findall(paths + b"|" + indexes, file.read_bytes()) for file in files}
    # This file spells the patterns, which match themselves where they hold no special character.
    found.pop("tests/test_house.py")
    assert {name: hits for name, hits in found.items() if hits} == {}
