"""``explain``: what it says of fused, refused and unseen Linears, in every form, and the same in the log."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.lowering import providers  # noqa: F401
from quark_inductor.lowering.base import provider_names
from quark_inductor.report import Bytes, Call, Report, Runtime
from quark_inductor.schemes.errors import DocumentError, NotFusedError, OptionError

# Of a Linear with a quantized activation, when nobody may make kernels.
EMULATED = (
    "prologue_gemm, quantized_gemm, weight_only_gemm: "
    f"{', '.join(provider_names()[:-1])}: option quark.provider is 'emulation': leave it out to ask all"
)


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


class Net(nn.Module):
    """One Linear whose K fits, one that stays float, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head, self.unused = nn.Linear(64, 96), nn.Linear(96, 8), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.up(x)))
        return y


def net(scheme: str = "mxfp4") -> nn.Module:
    torch.manual_seed(0)
    return qi.quantize_(Net(), scheme, exclude=("head",))


@pytest.fixture(scope="module")
def fused() -> Report:
    return qi.explain(net(), torch.randn(3, 64))


@pytest.fixture(scope="module")
def emulated() -> Report:
    return qi.explain(net(), torch.randn(3, 64), options={"quark.provider": "emulation"})


def rows(report: Report) -> dict[str, tuple[str, bool]]:
    return {r.name: (r.provider, r.fused) for r in report.linears}


def test_what_runs_where(fused: Report) -> None:
    report = fused
    assert rows(report) == {"up": ("cpp", True), "unused": ("eager", False)}
    up, unused = report.linears
    assert (up.scheme, up.shape, up.op, up.graph) == ("w4a4_mxfp4", (96, 64), "prologue_gemm", 0)
    assert (up.rules, up.formats) == (("block_weight", "block_activation", "block_prologue"), ("mxfp4", "mxfp4"))
    assert up.refusals == ()
    assert "in no compiled graph" in unused.refusals[0]
    assert (report.graphs, report.left) == (1, ())
    assert {rule: n for rule, n in report.rules.items() if n} == {
        **dict.fromkeys(up.rules, 1),
        "select_providers": 1,
        **{rule: n for rule, n in report.rules.items() if rule in ("cse", "hoist_views") and n},
    }


def test_the_emulation_has_a_reason(emulated: Report) -> None:
    assert rows(emulated)["up"] == ("emulation", False)
    (reason,) = emulated.linears[0].refusals
    assert reason == EMULATED
    (kind,) = emulated.left
    assert (kind.reason, kind.count, kind.layers) == (reason, 3, ("up",))  # quantize, dequantize, dequantize


def test_a_quantize_that_stays_outside_has_a_reason() -> None:
    """Rule "floor" is in no prologue: the GEMM is fused, its activation is quantized before."""
    from quark_inductor.schemes.base import scheme_for
    from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

    assert isinstance(PRESETS["mxfp4"].weight, TensorSpec)
    floor: dict[str, Any] = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    spec = LinearSpec(
        weight=PRESETS["mxfp4"].weight,
        input=TensorSpec(**floor, scale_calculation_mode="floor", is_dynamic=True),
    )
    model = net()
    model.up.scheme = scheme_for(spec)  # type: ignore[union-attr]
    report = qi.explain(model, torch.randn(3, 64))
    assert rows(report)["up"] == ("cpp", True)
    assert report.linears[0].op == "quantized_gemm"
    refusals = report.linears[0].refusals
    reason = (
        "prologue_gemm: cpp: scale rule 'floor' takes a logarithm, which two libraries round differently: "
        "quantize with 'even'"
    )
    assert refusals[-1] == reason
    assert [(kind.count, kind.reason) for kind in report.left] == [(1, "; ".join(refusals))]


SCHEMA, PROFILE_SCHEMA = (
    json.loads(files("quark_inductor").joinpath(f"schemas/{kind}.json").read_text()) for kind in ("report", "profile")
)


def test_the_json() -> None:
    """Schema 2: what programs may rely on. The sizes are those of a weight packed in panels of 64 channels."""
    found = json.loads(qi.explain(net("ptpc_fp8"), torch.randn(3, 64)).to_json())
    assert set(found) == {"schema", "kind", "graphs", "linears", "rules", "left", "call", "machine", "compile"}
    assert (found["schema"], found["kind"]) == (2, "report")
    assert found["linears"][0] == {
        "name": "up",
        "scheme": "w8a8_fp8",
        "shape": [96, 64],
        "tokens": 3,
        "rules": ["fp8_weight", "fp8_activation", "fp8_prologue"],
        "op": "prologue_gemm",
        "x_format": "fp8_e4m3",
        "weight_format": "fp8_e4m3",
        "provider": "cpp",
        "fused": True,
        "prologue": "fp8_e4m3 amax",
        "producer": "",
        "epilogue": ["relu"],
        # Codes, scales and bias in float32; values in float32.
        "bytes": {"weight": 128 * 64 + 96 * 4 + 96 * 4, "activation": 3 * 64 * 4, "output": 3 * 96 * 4},
        "refusals": [],
        "graph": 0,
        "runtime": None,
    }
    # One that was not called has its weight only.
    assert found["linears"][1]["bytes"] == {"weight": 64 * 64 + 64 * 4 + 64 * 4, "activation": None, "output": None}


