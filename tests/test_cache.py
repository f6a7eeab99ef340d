"""Honest caches: a second process compiles nothing again, and nothing it runs is stale."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("cache_worker.py")
FLOORS = ("schemes", "lowering", "patterns")

Job = tuple[str, dict[str, Any]]
FUSED: Job = ("mxfp4", {})
EMULATED: Job = ("mxfp4", {"quark.provider": "emulation"})
FP8: Job = ("ptpc_fp8", {})

# By provider.
KERNELS = {"cpp": 1}


class Tree:
    """A copy of the package as it is installed, the three folders inside ``quark_inductor``, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cache, self.isa = folder / "tree", folder / "cache", ""
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "quark_inductor", self.root / "quark_inductor", ignore=ignored)
        for floor in FLOORS:
            # git ignores links of these names, which some editors want.
            shutil.rmtree(self.root / "quark_inductor" / floor, ignore_errors=True)
            shutil.copytree(ROOT / floor, self.root / "quark_inductor" / floor, ignore=ignored)

    def with_cache(self, cache: Path) -> "Tree":
        """The same files with another cache."""
        other = copy.copy(self)
        other.cache = cache
        return other

    def start(self, *jobs: Job, environment: dict[str, str] | None = None, **plan: str) -> subprocess.Popen[str]:
        """A new process, in a group of its own. See cache_worker.py."""
        variables = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",
            **(environment or {}),
        }
        # -P: beside the script are folders named like the package.
        command = [sys.executable, "-P", str(WORKER), json.dumps({"jobs": jobs, **plan})]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=variables, cwd=self.root, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def finish(self, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        """What a process says of each of its jobs."""
        output, errors = communicate(process)
        assert process.returncode == 0, errors
        said = json.loads(output)
        assert Path(said["file"]).is_relative_to(self.root)
        for job in said["jobs"]:
            assert job["error"] < 1e-5
            job["isa"] = said["isa"]
        return list(said["jobs"])

    def run(self, *jobs: Job, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """What a new process says of each of its jobs."""
        return self.finish(self.start(*jobs, environment=environment))

    def replace(self, path: str, old: str, new: str) -> None:
        file = self.root / "quark_inductor" / path
        text = file.read_text()
        assert text.count(old) >= 1, f"{path} has changed: look for another place to edit"
        file.write_text(text.replace(old, new))

    def append(self, path: str, text: str) -> None:
        file = self.root / "quark_inductor" / path
        assert file.is_file()
        with file.open("a") as opened:
            opened.write(text)


def communicate(process: subprocess.Popen[str]) -> tuple[str, str]:
    """A process that waits for a lock nobody will release fails the test, and ends."""
    try:
        return process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def is_hit(said: dict[str, Any]) -> bool:
    """Everything from the caches, or nothing: no pass ran in a process that hit."""
    hit = said["aot"].get("hit") == 1
    assert (said["aot"].get("miss", 0), said["passes"] == []) == (0 if hit else 1, hit)
    assert said["fx"].get("miss", 0) == (0 if hit else 1)
    assert "bypass" not in said["aot"] | said["fx"]
    return hit


def is_right(said: dict[str, Any], kernels: dict[str, int]) -> bool:
    return said["kernels"] == kernels and said["ratio"] == pytest.approx(1.0, rel=1e-5)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree with which one process has filled the caches, of a fused and of an emulated Linear."""
    tree = Tree(tmp_path_factory.mktemp("warm"))
    fused, emulated = tree.run(FUSED, EMULATED)
    assert not is_hit(fused)
    assert any(matches for _, matches in fused["passes"])
    assert is_right(fused, KERNELS)
    # Another quark.provider: not what was just compiled.
    assert not is_hit(emulated)
    assert is_right(emulated, {})
    tree.isa = fused["isa"]
    return tree


def test_a_second_process_compiles_nothing(warm: Tree, tmp_path: Path) -> None:
    """Also not from a copy: where the package lies is no part of the key, else the misses below would prove nothing."""
    fused, emulated = Tree(tmp_path).with_cache(warm.cache).run(FUSED, EMULATED)
    assert is_hit(fused)
    # A hit counts the kernels it brings, so that a report is not empty.
    assert is_right(fused, KERNELS)
    assert is_hit(emulated)
    assert is_right(emulated, {})


@pytest.mark.slow
def test_other_options_are_another_graph(warm: Tree) -> None:
    """Even one that makes the same kernels; ours, and one of Inductor's."""
    others: list[dict[str, Any]] = [{"quark.strict": True}, {"quark.provider": "cpp"}, {"epilogue_fusion": False}]
    jobs: list[Job] = [FUSED, *(("mxfp4", options) for options in others)]
    for hits in ([True, False, False, False], [True] * 4):
        said = warm.run(*jobs)
        assert [is_hit(job) for job in said] == hits
        assert all(is_right(job, KERNELS) for job in said)


@pytest.mark.slow
def test_another_isa_is_another_graph(warm: Tree) -> None:
    """Where kernels for another one than ``"portable"`` are compiled."""
    if warm.isa == "portable":
        pytest.skip("this CPU, or this environment, has portable kernels only")
    for hit in (False, True):
        (said,) = warm.run(FUSED, environment={"QUARK_INDUCTOR_ISA": "portable"})
        assert said["isa"] == "portable"
        assert is_hit(said) == hit
        assert is_right(said, KERNELS)


QUARTER = """
_right = run_rules

def run_rules(graph, options):
    result = _right(graph, options)
    for node in [n for n in graph.nodes if "prologue_gemm" in str(n.target)]:
        with graph.inserting_after(node):
            quarter = graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.25))
        quarter.meta = dict(node.meta)
        node.replace_all_uses_with(quarter, delete_user_cb=lambda user: user is not quarter)
    return result
"""

# What a change makes of a tree, the job that shows it, and what is seen there: the ratio to what is right, the kernels.
Change = tuple[Callable[[Tree], None], Job, float, dict[str, int]]
CHANGES: dict[str, Change] = {
    # What a spec is: nothing that is compiled.
    "schemes": (lambda tree: tree.append("schemes/spec.py", "\n"), FUSED, 1.0, KERNELS),
    # The emulation's dequantize, of both operands, doubled. Eager code has its own.
    "numerics": (
        lambda tree: tree.append(
            "schemes/numerics/block.py",
            "\n_right = dequantize\ndef dequantize(*args, **kwargs):\n    return 2 * _right(*args, **kwargs)\n",
        ),
        EMULATED,
        4.0,
        {},
    ),
    # Providers: nobody can.
    "lowering": (
        lambda tree: tree.append(
            "lowering/base.py", "\ndef select(*args, **kwargs):\n    return Selection(None, ('nobody was asked',))\n"
        ),
        FUSED,
        1.0,
        {},
    ),
    # The template: what is stored of the tile is tripled.
    "template": (
        lambda tree: tree.replace(
            "lowering/cpp/template.py", "Vec::loadu(sums + n)", "Vec::loadu(sums + n) * Vec(3.0f)"
        ),
        FUSED,
        3.0,
        KERNELS,
    ),
    # The results doubled, in the kernel of either kind of CPU.
    "header": (
        lambda tree: (
            tree.replace("lowering/cpp/vnni_mxfp4.h", "float(largest - 129)", "float(largest - 128)"),
            tree.replace("lowering/cpp/portable.h", "w = (w - z) * s * second", "w = 2.0f * (w - z) * s * second"),
        ),
        FUSED,
        2.0,
        KERNELS,
    ),
    # The rules: of what the kernel computes, a quarter is taken.
    "patterns": (lambda tree: tree.append("patterns/pipeline.py", QUARTER), FUSED, 0.25, KERNELS),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_nothing_is_stale(warm: Tree, tmp_path: Path, kind: str) -> None:
    """A change of each kind of file, made after the caches were filled, is a miss, and is seen in the result."""
    change, job, ratio, kernels = CHANGES[kind]
    changed = Tree(tmp_path).with_cache(warm.cache)
    change(changed)
    (said,) = changed.run(job)
    assert not is_hit(said)
    assert said["ratio"] == pytest.approx(ratio, rel=1e-5)
    assert said["kernels"] == kernels


def test_every_source_file_is_part_of_the_key(tmp_path: Path) -> None:
    """Of the three floors that decide what a graph becomes, also one that is new."""
    tree = Tree(tmp_path)
    package = tree.root / "quark_inductor"
    files = sorted(f.relative_to(package) for floor in FLOORS for f in (package / floor).rglob("*") if f.is_file())
    assert {f.suffix for f in files} == {".py", ".h"}
    # Every kind of file is changed above, in a process that compiles.
    assert {(f.parent.as_posix(), f.suffix) for f in files} == {
        ("schemes", ".py"),
        ("schemes/numerics", ".py"),
        ("lowering", ".py"),
        ("lowering/cpp", ".py"),
        ("lowering/cpp", ".h"),
        ("lowering/triton", ".py"),
        ("patterns", ".py"),
    }
    files += [Path("schemes/numerics/new.py"), Path("lowering/cpp/new.h")]
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


@pytest.mark.slow
def test_two_processes_at_once(warm: Tree, tmp_path: Path) -> None:
    """In one empty folder: both miss, compile the same kernels, and leave what a third one uses."""
    tree, meeting = warm.with_cache(tmp_path / "cache"), tmp_path / "meeting"
    meeting.mkdir()
    both = [tree.start(FUSED, meet=str(meeting)) for _ in range(2)]
    for process in both:
        (said,) = tree.finish(process)
        assert not is_hit(said)
        assert is_right(said, KERNELS)
    (said,) = tree.run(FUSED)
    assert is_hit(said)
    assert is_right(said, KERNELS)


def kill(tree: Tree, moment: str) -> None:
    """Start a process that compiles an FP8 Linear, and dies at a moment."""
    before = set(tree.cache.rglob("*"))
    process = tree.start(FP8, killed=moment)
    _, errors = communicate(process)
    # No AssertionError, which a test below expects of the process that comes after.
    if process.returncode != -signal.SIGKILL:
        pytest.fail(f"it was not killed: {errors}")
    if not set(tree.cache.rglob("*")) - before:
        pytest.fail("it left nothing that could be in the way")


@pytest.fixture
def used(warm: Tree, tmp_path: Path) -> Tree:
    """A tree with a copy of the caches, which know nothing of an FP8 Linear."""
    return warm.with_cache(shutil.copytree(warm.cache, tmp_path / "cache"))


@pytest.mark.slow
def test_killed_processes_leave_a_usable_cache(used: Tree) -> None:
    """Each is killed later than the one before, whose locks and fragments are not in its way."""
    for moment in ("compiler", "fxgraph", "aotautograd"):
        kill(used, moment)
    again, hit = used.run(FP8, FP8)
    # The last one left a whole graph, without the AOTAutograd entry that tells of it.
    assert (again["aot"].get("miss"), again["fx"]) == (1, {"hit": 1})
    assert is_right(again, KERNELS)
    assert is_hit(hit)
    assert is_right(hit, KERNELS)


@pytest.mark.slow
def test_a_process_killed_while_it_links_leaves_a_usable_cache(used: Tree) -> None:
    kill(used, "linker")
    (again,) = used.run(FP8)
    assert not is_hit(again)
    assert is_right(again, KERNELS)
