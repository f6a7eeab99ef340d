"""``profile_compile``: where it says the time goes, against sleeps and clocks that the tests plant."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import get_chromium_event_logger
from torch.fx import Node

import quark_inductor as qi
from quark_inductor.patterns.base import Found, Rule, Variant, register_rule, unregister_rule
from quark_inductor.profile import Profile, Run
from quark_inductor.recorder import PHASES, Break, phase_of
from quark_inductor.schemes.errors import DocumentError, NotFusedError, OptionError

PROFILES = Path(__file__).parents[1] / "fixtures" / "profiles"


@torch.library.custom_op("quark_inductor_tests::sleep", mutates_args=())
def sleep(x: Tensor) -> Tensor:
    time.sleep(0.2)
    return x.clone()


sleep.register_fake(torch.empty_like)


class Slow(nn.Module):
    """Two Linears of one shape, and an op that takes 0.2 s."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return sleep(self.b(self.a(x)))


def slow_model() -> nn.Module:
    torch.manual_seed(0)
    return qi.quantize_(Slow(), "mxfp4")


@pytest.fixture(scope="module")
def slow_rule() -> Iterator[str]:
    """A rule that needs 50 ms and more, and matches nothing."""

    @register_rule
    class Planted(Rule):
        name = "planted_rule"
        targets = (torch.ops.aten.mm.default,)

        def variants(self) -> Iterator[Variant]:
            return iter(())

        def check(self, found: Found) -> str | None:
            return None

        def rewrite(self, found: Found) -> Node:
            raise AssertionError

        def apply(self, *args: Any) -> Any:
            time.sleep(0.05)
            return super().apply(*args)

    yield Planted.name
    unregister_rule(Planted.name)


@pytest.fixture(scope="module")
def measured(slow_rule: str) -> tuple[Profile, float]:
    """A profile, and the seconds that it took by a clock of the test's own."""
    model = slow_model()
    start = time.perf_counter()
    profile = qi.profile_compile(model, torch.randn(2, 64))
    return profile, time.perf_counter() - start


@pytest.fixture
def profile(measured: tuple[Profile, float]) -> Profile:
    return measured[0]


def test_the_tree_adds_up_to_the_clock(measured: tuple[Profile, float]) -> None:
    profile, clock = measured
    # Between the runs caches are cleared and a folder is removed.
    assert 0.6 * clock < profile.cold.wall_s + profile.warm.wall_s <= clock
    for run in (profile.cold, profile.warm):
        assert 0 <= run.unattributed_s < 0.05 * run.wall_s
        assert sum(run.phases.values()) + run.unattributed_s == pytest.approx(run.wall_s)
        assert sum(top.s for top in run.tree) + run.unattributed_s == pytest.approx(run.wall_s)
        for top in run.tree:
            for node in top.walk():
                assert node.self_s > -1e-6
                assert node.self_s + sum(child.s for child in node.children) == pytest.approx(node.s)


def test_what_was_planted_is_where_it_belongs(profile: Profile, slow_rule: str) -> None:
    assert 0.05 <= profile.cold.seconds(f"quark.{slow_rule}") < 0.5
    assert profile.cold.phases["quark_passes"] >= 0.05
    assert profile.warm.seconds(f"quark.{slow_rule}") == 0  # a graph from a cache runs no rule
    assert f"quark.{slow_rule}" in profile.table()
    for run in (profile.cold, profile.warm):
        assert 0.2 <= run.phases["first_run"] < 2
        assert run.seconds("quark.first_run") == pytest.approx(run.phases["first_run"])


def test_every_phase_of_ours_is_timed(profile: Profile) -> None:
    names = {node.name: node for top in profile.cold.tree for node in top.walk()}
    for name in ("passes", "cse", "block_weight", "select_providers", "leftovers", "late_decomposition"):
        assert names[f"quark.{name}"].phase == "quark_passes", name
    assert (names["quark.lower.cpp"].count, names["quark.lower.cpp"].phase) == (2, "lowering")
    assert (names["quark.render.quark_prologue_gemm"].count, names["quark.render.quark_prologue_gemm"].phase) == (
        2,
        "templates",
    )
    assert set(profile.cold.phases) <= {*PHASES, "other"}
    assert profile.cold.phases.get("other", 0) < 0.01 * profile.cold.wall_s
    # What torch calls its phases, in each version; kernels are built beside this thread.
    everywhere = {span.name for span in profile.cold.spans}
    for name in ("bytecode_tracing", "aot_collect_metadata", "GraphLowering.run", "Scheduler.codegen", "compile_file"):
        assert name in everywhere
        assert phase_of(name) is not None


