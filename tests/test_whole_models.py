"""Whole models of transformers: how often each rule matches, and that no activation is quantized twice.

Checkpoints exported by amd-quark, and random models for the schemes of which there is none. Of Mixtral and GPT-OSS the
attention is quantized, and the experts, too, in checkpoints of their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

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
        float_model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        model = qi.quantize_(float_model, scheme, exclude=("lm_head", "*.experts.*"))
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
        f"prologue_gemm: {', '.join(provider_names()[:-2])}: option quark.provider is 'materialized': leave it out "
        "to ask all; prologue_gemm: materialized: has no prologue"
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


# --- experts and all

MOE = sorted(path.name for path in FIXTURES.glob("moe_*"))
# Of each model one, and of each way to quantize an activation.
QUICK = {"moe_gpt_oss_mxfp4_fp8", "moe_mixtral_fp8", "moe_qwen3_nvfp4", "moe_qwen3_uint4_wo_32"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MOE])
def test_every_linear_and_every_expert_is_fused(name: str) -> None:
    """Of a layer four Linears of attention, and two projections of all experts."""
    model: Any = qi.load(FIXTURES / name)
    layers = model.config.num_hidden_layers
    done = rewrite(lambda ids: model(input_ids=ids, use_cache=False).logits, IDS)
    op = "weight_only_gemm" if name.endswith(("weight_only", "wo_32")) else "prologue_gemm"
    assert done.fused == {op: 6 * layers}
    assert done.matches["grouped_linear"] == 2 * layers
    assert (done.refusals, done.result.left) == ((), ())
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    expected_names = {f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts}
    assert {linear.layer for linear in done.result.linears} == expected_names
    assert all(linear.fused for linear in done.result.linears)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    # One step of the largest logit, see above.
    atol = torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(done.output, expected, rtol=0, atol=atol)


# The others, which are rewritten above, are behind the marker of what takes long.
SOME_MOE = ("moe_qwen3_mxfp4",)


def numbers(name: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in load_file(FIXTURES / name / "reference.safetensors").items()}


def test_compiled_experts_give_amd_quarks_numbers() -> None:
    """Of three experts a token, whose order and dtype of the sum matter."""
    name, path = "moe_qwen3_mxfp4", "model.layers.0.mlp.experts"
    module, held = qi.load(FIXTURES / name).get_submodule(path), numbers(name)
    args = [held[f"{path}.{part}"] for part in ("input", "top_k_index", "top_k_weights")]
    if not torch.equal(module(*args), held[f"{path}.output"]):
        pytest.skip("this CPU adds up in another order than the one of the fixtures")
    options = {"emulate_precision_casts": True}
    compiled = torch.compile(module, backend="quark", fullgraph=True, options=options)
    assert torch.equal(compiled(*args), held[f"{path}.output"])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SOME_MOE else pytest.mark.fuzz) for name in MOE],
)
def test_a_compiled_model_for_prefill_and_decode(name: str) -> None:
    """Within one step of bfloat16 at the largest logit: kernels add up float32 products in another order."""
    model: Any = qi.load(FIXTURES / name)
    held = numbers(name)
    assert held["logits"].dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 16, (1, count), generator=generator) for count in (40, 1, 7)]
    options = {"emulate_precision_casts": True}
    compiled = torch.compile(model, backend="quark", fullgraph=True, dynamic=True, options=options)
    with torch.inference_mode():
        for ids in (*prompts, held["ids"]):
            expected, logits = model(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
            atol = torch.finfo(expected.dtype).eps * expected.abs().max().item()
            torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    # One for any number of tokens, and one that knows that it is 1.
    assert counters["stats"]["unique_graphs"] == 2