def test_reports_are_valid_and_wrong_ones_are_not(fused: Report, emulated: Report) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    validator.validate(json.loads(fused.to_json()))
    good = json.loads(emulated.to_json())
    validator.validate(good)
    # The run is one of a profile, and its timeline is in the page.
    run = {**PROFILE_SCHEMA, "required": [], "$ref": "#/$defs/run"}
    jsonschema.validate(good["compile"], run)
    assert good["compile"]["graphs"] == 1
    assert 0 <= good["compile"]["unattributed_s"] < 0.05 * good["compile"]["wall_s"]
    assert "fw_compiler_base" in emulated.to_html()
    runtime = {"us": 1.0, "calls": 1, "gb_s": 1.0, "gflop_s": None, "bound": "luck", "of_ceiling": 0.5}
    wrong: tuple[Callable[[Any], Any], ...] = (
        lambda r: r.update(schema=1),
        lambda r: r.pop("machine"),
        lambda r: r.update(more=1),
        lambda r: r["linears"][0].pop("bytes"),
        lambda r: r["linears"][0].update(shape=[96]),
        lambda r: r["linears"][0].update(epilogue="relu"),
        lambda r: r["linears"][0]["bytes"].update(weight=-1),
        lambda r: r["linears"][0].update(runtime=runtime),
        lambda r: r["left"][0].update(count="many"),
    )
    for change in wrong:
        bad = copy.deepcopy(good)
        change(bad)
        assert not validator.is_valid(bad)


