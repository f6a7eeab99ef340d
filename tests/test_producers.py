"""What comes before a quantized Linear and the quantize are one kernel, wherever the quantize is.

Where the GEMM quantizes in its prologue, the producer is a kernel and the GEMM another. Where it does not, the quantize
is plain aten, which Inductor fuses with the producer; but elements that are packed, which it would store as integers
before it packs them, have a kernel of ours on a GPU. Counted in the code that Inductor generates: of kernels that are
never compiled, which takes seconds each.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from torch.fx import Graph

import quark_inductor as qi
from quark_inductor.lowering import target
from quark_inductor.lowering.base import No
from quark_inductor.lowering.providers import triton
from quark_inductor.lowering.target import Target
from quark_inductor.patterns.late_decomposition import late_decomposition
from quark_inductor.testing import rewrite

pytestmark = pytest.mark.usefixtures("fresh")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def add_rms_norm(x: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """And the residual stream, which is read again after the Linear."""
    residual = x + other
    return rms_norm(residual, weight), residual


# Of two activations and a norm's weight: what the Linear reads, and what else is returned.
PRODUCERS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "rms_norm": lambda x, other, weight: (rms_norm(x, weight),),
    "add_rms_norm": add_rms_norm,
    "layer_norm": lambda x, other, weight: (F.layer_norm(x, weight.shape, weight),),
    "silu_mul": lambda x, other, weight: (F.silu(x) * other,),
    "gelu": lambda x, other, weight: (F.gelu(x),),
}
NORMS = {name for name in PRODUCERS if name.endswith("norm")}


class Layer(nn.Module):
    """A producer and the quantized Linear that reads it."""

    def __init__(self, producer: str, scheme: str, k: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.producer = PRODUCERS[producer]
        self.weight = nn.Parameter(torch.ones(k, dtype=torch.bfloat16), requires_grad=False)
        linear = nn.Sequential(nn.Linear(k, 48, dtype=torch.bfloat16))
        calibration = [torch.randn(7, k, dtype=torch.bfloat16)]
        self.linear = qi.quantize_(linear, scheme, exclude=(), calibration=calibration)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        y, *rest = self.producer(x, other, self.weight)
        return self.linear(y), *rest


class Last(CustomGraphPass):  # type: ignore[misc]
    """Keeps the graph that Inductor lowers next."""

    def __call__(self, graph: Graph) -> None:
        self.graph = Graph()
        self.graph.output(self.graph.graph_copy(graph, {}))

    def uuid(self) -> Any:
        return None


@dataclass
class Generated:
    """What Inductor made of a function: the graph it lowered, and the module that calls the kernels."""

    graph: Graph
    code: str

    @property
    def ours(self) -> list[str]:
        """Ops of this package in the graph."""
        names = [str(node.target).split(".") for node in self.graph.nodes]
        return [name[1] for name in names if name[0] == "quark_inductor"]

    @property
    def kernels(self) -> list[str]:
        """The C++ sources, in the order in which they run."""
        sources = re.findall(r"async_compile\.cpp_pybinding\(\[.*?\], r?'''(.*?)'''", self.code, re.DOTALL)
        assert len(sources) == self.code.count("async_compile.cpp_pybinding(")
        return sources

    @property
    def calls(self) -> list[str]:
        """What the module runs besides: ops that are calls of a library."""
        return re.findall(r"^ +.*\b(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", self.code, re.MULTILINE)


def is_gemm(kernel: str) -> bool:
    return "using namespace quark::" in kernel


def writes_codes(kernel: str) -> bool:
    """Whether an output is of 8 bits."""
    return re.search(r"^\s+(at::Float8_e4m3fn|u?int8_t)\* (in_)?out_ptr", kernel, re.MULTILINE) is not None


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Generated]:
    """Compile a layer, all but the kernels: calls of them do nothing."""

    def generated(layer: Layer, *args: Tensor, dynamic: bool, **options: Any) -> Generated:
        last = Last()
        options["post_grad_custom_post_pass"] = last
        compiled = torch.compile(layer, backend="quark", fullgraph=True, dynamic=dynamic, options=options)
        _, (code,) = run_and_get_code(compiled, *args)
        return Generated(last.graph, code)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *args, **kwargs: lambda *arguments: None)
    return generated


def activations(*shape: int) -> tuple[Tensor, Tensor]:
    x: Tensor = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return x[0], x[1]


CPU_SCHEMES = ("fp8", "ptpc_fp8", "ptpc_int8", "mxfp4")


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("scheme", CPU_SCHEMES)
def test_the_gemm_quantizes(generate: Callable[..., Generated], scheme: str, producer: str) -> None:
    done = generate(Layer(producer, scheme, 64), *activations(2, 5, 64), dynamic=True)
    assert done.ours == ["prologue_gemm"]
    assert [is_gemm(kernel) for kernel in done.kernels] == [False, True]
    assert not any(writes_codes(kernel) for kernel in done.kernels)
    assert done.calls == []


@pytest.mark.fuzz
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("scheme", CPU_SCHEMES)
def test_the_producer_quantizes(
    generate: Callable[..., Generated], materialized: str, scheme: str, producer: str
) -> None:
    """One function; inside it Inductor's loops are several, and block formats store elements before they pack them."""
    options = {"quark.provider": materialized}
    done = generate(Layer(producer, scheme, 64), *activations(2, 5, 64), dynamic=True, **options)
    assert done.ours == ["quantized_gemm"]
    assert [is_gemm(kernel) for kernel in done.kernels] == [False, True]
    assert [writes_codes(kernel) for kernel in done.kernels] == [True, False]
    assert done.calls == []


