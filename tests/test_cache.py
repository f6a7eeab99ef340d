"""Honest caches: a second process compiles nothing again, and nothing it runs is stale."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# One quantized Linear. The backend is given as a function: a copy of the package has no entry point.
PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
import quark_inductor
from quark_inductor.backend import quark
from quark_inductor.patterns.pipeline import collect_results, source_hash

options = json.loads(sys.argv[1])
torch.manual_seed(0)
model = quark_inductor.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)), "mxfp4")
x = torch.randn(3, 64)
with torch.no_grad(), collect_results() as results:
    y = torch.compile(model, backend=quark, fullgraph=True, options=options)(x)
    eager = model(x)
print(json.dumps({
    "file": quark_inductor.__file__,
    "ratio": (y / eager).median().item(),
    "passes": [[p.name, p.matches] for r in results for p in r.passes],
    "kernels": {k: n for k, n in counters["inductor"].items() if k.startswith("quark.")},
    "fx": {k.removeprefix("fxgraph_cache_"): n for k, n in counters["inductor"].items() if "fxgraph_cache" in k},
    "aot": {k.removeprefix("autograd_cache_"): n for k, n in counters["aot_autograd"].items() if "autograd_cache" in k},
    "hash": source_hash(),
}))
"""


class Tree:
    """A copy of the package as it is installed, the three folders inside ``quark_inductor``, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cache = folder / "tree", folder / "cache"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "quark_inductor", self.root / "quark_inductor", ignore=ignored)
        for floor in ("schemes", "lowering", "patterns"):
            # git ignores links of these names, which some editors want.
            shutil.rmtree(self.root / "quark_inductor" / floor, ignore_errors=True)
            shutil.copytree(ROOT / floor, self.root / "quark_inductor" / floor, ignore=ignored)

    def run(self, **options: Any) -> dict[str, Any]:
        """What a new process says."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-c", PROGRAM, json.dumps({f"quark.{k}": v for k, v in options.items()})]
        result = subprocess.run(command, env=environment, cwd=self.root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        said: dict[str, Any] = json.loads(result.stdout)
        assert Path(said["file"]).is_relative_to(self.root)
        return said

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.root / "quark_inductor" / path
        text = file.read_text()
        assert text.count(old) >= 1, f"{path} has changed: look for another place to edit"
        file.write_text(text.replace(old, new))

    def append(self, path: str, text: str) -> None:
        with (self.root / "quark_inductor" / path).open("a") as file:
            file.write(text)


def is_hit(said: dict[str, Any]) -> bool:
    """Everything from the caches, or nothing: no pass ran in a process that hit."""
    hit = said["aot"].get("hit") == 1
    assert (said["aot"].get("miss", 0), said["passes"] == []) == (0 if hit else 1, hit)
    assert said["fx"].get("miss", 0) == (0 if hit else 1)
    assert "bypass" not in said["aot"] | said["fx"]
    return hit


KERNELS = {"quark.block_prologue_gemm.cpp": 1}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree with which one process has filled the caches."""
    tree = Tree(tmp_path_factory.mktemp("warm"))
    first = tree.run()
    assert not is_hit(first)
    assert ["block_gemm", 1] in first["passes"]
    assert first["kernels"] == KERNELS
    assert first["ratio"] == pytest.approx(1.0, rel=1e-5)
    return tree


def test_a_second_process_compiles_nothing(warm: Tree, tmp_path: Path) -> None:
    """Also not from a copy: where the package lies is no part of the key, else the misses below would prove nothing."""
    copy = Tree(tmp_path)
    copy.cache = warm.cache
    second = copy.run()
    assert is_hit(second)
    # A hit counts the kernels it brings, so that a report is not empty.
    assert second["kernels"] == KERNELS
    assert second["ratio"] == pytest.approx(1.0, rel=1e-5)


def test_other_options_are_another_graph(warm: Tree) -> None:
    """Even one that made the same kernels."""
    strict = warm.run(strict=True)
    assert not is_hit(strict)
    assert strict["kernels"] == KERNELS


@pytest.mark.parametrize(
    ("path", "old", "new", "ratio"),
    [
        # The sum of a tile, in both of its versions, doubled.
        ("lowering/cpp/mxfp4.h", "out[m * ld + n] = ", "out[m * ld + n] = 2.0f * ", 2.0),
        # The template: what is stored of the tile is tripled.
        (
            "lowering/cpp/template.py",
            "value = load(index)",
            "value = ops.mul(load(index), ops.constant(3.0, torch.float))",
            3.0,
        ),
        # The rule: the weight's scales shrink by four before they are given to the kernel.
        (
            "patterns/block_prologue.py",
            "        return fused_call(",
            "        shift = match.graph.call_function(torch.ops.aten.sub.Tensor, (match.kwargs['weight_scale'], 2))\n"
            "        shift.meta = match.kwargs['weight_scale'].meta\n"
            "        match.kwargs['weight_scale'] = shift\n"
            "        return fused_call(",
            0.25,
        ),
    ],
    ids=["header", "template", "rule"],
)
def test_nothing_is_stale(warm: Tree, tmp_path: Path, path: str, old: str, new: str, ratio: float) -> None:
    """A change that is seen in the result, made after the caches were filled."""
    changed = Tree(tmp_path)
    changed.cache = warm.cache
    changed.edit(path, old, new)
    said = changed.run()
    assert not is_hit(said)
    assert said["ratio"] == pytest.approx(ratio, rel=1e-5)


def test_a_changed_byte_is_a_miss(warm: Tree, tmp_path: Path) -> None:
    """Of a file of the schemes, where it changes nothing."""
    changed = Tree(tmp_path)
    changed.cache = warm.cache
    changed.append("schemes/numerics/block.py", "\n")
    assert not is_hit(changed.run())


def test_every_source_file_is_part_of_the_key(tmp_path: Path) -> None:
    """Of the three floors that decide what a graph becomes."""
    tree = Tree(tmp_path)
    floors = ("schemes", "lowering", "patterns")
    package = tree.root / "quark_inductor"
    files = sorted(f.relative_to(package) for floor in floors for f in (package / floor).rglob("*") if f.is_file())
    assert {f.suffix for f in files} == {".py", ".h"}
    code = f"""
from pathlib import Path
from quark_inductor.patterns.pipeline import source_hash
package, seen = Path({str(package)!r}), [source_hash()]
for name in {[f.as_posix() for f in files]}:
    with (package / name).open("a") as file:
        file.write("\\n")
    source_hash.cache_clear()
    seen.append(source_hash())
print(len(set(seen)), len(seen))
"""
    environment = {**os.environ, "PYTHONPATH": str(tree.root)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tree.root, capture_output=True, text=True, check=False
    )
    assert result.stdout == f"{len(files) + 1} {len(files) + 1}\n", result.stderr