class Gated(nn.Module):
    """A norm, a gated pair and a residual: two epilogues."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        return y


def test_what_is_fused_after_a_gemm() -> None:
    report = qi.explain(qi.quantize_(Gated(), "mxfp4"), torch.randn(3, 64))
    assert {r.name: r.epilogue for r in report.linears} == {"gate": (), "up": ("silu", "mul"), "down": ("add",)}


def test_what_quantizes_before_a_gemm(materialized: str) -> None:
    options = {"quark.provider": materialized}
    report = qi.explain(qi.quantize_(Gated(), "mxfp4"), torch.randn(3, 64), options=options)
    found = {r.name: (r.op, r.prologue, r.producer) for r in report.linears}
    assert found["gate"] == found["up"] == ("quantized_gemm", "", "block_quantize")
    assert found["down"] == ("quantized_gemm", "", "silu, mul, block_quantize")
    # Codes and scales are what it reads: 128 values in 4 bits, 4 scales.
    assert report.linears[2].bytes.activation == 3 * (64 + 4)


def test_any_number_of_tokens() -> None:
    report = qi.explain(net(), torch.randn(3, 64), dynamic=True)
    up = report.linears[0]
    assert (up.tokens, up.bytes.activation, up.bytes.output) == (None, None, None)
    assert up.bytes.weight == 128 * (32 + 2) + 96 * 4
    assert "any number of tokens; " in str(report)


def test_it_reads_what_it_wrote(emulated: Report) -> None:
    report = dataclasses.replace(
        emulated,
        call=Call(9.0, 4.5, 7),
        machine={"threads": 2},
        compile={"wall_s": 1.5},
    )
    first, *others = report.linears
    first = dataclasses.replace(first, runtime=Runtime(4.5, 7, 1.5, None, "memory", 0.5))
    report = dataclasses.replace(report, linears=(first, *others))
    assert Report.from_json(report.to_json()) == report


def test_it_reads_an_old_report() -> None:
    """Of schema 1: one Linear that is fused, one that is emulated, one that was not called."""
    text = (Path(__file__).parents[1] / "fixtures" / "reports" / "report-1.json").read_text()
    report = Report.from_json(text)
    assert rows(report) == {"up": ("cpp", True), "odd": ("emulation", False), "unused": ("eager", False)}
    up, odd, _ = report.linears
    assert (up.shape, up.formats, up.bytes, up.runtime) == ((96, 64), ("mxfp4", "mxfp4"), Bytes(), None)
    assert odd.refusals[0].startswith("no rule's pattern is this graph")
    assert (report.left[0].count, report.machine, report.compile) == (1, None, None)
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)
    assert "odd: 48 x 96, emulation (no rule)" in str(report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"this is no JSON \(.*\); expected a report"),
        ("[]", "this is a list; expected a report"),
        ('{"schema": 1, "kind": "profile"}', "this is a document of kind 'profile'; expected a report"),
        ('{"schema": 3}', "this report has schema 3, and .* knows 1 to 2: read it with the version that wrote it"),
        ('{"schema": 1, "graphs": 1}', "report has no 'linears', expected graphs, linears, rules, left"),
        (
            '{"schema": 1, "graphs": "1", "linears": [], "rules": {}, "left": []}',
            "report.graphs is '1', expected int",
        ),
        (
            '{"schema": 1, "graphs": 1, "linears": [3], "rules": {}, "left": []}',
            r"linears\[0\] is a int, expected an object",
        ),
    ],
)
def test_a_broken_report_is_told(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Report.from_json(text)


def test_a_row_of_a_broken_report_is_told(fused: Report) -> None:
    good = json.loads(fused.to_json())
    for changes, message in (
        ({"shape": [96]}, r"linears\[0\]\.shape is \[96\], expected N and K"),
        ({"tokens": "3"}, r"linears\[0\]\.tokens is '3', expected int or null"),
        ({"bytes": {"weight": 1}}, r"linears\[0\]\.bytes has no 'activation'"),
        ({"runtime": {"us": 1}}, r"linears\[0\]\.runtime has no 'calls'"),
    ):
        bad = copy.deepcopy(good)
        bad["linears"][0].update(changes)
        with pytest.raises(DocumentError, match=message):
            Report.from_json(json.dumps(bad))


def test_it_prints_a_summary_and_alike_linears_once(emulated: Report) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 32))
    report = qi.explain(qi.quantize_(model, "mxfp4", exclude=()), torch.randn(3, 64))
    assert str(report).splitlines() == [
        "4 of 4 quantized Linears fused, in 1 graph",
        "  by provider: cpp 4",
        "  by scheme: w4a4_mxfp4 4",
        # 4 * 64 * 34 of codes and scales, 3 * 64 * 4 and 32 * 4 of biases; 4 times 3 * 64 values; 3 times, and a half.
        "  bytes of a call: 9.6 kB of weights, 3.07 kB of activations, 2.69 kB of outputs",
        "  0 and 2 more: w4a4_mxfp4 64 x 64, cpp prologue_gemm (block_weight + block_activation + block_prologue)",
        "    3 tokens; quantizes its activation (mxfp4 even); weight 2.43 kB, activation 768 B, output 768 B",
        "  3: w4a4_mxfp4 32 x 64, cpp prologue_gemm (block_weight + block_activation + block_prologue)",
        "    3 tokens; quantizes its activation (mxfp4 even); weight 2.3 kB, activation 768 B, output 384 B",
    ]
    assert emulated.summary.splitlines()[-2:] == [f"  1 x {EMULATED}", f"  1 x {emulated.linears[1].refusals[0]}"]


def test_the_html_holds_every_row_and_escapes(emulated: Report) -> None:
    cells: list[str] = []

    class Parser(HTMLParser):
        def handle_data(self, data: str) -> None:
            cells.append(data)

    page = emulated.to_html()
    Parser().feed(page)
    assert {"up", "unused", "emulation", emulated.linears[0].refusals[0]} <= set(cells)
    assert "option quark.provider is 'emulation'" not in page  # the quotes are escaped


def test_strict_raises_with_the_same_text(emulated: Report) -> None:
    model, x = net(), torch.randn(3, 64)
    with pytest.raises(NotFusedError) as error:
        qi.explain(model, x, options={"quark.provider": "emulation", "quark.strict": True})
    assert f"up: {emulated.linears[0].refusals[0]}" in str(error.value)
    with pytest.raises(OptionError, match=r"there is no option 'quark\.fast'"):
        qi.explain(model, x, options={"quark.fast": True})


def test_a_compiled_model_and_a_graph_break() -> None:
    model = net()

    def broken(x: Tensor) -> Tensor:
        y: Tensor = model.up(x)  # type: ignore[operator]
        torch._dynamo.graph_break()
        return y + model.up(y[:, :64])  # type: ignore[no-any-return, operator]

    report = qi.explain(broken, torch.randn(3, 64))
    assert (report.graphs, [r.graph for r in report.linears]) == (2, [0, 1])
    compiled = torch.compile(model, backend="quark")
    assert rows(qi.explain(compiled, torch.randn(3, 64)))["up"] == ("cpp", True)


PROGRAM = """
import torch, quark_inductor as qi
model = qi.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)), "mxfp4")
options = {"quark.provider": "emulation", "fx_graph_cache": False}
torch.compile(model, backend="quark", options=options)(torch.ones(2, 64))
"""


def test_the_log_streams_it() -> None:
    """``TORCH_LOGS`` takes the name of the package as it takes torch's own."""
    # No graph from a cache, which would run no pass; kernels may be.
    environment = {**os.environ, "TORCH_LOGS": "+quark_inductor.patterns", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    for line in (
        "block_weight: 1 matches, 0 refusals",
        "0: prologue_gemm of mxfp4 even and mxfp4 by emulation",
        f"left in 0: {EMULATED}",
        f"0 runs as emulation: {EMULATED}",
    ):
        assert line in done.stderr, line
