"""``explain``: what it says of fused, refused and unseen Linears, in every form, and the same in the log."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.lowering.base import provider_names
from quark_inductor.report import Report
from quark_inductor.schemes.errors import NotFusedError, OptionError

# Of a Linear with a quantized activation, when nobody may make kernels.
EMULATED = (
    "prologue_gemm, quantized_gemm, weight_only_gemm: "
    f"{', '.join(provider_names()[:-1])}: option quark.provider is 'emulation'"
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


def rows(report: Report) -> dict[str, tuple[str, bool]]:
    return {r.name: (r.provider, r.fused) for r in report.linears}


def test_what_runs_where() -> None:
    report = qi.explain(net(), torch.randn(3, 64))
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


def test_the_emulation_has_a_reason() -> None:
    report = qi.explain(net(), torch.randn(3, 64), options={"quark.provider": "emulation"})
    assert rows(report)["up"] == ("emulation", False)
    (reason,) = report.linears[0].refusals
    assert reason == EMULATED
    (kind,) = report.left
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
    reason = "prologue_gemm: cpp: scale rule 'floor' takes a logarithm, which two libraries round differently"
    assert refusals[-1] == reason
    assert [(kind.count, kind.reason) for kind in report.left] == [(1, "; ".join(refusals))]


def test_the_json_schema() -> None:
    """Schema 1: what programs may rely on."""
    found = json.loads(qi.explain(net("ptpc_fp8"), torch.randn(3, 64)).to_json())
    assert set(found) == {"schema", "graphs", "linears", "rules", "left"}
    assert found["schema"] == 1
    assert found["linears"][0] == {
        "name": "up",
        "scheme": "w8a8_fp8",
        "shape": [96, 64],
        "rules": ["fp8_weight", "fp8_activation", "fp8_prologue"],
        "op": "prologue_gemm",
        "x_format": "fp8_e4m3",
        "weight_format": "fp8_e4m3",
        "provider": "cpp",
        "fused": True,
        "refusals": [],
        "graph": 0,
    }


def test_it_prints_alike_linears_once() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    text = str(qi.explain(qi.quantize_(model, "mxfp4"), torch.randn(3, 64)))
    assert text.splitlines() == [
        "3 of 3 quantized Linears fused, in 1 graphs",
        "  0 and 2 more: w4a4_mxfp4 64 x 64, cpp prologue_gemm (block_weight + block_activation + block_prologue)",
    ]


def test_the_html_holds_every_row_and_escapes() -> None:
    cells: list[str] = []

    class Parser(HTMLParser):
        def handle_data(self, data: str) -> None:
            cells.append(data)

    report = qi.explain(net(), torch.randn(3, 64), options={"quark.provider": "emulation"})
    page = report.to_html()
    Parser().feed(page)
    assert {"up", "unused", "emulation", report.linears[0].refusals[0]} <= set(cells)
    assert "option quark.provider is 'emulation'" not in page  # the quotes are escaped


def test_strict_raises_with_the_same_text() -> None:
    model, x = net(), torch.randn(3, 64)
    report = qi.explain(model, x, options={"quark.provider": "emulation"})
    with pytest.raises(NotFusedError) as error:
        qi.explain(model, x, options={"quark.provider": "emulation", "quark.strict": True})
    assert f"up: {report.linears[0].refusals[0]}" in str(error.value)
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
torch.compile(model, backend="quark", options={"quark.provider": "emulation"})(torch.ones(2, 64))
"""


def test_the_log_streams_it() -> None:
    """``TORCH_LOGS`` takes the name of the package as it takes torch's own."""
    environment = {**os.environ, "TORCH_LOGS": "+quark_inductor.patterns", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
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
