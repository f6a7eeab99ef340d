"""A norm, a quantized Linear with its bias, and an activation, from the module to the kernels of a GPU.

The rules run as they would there: what the GEMM quantizes and what its producer does, who gets which kernel.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

import quark_inductor as qi
from quark_inductor.backend import compile_graph, split_options
from quark_inductor.lowering import target
from quark_inductor.lowering.base import forcing
from quark_inductor.patterns._inductor import graphs_not_cached
from quark_inductor.patterns.late_decomposition import late_decomposition
from quark_inductor.patterns.pipeline import collect_results
from quark_inductor.schemes.base import QuarkLinear

FIXTURES = Path(__file__).parents[2] / "fixtures"


class Layer(nn.Module):
    """RMS norm, Linear, silu, and a residual."""

    def __init__(self, scheme: str, k: int, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(k, dtype=torch.bfloat16, elementwise_affine=True)
        linear = nn.Sequential(nn.Linear(k, n, dtype=torch.bfloat16))
        calibration = [torch.randn(7, k, dtype=torch.bfloat16)]
        self.linear = qi.quantize_(linear, scheme, exclude=(), calibration=calibration)
        for part in self.linear.modules():
            if isinstance(part, QuarkLinear):
                part.unpack_()  # as it is on a GPU
        self.requires_grad_(False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.silu(self.linear(self.norm(x))) + residual


class Lowered:
    """What the rules make of a layer on a GPU, the graph that Inductor would lower there, and its inputs."""

    def __init__(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], arch: str, monkeypatch: pytest.MonkeyPatch, **options: Any
    ) -> None:
        own, theirs = split_options(None, options)

        def inner(gm: torch.fx.GraphModule, example_inputs: Any, **unused: Any) -> Callable[..., Any]:
            self.graph = Graph()
            self.graph.output(self.graph.graph_copy(gm.graph, {}))
            with forcing(own.provider):
                late_decomposition(self.graph)

            def run(*arguments: Tensor) -> Any:
                self.inputs = list(arguments)
                return gm(*arguments)

            return run

        def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
            return compile_graph(gm, example_inputs, own, theirs, inner_compile=inner)

        gpu = target.Target(device_type="cuda", arch=arch)
        torch._dynamo.reset()
        with monkeypatch.context() as patch, torch.no_grad(), graphs_not_cached(), collect_results() as results:
            patch.setattr(target, "current", lambda device_type="cpu": gpu)
            torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)(*inputs)
        (self.result,) = results


def kernels(code: str) -> list[str]:
    """What runs, in order: ``"gemm"``, ``"quantize"``, ``"plain"`` and calls of libraries."""
    found = []
    for name, source, call in re.findall(
        r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str|^ +(extern_kernels\.\w+)\(",
        code,
        re.MULTILINE | re.DOTALL,
    ):
        template = "@triton_heuristics.template" in source
        kind = "gemm" if "tl.dot" in source else "quantize" if template else "plain"
        found.append(kind if name else call)
    return found


# Kernels with 16 tokens, and with 256: where the GEMM quantizes, and where its producer does.
KERNELS: dict[str, tuple[list[str], list[str]]] = {
    "mxfp4": (["plain", "gemm"], ["plain", "quantize", "gemm"]),
    "nvfp4": (["plain", "gemm"], ["plain", "quantize", "gemm"]),
    "ptpc_int8": (["plain", "gemm"], ["plain", "gemm"]),
    "mxfp4_fp8": (["plain", "gemm"], ["plain", "gemm"]),
    "mxfp4_weight_only": (["plain", "gemm"], ["plain", "gemm"]),
}


@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("arch", ["gfx950", "sm_90"])
def test_kernels_of_a_layer(
    monkeypatch: pytest.MonkeyPatch, generated: ModuleType, fake_gpu: ModuleType, arch: str, scheme: str
) -> None:
    """The norm is one kernel; bias, silu and residual are part of the GEMM's."""
    layer = Layer(scheme, 256, 16384)
    for tokens, expected in zip((16, 256), KERNELS[scheme], strict=True):
        inputs = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 16384).bfloat16()
        done = Lowered(layer, inputs, arch, monkeypatch)
        code = fake_gpu.gpu_code(done.graph, arch)
        assert [linear.provider for linear in done.result.linears] == ["triton"]
        assert done.result.unfused == ()
        assert kernels(code) == expected


def test_a_library_gets_many_tokens(monkeypatch: pytest.MonkeyPatch, fake_gpu: ModuleType) -> None:
    """FP8 by FP8; with few the kernel is ours, which quantizes."""
    layer = Layer("fp8", 256, 16384)
    for tokens, provider in ((16, "triton"), (256, "scaled_mm")):
        inputs = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 16384).bfloat16()
        done = Lowered(layer, inputs, "sm_90", monkeypatch)
        code = fake_gpu.gpu_code(done.graph, "sm_90")
        assert [linear.provider for linear in done.result.linears] == [provider]
        assert ("extern_kernels._scaled_mm" in kernels(code)) == (provider == "scaled_mm")


