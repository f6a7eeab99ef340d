"""``forecast``: what it says without a number is what becomes of the loaded model when it is compiled."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quark_inductor as qi
from quark_inductor import loading
from quark_inductor.forecast import forecast, forecast_experts, forms, kind_of
from quark_inductor.lowering.base import forcing
from quark_inductor.patterns.selection import LinearResult
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.spec import PRESETS
from quark_inductor.testing import rewrite

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("moe_gpt_oss_mxfp4",)
MORE = ("mxfp4_attn_ptpc", "nvfp4", "int4_wo_32", "fp8_kv_fp8", "int8_perchannel_asym_fp32", "moe_mixtral_int8")
TOKENS = (1,)
OFF = {"quark.provider": "emulation"}


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


def forecasts(directory: Path) -> Iterator[tuple[str, list[LinearResult]]]:
    """Of every quantized GEMM of a checkpoint, by the name it has in a compiled model."""
    found = loading.skeleton(directory)
    accounting = loading.account(found.model, found.stored, found.stored_dtype, strict=True)
    for name, target in accounting.targets.items():
        loading.assign(found.model, name, target)
    experts = {n: m for n, m in found.model.named_modules() if isinstance(m, QuarkExperts)}
    for name, module in experts.items():
        top_k = found.model.config.num_experts_per_tok
        told = forecast_experts(module, [tokens * top_k for tokens in TOKENS])
        assert not isinstance(told, str)
        for projection, results in dict(told.values()).items():
            yield f"{name}.{projection}", results
    for name, linear in found.linears.items():
        if not name.startswith(tuple(experts)):
            yield name, forecast(linear, TOKENS)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_compiled_model_does_what_was_told(name: str) -> None:
    told = dict(forecasts(FIXTURES / name))
    model: Any = qi.load(FIXTURES / name)
    for i, tokens in enumerate(TOKENS):
        ids = torch.arange(tokens)[None] % model.config.vocab_size
        became = {r.layer: r for r in rewrite(model, input_ids=ids, use_cache=False).result.linears}
        assert became.keys() == told.keys()
        for layer, of in told.items():
            for what in ("provider", "problem", "rules", "refusals", "fused"):
                assert getattr(of[i], what) == getattr(became[layer], what), (layer, tokens, what)


def test_a_linear_without_memory() -> None:
    linear = QuarkLinear(64, 96, scheme_for(PRESETS["mxfp4"]), bias=False, dtype=torch.bfloat16, device="meta")
    other = QuarkLinear(64, 96, scheme_for(PRESETS["mxfp4"]), bias=True, dtype=torch.bfloat16, device="meta")
    assert kind_of(linear) != kind_of(other)
    (result,) = forecast(linear, [3])
    assert (result.provider, result.fused, result.shape) == ("cpp", True, (96, 64))
    assert result.problem is not None
    assert (result.problem.m, result.problem.layout) == (3, "panel64")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_it_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A compiled model warns of what is left to the emulation, here that is the answer."""
    linear = QuarkLinear(64, 96, scheme_for(PRESETS["mxfp4"]), bias=False, dtype=torch.bfloat16, device="meta")
    with forcing("emulation"):
        (result,) = forecast(linear, [3])
    assert (result.provider, result.fused) == ("emulation", False)
    assert warnings(caplog) == []
    rewrite(qi.quantize_(nn.Sequential(nn.Linear(64, 96)), "mxfp4"), torch.ones(1, 64), options=OFF)
    assert len(warnings(caplog)) == 1


def test_the_forms_of_a_linear() -> None:
    linear = QuarkLinear(64, 96, scheme_for(PRESETS["ptpc_fp8"]), bias=True, dtype=torch.bfloat16, device="meta")
    (problems,) = forms(linear, [5])
    assert [p.op for p in problems] == ["prologue_gemm", "quantized_gemm", "weight_only_gemm"]
    assert {(p.m, p.n, p.k) for p in problems} == {(5, 96, 64)}


def test_experts_that_cannot_be_grouped_say_why() -> None:
    found = loading.skeleton(FIXTURES / "moe_qwen3_mxfp4")
    (experts,) = [m for m in found.model.modules() if isinstance(m, QuarkExperts)]
    experts.experts[1].up_proj = nn.Linear(128, 64, device="meta", dtype=torch.bfloat16)
    assert forecast_experts(experts, [2]) == "some of their Linears are not quantized"
