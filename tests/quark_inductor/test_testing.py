"""``quark_inductor.testing``: what users test their rewrites with."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import NotFusedError, OptionError, QuarkInductorError
from quark_inductor.testing import assert_fused, assert_not_fused, graph_text, rewrite

README = Path(__file__).parents[2] / "README.md"


def linear(scheme: str, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(2)
    return qi.quantize_(nn.Sequential(nn.Linear(64, 48, bias=bias)), scheme, exclude=())


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(4))


def test_a_fused_linear() -> None:
    model = linear("mxfp4")
    done = rewrite(model, x())
    assert_fused(done)
    assert_fused(done, block_weight=1, block_activation=1, block_prologue=1, fp8_weight=0)
    assert {rule: count for rule, count in done.matches.items() if rule.startswith("block")} == {
        "block_weight": 1,
        "block_activation": 1,
        "block_prologue": 1,
    }
    assert done.fused == {"prologue_gemm": 1}
    assert done.refusals == ()
    # The emulation, up to the order of a sum of 64 products.
    assert torch.allclose(done.output, model(x()), rtol=0, atol=64 * 2.0**-24 * 64)


def test_the_graphs_are_golden() -> None:
    done = rewrite(linear("mxfp4", bias=False), x())
    assert_expected_inline(
        done.before_text,
        """\
%0 = placeholder() : float32[3, 64]
%1 = placeholder() : uint8[1, 2, 1088]
%2 = quark_inductor.unpack_weight(%1, 'panel64', 'mxfp4', [48, 32], False)
%3 = getitem(%2, 0) : uint8[48, 32]
%4 = getitem(%2, 1) : uint8[48, 2]
%5 = aten.view(%0, [-1, 64]) : float32[3, 64]
%6 = quark_inductor.block_quantize(%5, 'mxfp4', 'even')
%7 = getitem(%6, 0) : uint8[3, 32]
%8 = getitem(%6, 1) : uint8[3, 2]
%9 = quark_inductor.block_dequantize(%7, %8, 'mxfp4', 'float32') : float32[3, 64]
%10 = quark_inductor.block_dequantize(%3, %4, 'mxfp4', 'float32') : float32[48, 64]
%11 = aten.permute(%10, [1, 0]) : float32[64, 48]
%12 = aten.mm(%9, %11) : float32[3, 48]
%13 = aten.view(%12, [3, 48]) : float32[3, 48]
return %13
""",
    )
    assert_expected_inline(
        done.after_text,
        """\
%0 = placeholder() : float32[3, 64]
%1 = placeholder() : uint8[1, 2, 1088]
%2 = quark_inductor.prologue_gemm(%0, None, None, None, %1, None, None, None, None, 'mxfp4', 'even', 0, 'mxfp4', 'panel64', 48, 32, None) : float32[3, 48]
return %2
""",  # noqa: E501
    )


def test_the_text_is_the_same_again() -> None:
    texts = {rewrite(linear("ptpc_fp8"), x()).after_text for _ in range(3)}
    assert len(texts) == 1


def test_symbolic_sizes_are_symbols() -> None:
    done = rewrite(linear("mxfp4"), x(5), dynamic=True)
    assert_fused(done, block_prologue=1)
    (line,) = [line for line in done.after_text.splitlines() if "prologue_gemm" in line]
    assert re.fullmatch(r"float32\[s\d+, 48\]", line.rpartition(" : ")[2])


def scaled_twice(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What no rule takes: a weight with one factor more."""
    layer = model[0]
    return lambda x: x @ (layer.scheme.dequantize_weight(layer, torch.float32) * 2.0).t()


def test_a_linear_that_no_rule_fuses() -> None:
    done = rewrite(scaled_twice(linear("int8_weight_only")), x())
    refusal = assert_not_fused(done, "no rule")
    assert refusal in done.refusals
    assert done.fused == {}
    with pytest.raises(AssertionError, match=r"(?s)was left to the emulation: no rule.*aten\.mm"):
        assert_fused(done)
    with pytest.raises(AssertionError, match=r"(?s)no refusal says 'bias'.*refused: no rule"):
        assert_not_fused(done, "bias")


def test_assertions_that_fail_show_what_there_is() -> None:
    done = rewrite(linear("mxfp4"), x())
    with pytest.raises(AssertionError, match=r"(?s)block_weight matched 1 times, expected 2.*prologue_gemm\("):
        assert_fused(done, block_weight=2)
    with pytest.raises(AssertionError, match=r"(?s)expected a refusal.*every quantized Linear was fused"):
        assert_not_fused(done)


def test_options_are_those_of_the_backend() -> None:
    done = rewrite(linear("mxfp4"), x(), options={"quark.provider": "emulation"})
    assert assert_not_fused(done, "quark.provider").layer == "0"
    with pytest.raises(NotFusedError):
        rewrite(scaled_twice(linear("int8_weight_only")), x(), options={"quark.strict": True})
    with pytest.raises(OptionError, match=r"quark\.nothing"):
        rewrite(linear("mxfp4"), x(), options={"quark.nothing": 1})


def test_a_users_pass_runs_before_the_graph_is_kept() -> None:
    seen = []
    rewrite(linear("mxfp4"), x(), options={"joint_custom_pre_pass": seen.append})
    assert len(seen) == 1


def test_keyword_arguments() -> None:
    done = rewrite(lambda *, a, b: a @ b, a=x(), b=x().T)
    assert torch.equal(done.output, x() @ x().T)
    assert done.matches == {}
    assert done.refusals == ()


def test_a_function_without_a_graph() -> None:
    with pytest.raises(QuarkInductorError, match="0 graphs"):
        rewrite(lambda: 3)


def test_the_text_of_any_graph() -> None:
    graph = torch.fx.symbolic_trace(lambda a: (a.sum(0), a)).graph
    assert graph_text(graph) == "%0 = placeholder()\n%1 = call_method sum(%0, 0)\nreturn %1, %0\n"


def test_the_readmes_example(tmp_path: Path) -> None:
    """In a process of its own: it registers a rule."""
    block = README.read_text().partition("<!-- rewrite-example -->")[2].partition("<!-- /rewrite-example -->")[0]
    code = block.partition("```python\n")[2].rpartition("```")[0]
    assert len(code.splitlines()) <= 32
    (tmp_path / "test_example.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