def in_interpreter(interpreter: Any) -> Callable[..., None]:
    """What ``generated.call`` runs kernels by."""

    def run_kernel(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        for name, tensor in interpreter.run(kernel.interpreted, kernel.name, arguments, grid).items():
            if name.startswith(("out_ptr", "in_out_ptr", "arg_CODES")):
                arguments[name].copy_(tensor)

    return run_kernel


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "ptpc_fp8", "int8", "uint4_wo_128", "mxfp8"])
@pytest.mark.parametrize(("arch", "tokens"), [("gfx950", 3), ("gfx942", 70), ("sm_90", 70), ("sm_100", 3)])
def test_the_emulations_numbers(
    monkeypatch: pytest.MonkeyPatch,
    interpreter: Any,
    generated: ModuleType,
    fake_gpu: ModuleType,
    arch: str,
    tokens: int,
    scheme: str,
) -> None:
    """All kernels in the interpreter, but for what a library computes. Codes are those of eager code."""
    layer = Layer(scheme, 256, 96)
    x, residual = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 96).bfloat16()
    expected = layer(x, residual)

    options = {"emulate_precision_casts": True}
    done = Lowered(layer, (x, residual), arch, monkeypatch, **options, **{"quark.provider": "triton"})
    with forcing("triton"):
        code = fake_gpu.gpu_code(done.graph, arch, **options)
    assert [linear.provider for linear in done.result.linears] == ["triton"]
    (y,) = generated.call(code, done.inputs, in_interpreter(interpreter))
    # What rounding the product to bfloat16 once more or less leaves of a sum of 256.
    error = (y.float() - expected.float()).norm() / expected.float().norm()
    assert error < 2.0**-8, float(error)


class Experts(nn.Module):
    """The experts of a fixture's first layer, as they are on a GPU, with the routing that the fixture has."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.experts = qi.load(FIXTURES / name).get_submodule("model.layers.0.mlp.experts")
        self.experts.ungroup_()
        for part in self.modules():
            if isinstance(part, QuarkLinear):
                part.unpack_()
        self.experts.group_()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, index, weights)
        return y


# As many rows that an expert's GEMM quantizes its own, and more.
FEW, MANY = 3, 70
EXPERTS_BY_DEFAULT = {
    ("moe_gpt_oss_mxfp4", "gfx950", FEW),
    ("moe_qwen3_mxfp4", "sm_90", MANY),
    ("moe_qwen3_nvfp4", "sm_100", MANY),
    ("moe_mixtral_ptpc_fp8", "gfx942", MANY),
    ("moe_qwen3_uint4_wo_32", "sm_120", MANY),
}


def of_experts() -> list[Any]:
    names = sorted(path.name for path in FIXTURES.glob("moe_*"))
    assert {name for name, _, _ in EXPERTS_BY_DEFAULT} <= set(names)
    archs = ("gfx942", "gfx950", "sm_90", "sm_100", "sm_120")
    cases = [(name, arch, tokens) for name in names for arch in archs for tokens in (FEW, MANY)]
    return [pytest.param(*c, marks=[] if c in EXPERTS_BY_DEFAULT else [pytest.mark.fuzz]) for c in cases]


@pytest.mark.parametrize(("name", "arch", "tokens"), of_experts())
def test_experts(
    monkeypatch: pytest.MonkeyPatch,
    interpreter: Any,
    generated: ModuleType,
    fake_gpu: ModuleType,
    name: str,
    arch: str,
    tokens: int,
) -> None:
    """Both projections are one GEMM of all experts, which nobody who knows the routing calls; numbers are eager's."""
    layer = Experts(name)
    generator = torch.Generator().manual_seed(tokens)
    count, hidden = layer.experts.count, layer.experts.experts[0].down.out_features
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weights, index = torch.rand(tokens, count, generator=generator).bfloat16().topk(2)
    index[index == 1] = count  # one is not hit, and some rows are nobody's
    expected = layer(x, index, weights)
    options = {"emulate_precision_casts": True}
    done = Lowered(layer, (x, index, weights), arch, monkeypatch, **options, **{"quark.provider": "triton"})
    with forcing("triton"):
        code = fake_gpu.gpu_code(done.graph, arch, **options)
    found = [(linear.provider, linear.problem.grouped, linear.partly) for linear in done.result.linears]
    assert found == [("triton", True, False)] * 2
    assert kernels(code).count("gemm") == 2
    (y,) = generated.call(code, done.inputs, in_interpreter(interpreter))
    error = (y.float() - expected.float()).norm() / expected.float().norm()
    assert error < 2.0**-8, float(error)
