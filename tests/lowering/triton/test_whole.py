"""The other ways to a GEMM that ``max_autotune`` measures: on CPU, where they can be measured, by its kernels."""

from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._inductor import config, ir
from torch._inductor.utils import run_and_get_code

from quark_inductor.lowering._inductor import expand, realized_inputs, select_choice
from quark_inductor.lowering.base import GemmProblem, No, Provider, forcing, register_provider, unregister_provider
from quark_inductor.lowering.cpp import Cpp
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton import template, whole

q = torch.ops.quark_inductor


@pytest.fixture
def measured() -> Iterator[list[str]]:
    """A provider for CPU that chooses as ``triton`` does; the names of the choices it had."""
    names: list[str] = []

    @register_provider
    class Measured(Provider):
        name = "measured"

        def can_run(self, target: Target, problem: GemmProblem) -> No | None:
            return Cpp().can_run(target, problem)

        def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
            if problem.op != "prologue_gemm" or not config.max_autotune:
                return Cpp().lower(target, problem, args)
            tensors = {name: a for name, a in args.items() if a is not None and not isinstance(a, str | int)}
            size = [tensors["x"].get_size()[0], problem.n]
            if "bias" in tensors:
                tensors["bias"] = expand(tensors["bias"], size)
            nodes = dict(zip(tensors, realized_inputs(tensors, ["bias"]), strict=True))
            # Of the op, and so not the order of its arguments.
            if "bias" in nodes:
                nodes["bias"] = nodes.pop("bias")
            layout = ir.FixedLayout(nodes["x"].get_device(), tensors["x"].get_dtype(), size)
            choices = whole.choices(target, problem, nodes, layout, splits=True)
            names.extend(choice.name for choice in choices)
            return select_choice("measured", choices, list(nodes.values()), layout)

    yield names
    unregister_provider(Measured.name)


@pytest.mark.fuzz
@pytest.mark.parametrize(("format", "bias"), [("mxfp4", True), ("fp8_e4m3", False)])
def test_each_way_gives_the_product(measured: list[str], format: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    added = torch.randn(40, generator=generator).bfloat16() if bias else None
    if format == "mxfp4":
        weight = torch.randint(0, 256, (40, 32), generator=generator, dtype=torch.uint8)
        scale, rule = torch.full((40, 2), 122, dtype=torch.uint8), "even"
    else:
        weight = torch.randn(40, 64, generator=generator).to(torch.float8_e4m3fn)
        scale, rule = torch.rand(40, generator=generator).bfloat16(), "amax"

    def gemm(x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None) -> Tensor:
        y: Tensor = q.prologue_gemm(x, None, None, None, weight, scale, None, None, added, format, rule, 0, format)
        return y

    options = {"max_autotune": True, "quark.provider": "measured"}
    compiled = torch.compile(gemm, backend="quark", fullgraph=True, dynamic=False, options=options)
    y, _ = run_and_get_code(compiled, x, weight, scale, added)
    assert [name.rpartition("_")[0] for name in measured] == ["quark_quantize_then_gemm", "quark_split_k"]
    # Both round a float32 sum, and the operands of FP8 products, in some order.
    torch.testing.assert_close(y, gemm(x, weight, scale, added), rtol=2**-6, atol=2**-3)


def test_what_is_measured_on_a_gpu(generated: ModuleType, fake_gpu: ModuleType) -> None:
    """Tiles that do not split K, quantizing before, and splitting."""
    seen: list[list[str]] = []
    x, weight = torch.randn(5, 4096).bfloat16(), torch.zeros(96, 2048, dtype=torch.uint8)
    scale, bias = torch.zeros(96, 128, dtype=torch.uint8), torch.zeros(96).bfloat16()

    def gemm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (q.prologue_gemm(x, None, None, None, weight, scale, None, None, bias, "mxfp4", "even", 0, "mxfp4"),)

    def first(name: str, choices: list[Any], inputs: Any, layout: Any, made: Any) -> Any:
        seen.append([choice.name for choice in choices])
        return select_choice(name, choices[:1], inputs, layout)

    def named(name: str, *rest: Any) -> SimpleNamespace:
        return SimpleNamespace(name=f"{name}_0")

    # Inductor traces those graphs for a GPU that must be there.
    without_a_gpu = patch.object(whole, "subgraph_choice", named)
    with forcing("triton"), without_a_gpu, patch.object(template, "select_choice", first):
        graph = generated.graph_of(gemm, x, weight, scale, bias).graph
        code = fake_gpu.gpu_code(graph, "sm_90", max_autotune=True)
    assert [kernel.kind for kernel in generated.kernels(code)] == ["template"]
    (names,) = seen
    assert len([name for name in names if name.startswith("triton_quark_prologue_gemm")]) >= 3
    assert [name.rpartition("_")[0] for name in names[-2:]] == ["quark_quantize_then_gemm", "quark_split_k"]
