"""``emulation="at_load"``: the same numbers as ``"per_call"``, bit by bit, and what it costs."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quark_inductor as qi
from quark_inductor.errors import ConfigError, OptionError, QuarkInductorError
from quark_inductor.schemes.base import QuarkLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/reference.safetensors"))
UNCALIBRATED = ["f2f_fp8", "f2f_nvfp4"]


def logits(model: Any, batch: int = 2) -> Tensor:
    ids = torch.randint(0, 16, (batch, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("name", [*NAMES, *UNCALIBRATED])
def test_the_logits_are_the_same(name: str) -> None:
    fallback = name in UNCALIBRATED
    per_call = qi.load(FIXTURES / name, dynamic_fallback=fallback)
    at_load = qi.load(FIXTURES / name, dynamic_fallback=fallback, emulation="at_load")
    assert torch.equal(logits(at_load), logits(per_call))
    linears = [m for m in at_load.modules() if isinstance(m, QuarkLinear)]
    assert len(linears) >= 5
    for m in linears:
        assert m.weight.dtype == at_load.dtype
        assert m.weight.shape == (m.out_features, m.in_features)
        assert not [n for n, _ in m.named_parameters() if n.startswith("weight_")]
    assert {m.emulation for m in linears if m.scheme.spec.weight is not None} == {"at_load"}


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4_fp8", "fp8_kv_fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_in_another_dtype_too(name: str, dtype: torch.dtype) -> None:
    per_call, at_load = (qi.load(FIXTURES / name, dtype=dtype, emulation=e) for e in ("per_call", "at_load"))
    assert torch.equal(logits(at_load), logits(per_call))
    assert logits(at_load).dtype == dtype


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int4_wo_128", "mxfp4_kv_excluded"])
def test_the_warning_says_the_sizes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        per_call = qi.load(FIXTURES / name)
        assert caplog.records == []
        at_load = qi.load(FIXTURES / name, emulation="at_load")
    (record,) = caplog.records
    match = re.fullmatch(
        r"(\d+) Linears were dequantized at load: (.*) MB instead of (.*) MB, and no kernel for them",
        record.getMessage(),
    )
    assert match is not None
    linears = {n: m for n, m in per_call.named_modules() if isinstance(m, QuarkLinear)}
    sizes = [
        sum(p.nbytes for n in linears for p in model.get_submodule(n).parameters()) / 1e6
        for model in (at_load, per_call)
    ]
    assert sizes[0] > 1.5 * sizes[1] or name == "mxfp4_kv_excluded"
    assert match.groups() == (str(len(linears)), *(f"{size:.1f}" for size in sizes))


@pytest.mark.parametrize("name", ["mxfp4", "int8", "mxfp4_kv_fp8", "nvfp4_weight_only"])
def test_there_is_nothing_left_to_save(name: str, tmp_path: Path) -> None:
    model = qi.load(FIXTURES / name, emulation="at_load")
    with pytest.raises(ConfigError) as caught:
        qi.save(model, tmp_path / "x")
    for text in ("model.layers.0.self_attn.q_proj", "dequantized at load", "emulation='per_call'"):
        assert text in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_the_default_is_per_call() -> None:
    model = qi.load(FIXTURES / "mxfp4")
    assert {m.emulation for m in model.modules() if isinstance(m, QuarkLinear)} == {"per_call"}


@pytest.mark.parametrize("emulation", ["never", "", None, True])
def test_another_emulation_is_refused(emulation: Any) -> None:
    with pytest.raises(OptionError, match=r"emulation is .*; expected 'per_call' or 'at_load'"):
        qi.load(FIXTURES / "mxfp4", emulation=emulation)
    assert issubclass(OptionError, QuarkInductorError)


def test_numbers_are_checked_before_they_are_dequantized(copy_of: Any) -> None:
    copy = copy_of("ptpc_fp8")
    with copy.tensors() as tensors:
        tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = -1
    with pytest.raises(qi.errors.CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: weight_scale"):
        qi.load(copy.path, emulation="at_load")


def test_a_float_checkpoint_is_quantized_and_dequantized() -> None:
    per_call, at_load = (qi.load(FIXTURES / "base", scheme="mxfp4", emulation=e) for e in ("per_call", "at_load"))
    assert torch.equal(logits(at_load), logits(per_call))