def test_kernels_are_counted_once_and_by_name(profile: Profile) -> None:
    kernels = profile.cold.kernels
    assert kernels.calls is not None
    # Both Linears are of one kernel.
    assert (kernels.distinct, kernels.calls, kernels.deduplicated) == (1, 2, 1)
    assert (kernels.compiled, kernels.reused) == (1, 0)
    gemm = next(kernel for kernel in kernels.built if kernel.name.startswith("cpp_"))
    assert (gemm.compiler, gemm.calls) == ("g++", 2)
    # The compiler's own time is not more than what was waited for it.
    waited = profile.cold.seconds("async_compile.wait") + profile.cold.seconds("PyCodeCache.load_by_key_path")
    assert 0.1 < gemm.s <= waited
    warm = profile.warm.kernels
    assert (warm.distinct, warm.compiled, warm.reused, warm.calls, warm.built) == (1, 0, 1, None, ())


def test_caches_and_memory(profile: Profile) -> None:
    found = {(run, c.cache): (c.hits, c.misses, c.bypasses) for run, r in profile.runs.items() for c in r.caches}
    assert found == {
        ("cold", "fx_graph"): (0, 1, 0),
        ("cold", "aot_autograd"): (0, 1, 0),
        ("warm", "aot_autograd"): (1, 0, 0),
    }
    if Path("/proc/self/clear_refs").exists():
        assert profile.cold.peak_memory_bytes is not None
        assert 50e6 < profile.cold.peak_memory_bytes < 20e9


def test_the_timeline_holds_what_the_tree_does(profile: Profile) -> None:
    for run in (profile.cold, profile.warm):
        spans = [span for span in run.spans if span.lane == 0]
        assert len(spans) == sum(node.count for top in run.tree for node in top.walk())
        assert all(0 <= span.start_s <= span.end_s <= run.wall_s for span in run.spans)
    assert any(span.name.startswith("g++ cpp_") for span in profile.cold.spans)
    events = json.loads(profile.to_chrome_trace())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == sum(len(run.spans) for run in profile.runs.values())
    rule = next(e for e in complete if e["name"] == "quark.planted_rule")
    assert (rule["pid"], rule["tid"], rule["cat"]) == (1, 0, "quark_passes")
    assert rule["dur"] >= 50_000


def test_json_and_back(profile: Profile) -> None:
    text = profile.to_json()
    schema = json.loads((resources.files("quark_inductor") / "schemas" / "profile.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(text))
    again = Profile.from_json(text)
    assert again.to_json() == text
    assert again.cold.kernels == Profile.from_json(text).cold.kernels
    for damage in ({"schema": 7}, {"kind": "report"}, {"cold": {}}, {"backend": "eager"}):
        assert not validator.is_valid({**json.loads(text), **damage}), damage


def test_an_older_file_still_loads() -> None:
    """Written by version 0.1.0; every later version reads it. Another that lacks what came later has its defaults."""
    text = (PROFILES / "profile-1.json").read_text(encoding="utf-8")
    old = Profile.from_json(text)
    assert (old.model, old.backend) == ("Slow", "quark")
    assert old.cold.seconds("quark.planted_rule") >= 0.05
    raw = json.loads(text)
    for run in ("cold", "warm"):
        for key in ("spans", "caches", "peak_memory_bytes", "recompiles"):
            del raw[run][key]
    raw["cold"]["of_the_future"] = 1
    assert Profile.from_json(json.dumps(raw)).cold.spans == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is no JSON"),
        ("[]", "this is a list; expected a profile"),
        ('{"kind": "report", "schema": 2}', "a document of kind 'report'; expected a profile"),
        ('{"kind": "profile", "schema": 99}', "has schema 99, .* knows 1 to 1"),
        ('{"kind": "profile", "schema": 1, "cold": {}}', "is not whole"),
    ],
)
def test_what_is_no_profile_says_so(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Profile.from_json(text)


def test_the_users_caches_and_torchs_logger_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = dict(vars(get_chromium_event_logger()))
    with pytest.raises(NotFusedError):
        qi.profile_compile(
            slow_model(), torch.randn(2, 64), options={"quark.strict": True, "quark.provider": "emulation"}
        )
    assert vars(get_chromium_event_logger()).keys() == before.keys()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="no backend 'eager' to profile; expected one of quark, inductor"):
        qi.profile_compile(slow_model(), torch.randn(2, 64), backend="eager")
    with pytest.raises(OptionError, match=r"no option 'quark\.fast'"):
        qi.profile_compile(slow_model(), torch.randn(2, 64), options={"quark.fast": True})


def relu(x: Tensor) -> Tensor:
    return torch.relu(x + 1)


