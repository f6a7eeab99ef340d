"""Whole models of transformers: how often each rule matches, and that no activation is quantized twice.

Checkpoints exported by amd-quark, and random models for the schemes of which there is none. Mixtral's and GPT-OSS's
experts are not Linears and stay as they are; their attention is quantized.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quark_inductor as qi
from quark_inductor.lowering.base import provider_names
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.testing import Rewrite, rewrite

FIXTURES = Path(__file__).parent / "fixtures"
LAYERS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Of each model what its configuration has besides, and per layer its quantized Linears and the activations they read.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama": ({}, 7, 4),
    "Qwen3": ({"head_dim": 16}, 7, 4),
    "Mixtral": (EXPERTS, 4, 2),
    "GptOss": ({**EXPERTS, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}, 4, 2),
}
# Of each scheme the rules of its weight, its activation and its quantize.
q, prims = torch.ops.quark_inductor, torch.ops.prims
SCHEMES: dict[str, tuple[str, str, str]] = {
    "mxfp4": ("block_weight", "block_activation", "block_prologue"),
    "ptpc_fp8": ("fp8_weight", "fp8_activation", "fp8_prologue"),
    "ptpc_int8": ("integer_weight", "integer_activation", "integer_prologue"),
    "mxfp4_fp8_token": ("block_weight", "fp8_activation", "fp8_prologue"),
}
CHECKPOINTS = {
    ("Llama", "mxfp4"): "mxfp4",
    ("Llama", "ptpc_fp8"): "ptpc_fp8",
    ("Qwen3", "mxfp4"): "qwen3_mxfp4",
    ("Qwen3", "ptpc_fp8"): "qwen3_ptpc_fp8",
    ("Mixtral", "mxfp4"): "mixtral_mxfp4",
    ("GptOss", "mxfp4"): "gpt_oss_mxfp4",
    ("GptOss", "ptpc_fp8"): "gpt_oss_ptpc_fp8",
}
# All of them in float32, where the numbers tell more; the checkpoints in bfloat16, too, as they are stored.
CASES = [
    *((name, scheme, torch.float32) for name in MODELS for scheme in SCHEMES),
    *((name, scheme, torch.bfloat16) for name, scheme in CHECKPOINTS),
]
IDS = torch.arange(10).view(2, 5)  # more tokens than the window of GPT-OSS's checkpoint has


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


def quantized(name: str, scheme: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A model, and its logits of token ids."""
    import transformers

    if (name, scheme) in CHECKPOINTS:
        model: Any = qi.load(FIXTURES / CHECKPOINTS[name, scheme], dtype=dtype)
    else:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name][0])
        model = qi.quantize_(getattr(transformers, f"{name}ForCausalLM")(config).eval(), scheme)
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert (model.dtype, model.config.num_hidden_layers) == (dtype, LAYERS)

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False).logits
        return result

    return model, logits


def quantizes(done: Rewrite) -> int:
    """How often an activation is quantized in the graph."""

    def to_byte(node: Any) -> bool:
        val = node.meta.get("val")
        cast = node.target is prims.convert_element_type.default and isinstance(val, Tensor)
        return cast and val.dtype in (torch.int8, torch.float8_e4m3fn)

    calls = [n for n in done.after.nodes if n.op == "call_function"]
    return sum(n.target is q.block_quantize.default or to_byte(n) for n in calls)


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES, ids=str)
def test_every_linear_is_fused(name: str, scheme: str, dtype: torch.dtype) -> None:
    model, logits = quantized(name, scheme, dtype)
    linears = MODELS[name][1] * LAYERS
    assert sum(isinstance(m, QuarkLinear) for m in model.modules()) == linears
    done = rewrite(logits, IDS)
    assert {rule: done.matches.get(rule) for rule in SCHEMES[scheme]} == dict.fromkeys(SCHEMES[scheme], linears)
    assert done.fused == {"prologue_gemm": linears}
    assert (done.refusals, done.result.left) == ((), ())
    named = {n for n, m in model.named_modules() if isinstance(m, QuarkLinear)}
    assert {linear.layer.removeprefix("model.") for linear in done.result.linears} == {
        n.removeprefix("model.") for n in named
    }
    expected = logits(IDS)
    # The same float32 products; those of the experts are added up in another order. The graph rounds to bfloat16 where
    # eager code does, which hides that but for a number halfway between two: one step of the largest logit.
    atol = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps * expected.abs().max().item()
    if scheme == "ptpc_int8" and MODELS[name][0].get("num_local_experts"):
        # Its scale, amax / 127.5, puts a row's negative maximum on a tie: the last bit of the row before decides if
        # its code is -128 or -127, a 128th of what it stands for.
        atol = expected.abs().max().item() / 128
    torch.testing.assert_close(done.output, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES, ids=str)
def test_no_activation_is_quantized_twice(name: str, scheme: str, dtype: torch.dtype, materialized: str) -> None:
    """q, k and v read one activation, gate and up another."""
    _, logits = quantized(name, scheme, dtype)
    done = rewrite(logits, IDS, options={"quark.provider": materialized})
    _, linears, activations = MODELS[name]
    assert done.fused["quantized_gemm"] == linears * LAYERS
    assert quantizes(done) == activations * LAYERS
    assert done.refusals == ()
    assert {refusal.reason for refusal in done.result.left} == {
        f"prologue_gemm: {', '.join(provider_names()[:-2])}: option quark.provider is 'materialized'; "
        "prologue_gemm: materialized: has no prologue"
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_linears_are_one_gemm(scheme: str) -> None:
    model, logits = quantized("Llama", scheme)
    before = logits(IDS)
    found = qi.merge_shared_input_(model)
    # Weights are packed by 64 channels; the keys and values of the random models have 32.
    narrow = "[64, 32, 32] output features are packed by 64, which must divide them"
    checkpoint = ("Llama", scheme) in CHECKPOINTS
    assert list(found.values()) == ["" if checkpoint else narrow, ""] * LAYERS
    assert torch.equal(logits(IDS), before)
    done = rewrite(logits, IDS)
    # q, k and v, or each of them; o; gate and up; down.
    assert done.fused == {"prologue_gemm": (4 if checkpoint else 6) * LAYERS}
    torch.testing.assert_close(done.output, before, rtol=0, atol=1e-6)
