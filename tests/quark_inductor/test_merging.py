"""``merge_shared_input_``: one GEMM for Linears that read one activation, and no number changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.testing import rewrite


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


class Attention(nn.Module):
    """Three Linears of one input, used differently."""

    def __init__(self, k: int = 128, widths: tuple[int, int, int] = (256, 128, 128), bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(k, n, bias=bias) for n in widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x) + 1, self.k_proj(x).relu(), self.v_proj(x) * 2], -1)


def attention(scheme: str, **sizes: object) -> nn.Module:
    torch.manual_seed(0)
    model = Attention(**sizes)  # type: ignore[arg-type]
    return qi.quantize_(model, scheme, exclude=(), calibration=[torch.randn(5, model.q_proj.in_features)])


MERGED = ("mxfp4", "mxfp4_fp8", "nvfp4", "amdfp4", "ptpc_fp8", "fp8_block128", "ptpc_int8", "int8_wo_128", "int4_wo_32")


@pytest.mark.parametrize("scheme", MERGED)
def test_one_gemm_and_the_same_numbers(scheme: str) -> None:
    model, x = attention(scheme), torch.randn(2, 3, 128)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(x)
    assert qi.merge_shared_input_(model) == {"{q_proj,k_proj,v_proj}": ""}
    assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, p in before.items():
        assert p.dtype == after[name].dtype
        assert torch.equal(p.flatten().view(torch.uint8), after[name].contiguous().flatten().view(torch.uint8)), name
    done = rewrite(model, x)
    assert sum(done.fused.values()) == 1
    (linear,) = done.result.linears
    assert linear.shape == (512, 128)
    # Interpreted, the wide product is that of the same rows in another GEMM: sums of 128 products in float32.
    torch.testing.assert_close(done.output, expected, rtol=2**-18, atol=2**-14)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_scale_per_tensor_is_not_merged(scheme: str) -> None:
    """One scale for all would change numbers."""
    model = attention(scheme)
    (reason,) = qi.merge_shared_input_(model).values()
    assert reason == "weight_scale is not the same for all of them, and the scheme has one for a Linear"
    assert all(m.merged is None for m in model.modules() if isinstance(m, QuarkLinear))
    assert rewrite(model, torch.randn(3, 128)).fused == {"prologue_gemm": 3}


def test_only_what_is_quantized_and_alike() -> None:
    torch.manual_seed(0)
    model = qi.quantize_(Attention(), {"k_proj": "mxfp4", "v_proj": "mxfp4"}, exclude=())
    assert qi.merge_shared_input_(model) == {"{q_proj,k_proj,v_proj}": "one of them is not quantized"}
    other = qi.quantize_(Attention(), {"q_proj": "mxfp4", "*": "ptpc_fp8"}, exclude=())
    assert qi.merge_shared_input_(other) == {"{q_proj,k_proj,v_proj}": "they are of 2 kinds, or dequantized at load"}


def test_no_byte_is_held_twice() -> None:
    model = attention("mxfp4")
    qi.merge_shared_input_(model)
    weights = [m.weight_packed for m in model.modules() if isinstance(m, QuarkLinear)]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(w.numel() for w in weights)


def test_moving_undoes_it() -> None:
    model = attention("mxfp4")
    qi.merge_shared_input_(model)
    model.to("cpu")
    assert all(m.merged is None for m in model.modules() if isinstance(m, QuarkLinear))
    assert rewrite(model, torch.randn(3, 128)).fused == {"prologue_gemm": 3}


def test_saved_as_if_it_were_not_merged(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    torch.manual_seed(0)
    model = qi.quantize_(LlamaForCausalLM(config), "mxfp4")
    qi.save(model, tmp_path / "apart")
    assert len(qi.merge_shared_input_(model)) == 2
    qi.save(model, tmp_path / "merged")
    apart, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "merged"))
    assert apart.keys() == merged.keys()
    assert all(torch.equal(t.view(torch.uint8), merged[name].view(torch.uint8)) for name, t in apart.items())


def test_the_report_names_the_first() -> None:
    model = attention("mxfp4")
    qi.merge_shared_input_(model)
    report = qi.explain(model, torch.randn(3, 128))
    assert [(r.name, r.shape, r.fused) for r in report.linears] == [("q_proj", (512, 128), True)]
