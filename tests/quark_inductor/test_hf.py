"""``register_hf``: transformers' own ``from_pretrained`` and ``save_pretrained`` on Quark checkpoints."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import quark_inductor as qi
from quark_inductor.errors import CheckpointError, ConfigError
from quark_inductor.schemes.base import QuarkLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"
# One of each scheme, and what is stored in other ways: sharded, tied, float32 scales, no zero points, FP8 outputs, and
# experts.
NAMES = [
    *(
        "mxfp4",
        "fp8",
        "ptpc_fp8",
        "nvfp4",
        "amdfp4",
        "int8",
        "int8_wo_128",
        "int4_wo_32",
        "uint4_wo_32_order",
        "int4_fp8",
    ),
    *("mxfp6_e2m3", "mxfp4_fp8", "fp8_block", "fp8_e5m2", "mxfp4_sharded", "mxfp4_tied", "mxfp4_lmhead", "fp8_fp32"),
    *("fp8_float32_scale", "f2f_ptpc_fp8", "f2f_int8_wo_perchannel", "fp8_attn_fp8", "mxfp4_kv_excluded"),
    *("moe_mixtral_fp8", "moe_qwen3_nvfp4", "moe_qwen3_uint4_wo_32", "moe_gpt_oss_mxfp4_fp8"),
]
IDS = torch.arange(12)[None] % 16
CopyOf = Callable[[str], Any]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """And transformers as it was, afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
            patch.setitem(mapping, "quark", mapping["quark"])
        qi.register_hf()
        yield


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def state(model: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_model_that_load_makes(name: str) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(FIXTURES / name)
    ours = qi.load(FIXTURES / name)
    assert state(theirs) == state(ours)
    kinds = {n: type(m.scheme) for n, m in ours.named_modules() if isinstance(m, QuarkLinear)}
    assert kinds == {n: type(m.scheme) for n, m in theirs.named_modules() if isinstance(m, QuarkLinear)} != {}
    assert torch.equal(logits(theirs), logits(ours))
    assert not theirs.training
    assert not any(p.requires_grad for p in theirs.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained_round_trips(name: str, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(FIXTURES / name)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert state(again) == state(model)
    assert state(qi.load(tmp_path)) == state(model)
    for directory in (tmp_path, FIXTURES / name):
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert config == model.config.quantization_config.to_dict()
    if name not in ("mxfp4_sharded", "f2f_int8_wo_perchannel"):  # one file of three; zero points written out
        written, stored = (load_file(d / "model.safetensors") for d in (tmp_path, FIXTURES / name))
        assert {n: (t.dtype, t.shape) for n, t in written.items()} == {n: (t.dtype, t.shape) for n, t in stored.items()}


def test_the_model_may_be_compiled_and_not_be_trained() -> None:
    quantizer = AutoModelForCausalLM.from_pretrained(FIXTURES / "mxfp4").hf_quantizer
    assert quantizer.is_compileable is True
    assert quantizer.is_trainable is False
    assert quantizer.is_serializable() is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int8", "nvfp4"])
def test_dtype_is_that_of_load(name: str, dtype: torch.dtype) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=dtype)
    ours = qi.load(FIXTURES / name, dtype=dtype)
    assert theirs.dtype == dtype
    assert state(theirs) == state(ours)
    assert torch.equal(logits(theirs), logits(ours))


def test_generate_runs_with_a_static_cache() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(FIXTURES / "nvfp4")
    tokens = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(
        tokens, qi.load(FIXTURES / "nvfp4").generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    )


def test_nothing_is_reported_missing_where_zero_points_are_zero(capfd: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained(FIXTURES / "f2f_int8_wo_perchannel")
    assert "MISSING" not in "".join(capfd.readouterr())


# --- what load refuses


def test_static_scales_that_are_not_there() -> None:
    with pytest.raises(CheckpointError, match=r"q_proj\.input_scale is missing"):
        AutoModelForCausalLM.from_pretrained(FIXTURES / "f2f_fp8")


def test_a_missing_tensor(copy_of: CopyOf) -> None:
    """Transformers would give it random numbers and log a warning."""
    checkpoint = copy_of("mxfp4")
    with checkpoint.tensors() as tensors:
        del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    with pytest.raises((CheckpointError, ConfigError), match=r"layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(checkpoint.path)


def test_an_unexpected_tensor(copy_of: CopyOf) -> None:
    checkpoint = copy_of("mxfp4")
    with checkpoint.tensors() as tensors:
        tensors["model.layers.0.mlp.up_proj.weight_scale_2"] = torch.ones(())
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_2"):
        AutoModelForCausalLM.from_pretrained(checkpoint.path)


def test_a_config_that_is_not_understood(copy_of: CopyOf) -> None:
    checkpoint = copy_of("mxfp4")
    with checkpoint.json() as config:
        config["quantization_config"]["global_quant_config"]["weight"]["scale_format"] = "e9m9"
    with pytest.raises(ConfigError, match="e9m9"):
        AutoModelForCausalLM.from_pretrained(checkpoint.path)


def test_a_damaged_scale(copy_of: CopyOf) -> None:
    checkpoint = copy_of("fp8")
    with checkpoint.tensors() as tensors:
        tensors["model.layers.0.mlp.up_proj.weight_scale"].fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj.*NaN"):
        AutoModelForCausalLM.from_pretrained(checkpoint.path)


def test_old_names_are_for_load(copy_of: CopyOf) -> None:
    checkpoint = copy_of("fp8")
    with checkpoint.tensors() as tensors:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name.replace("weight_scale", "weight_quantizer.scale")] = tensors.pop(name)
    with pytest.raises(CheckpointError, match=r"quark_inductor\.load"):
        AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert state(qi.load(checkpoint.path)) == state(qi.load(FIXTURES / "fp8"))


# --- registration


def test_it_takes_one_explicit_call_and_no_amd_quark() -> None:
    """In a process of its own: not imported, not registered."""
    code = """
import importlib.util, sys
from transformers.quantizers import auto
before = auto.AUTO_QUANTIZER_MAPPING["quark"]
import quark_inductor, quark_inductor.loading
assert auto.AUTO_QUANTIZER_MAPPING["quark"] is before
quark_inductor.register_hf()
quark_inductor.register_hf()
assert auto.AUTO_QUANTIZER_MAPPING["quark"].__module__ == "quark_inductor.hf"
sys.modules["quark"] = None  # even if it is installed
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(FIXTURES / "nvfp4")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