def test_a_cache_that_is_bypassed_says_why() -> None:
    """A pass of the user's without a name for it: Inductor cannot know what it does."""

    def users_pass(graph: Any) -> None:
        pass

    profile = qi.profile_compile(relu, torch.randn(8), options={"post_grad_custom_pre_pass": users_pass})
    for run in (profile.cold, profile.warm):
        (fx,) = (c for c in run.caches if c.cache == "fx_graph")
        assert (fx.hits, fx.misses, fx.bypasses) == (0, 0, 1)
        assert "post grad custom pass" in fx.reasons[0]
    assert "cold: cache fx_graph bypassed: " in profile.table()
    assert "2 cache bypasses" in profile.summary  # that of AOTAutograd holds graphs of this one
    # The kernel's library is reused all the same.
    assert (profile.warm.kernels.compiled, profile.warm.kernels.reused) == (0, 1)


def test_graph_breaks_and_recompiles_say_where_and_why() -> None:
    def part(x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    @torch._dynamo.disable
    def outer(x: Tensor) -> Tensor:
        compiled: Any = torch.compile(part, backend="eager", dynamic=False)
        return compiled(x) + compiled(x[:4]).sum()

    def model(x: Tensor) -> Tensor:
        return outer(part(x))

    line = part.__code__.co_firstlineno + 2
    profile = qi.profile_compile(model, torch.randn(8))
    breaks = profile.cold.graph_breaks
    assert f"{__file__}:{line}" in {b.where for b in breaks}
    assert any("torch._dynamo.graph_break()" in b.reason for b in breaks)
    assert profile.cold.graphs == 2
    reasons = [b for b in profile.cold.recompiles if "size mismatch at index 0. expected 8, actual 4" in b.reason]
    assert reasons
    assert reasons[0].where.startswith("part (")
    table = profile.table()
    assert f"cold: graph break at {__file__}:{line}" in table
    assert "cold: recompiled at part (" in table


def test_stock_inductor_beside_it_and_what_differs(profile: Profile) -> None:
    stock = qi.profile_compile(slow_model(), torch.randn(2, 64), backend="inductor")
    assert stock.backend == "inductor"
    assert "quark_passes" not in stock.cold.phases
    assert stock.cold.unattributed_s < 0.05 * stock.cold.wall_s
    deltas = {(d.run, d.name): d for d in profile.compare(stock).deltas}
    rule = deltas["cold", "quark.planted_rule"]
    assert (rule.base, rule.unit) == (0, "s")
    assert rule.now >= 0.05
    assert deltas["cold", "wall"].now == profile.cold.wall_s
    assert "quark.planted_rule" in str(profile.compare(stock))


def test_a_regression_is_marked(profile: Profile) -> None:
    cold = profile.cold
    slower = dataclasses.replace(cold, wall_s=cold.wall_s * 2, graph_breaks=(Break("why", "here.py:1", 1),))
    compared = dataclasses.replace(profile, cold=slower).compare(profile)
    assert {(d.run, d.name) for d in compared.deltas if d.worse} == {("cold", "wall"), ("cold", "graph breaks")}
    assert not any(d.worse for d in profile.compare(profile).deltas)
    raw = json.loads(compared.to_json())
    assert (raw["kind"], raw["schema"]) == ("comparison", 1)
    (wall,) = (d for d in raw["deltas"] if (d["run"], d["name"]) == ("cold", "wall"))
    assert (wall["worse"], wall["unit"]) == (True, "s")
    assert wall["now"] == pytest.approx(2 * wall["base"], rel=1e-4)
    (line,) = (line for line in str(compared).splitlines() if line.startswith("cold: wall"))
    assert line.endswith("worse")
    other = dataclasses.replace(profile, model="Other")
    assert "these are not alike" in str(other.compare(profile))


def test_runs_are_read_as_they_were_written(profile: Profile) -> None:
    run = functools.reduce(lambda run, _: Run.from_dict(run.to_dict()), range(2), profile.cold)
    assert run.to_dict() == profile.cold.to_dict()


@pytest.mark.demo
@pytest.mark.timeout(900)
def test_the_tree_of_a_real_model_adds_up() -> None:
    """30 blocks, 210 quantized Linears."""
    from quark_inductor import demo, machine

    _, model = demo.load_float(demo.fetch_model(machine.cache_folder()))
    start = time.perf_counter()
    profile = qi.profile_compile(
        qi.quantize_(model, "mxfp4"), input_ids=torch.arange(16)[None], use_cache=False, dynamic=False
    )
    clock = time.perf_counter() - start
    assert 0.9 * clock < profile.cold.wall_s + profile.warm.wall_s <= clock
    for run in profile.runs.values():
        assert sum(top.s for top in run.tree) == pytest.approx(run.wall_s, rel=0.05)
        assert sum(run.phases.values()) == pytest.approx(run.wall_s, rel=0.05)
    assert profile.cold.seconds("quark.block_weight") > 0
    assert profile.cold.kernels.calls is not None
    assert profile.cold.kernels.calls >= 210 > profile.cold.kernels.distinct == profile.cold.kernels.compiled