# --- GPU

# Triton kernels of a norm and a quantize, and of a producer without a reduction. One kernel reduces along one thing: a
# norm along rows, a block format along blocks. And it stores each element: the next one packs two into a byte.
# torch 2.11 and 2.13 agree.
TRITON: dict[str, tuple[int, int]] = {
    "fp8": (1, 1),
    "ptpc_fp8": (1, 1),
    "ptpc_int8": (1, 1),
    "fp8_block128": (2, 1),
    "mxfp8": (2, 1),
    "mxfp4": (3, 2),
}
# With torch._inductor.config.triton.nested_reduction, which torch 2.11 does not have, rows are reduced by blocks too.
NESTED = {**TRITON, "fp8_block128": (1, 1), "mxfp8": (1, 1), "mxfp4": (2, 2)}


@pytest.fixture(scope="module")
def fake_gpu() -> Iterator[ModuleType]:
    """``fake_gpu.py``. Tests are no package from which it could be imported."""
    pytest.importorskip("triton", reason="generates Triton code: pip install triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        import fake_gpu

        yield fake_gpu


@pytest.mark.slow
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("scheme", TRITON)
def test_the_producer_quantizes_on_a_gpu(
    generate: Callable[..., Generated], materialized: str, fake_gpu: ModuleType, scheme: str, producer: str
) -> None:
    options = {"quark.provider": materialized}
    done = generate(Layer(producer, scheme, 4096), *activations(64, 4096), dynamic=False, **options)
    assert done.ours == ["quantized_gemm"]
    tables: list[tuple[dict[str, bool], dict[str, tuple[int, int]]]] = [({}, TRITON)]
    if hasattr(config.triton, "nested_reduction"):
        tables = [({"triton.nested_reduction": False}, TRITON), ({"triton.nested_reduction": True}, NESTED)]
    for inductor_options, table in tables:
        code = fake_gpu.gpu_code(done.graph, **inductor_options)
        kernels = re.findall(r"^(triton_\w+) = async_compile\.triton\(", code, re.MULTILINE)
        assert len(kernels) == table[scheme][producer not in NORMS], kernels
        assert Generated(done.graph, code).calls == ["torch.ops.quark_inductor.quantized_gemm.default"]


# Kernels with ours for packed elements, which reads what the producer wrote, in bfloat16. Inductor has as many after a
# producer without a reduction, but writes and reads an int32 an element between them.
OURS = {**TRITON, "mxfp4": (2, 2), "mxfp6_e3m2": (2, 2), "nvfp4": (2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("producer", ["rms_norm", "silu_mul"])
@pytest.mark.parametrize("scheme", OURS)
def test_our_kernel_packs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, materialized: str, fake_gpu: ModuleType, scheme: str, producer: str
) -> None:
    """On a GPU that the kernels know; the GEMM is a call. What Inductor does in one kernel stays plain aten."""
    layer, inputs = Layer(producer, scheme, 4096), activations(64, 4096)
    graph = rewrite(layer, *inputs, dynamic=False, options={"quark.provider": materialized}).after
    monkeypatch.setattr(triton.Triton, "can_run", lambda self, target, problem: No("is not asked for GEMMs here"))
    monkeypatch.setattr(target, "current", lambda device_type="cpu": Target(device_type="cuda", arch="gfx950"))
    with V.set_fake_mode(detect_fake_mode([node.meta["val"] for node in graph.find_nodes(op="placeholder")])):
        late_decomposition(graph)
    ours = OURS[scheme] != TRITON.get(scheme)
    assert ("block_quantize" in Generated(graph, "").ours) == ours
    options = {"triton.nested_reduction": False} if hasattr(config.triton, "nested_reduction") else {}
    code = fake_gpu.gpu_code(graph, arch="gfx950", **options)
    kernels = re.findall(r"^(triton_\w+) = async_compile\.triton\(", code, re.MULTILINE)
    assert len(kernels) == OURS[scheme][producer not in NORMS], kernels
    assert [kernel.startswith("triton_tem") for kernel in kernels] == [False] * (len(kernels) - ours) + [True] * ours
    assert counters["inductor"]["quark.block_quantize.triton"] == ours
    assert Generated(graph, code).calls == ["torch.ops.quark_inductor.quantized_gemm.default"]
