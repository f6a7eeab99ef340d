"""Inductor's code for a GPU that is not there: Triton kernels are generated, neither compiled nor run.

Four names of torch's stand in for the driver, and are put back. Needs the ``triton`` package; a torch that is built for
CPU only will do.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import config, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton

from quark_inductor.lowering import target

GPU = torch.device("cuda:0")
# Those of an H100.
PROPERTIES = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


@contextlib.contextmanager
def fake_gpu(arch: str | None = None) -> Iterator[None]:
    """Inside, Inductor finds a GPU, as far as it asks to generate code; our lowerings one of an architecture."""
    properties = SimpleNamespace(major=9, minor=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(scheduler, "has_triton", lambda *args: True))
        stack.enter_context(patch.object(_triton, "triton_hash_with_backend", lambda: ""))
        stack.enter_context(patch.object(DeviceProperties, "create", lambda device: PROPERTIES))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda *args: properties))
        if arch is not None:
            found = target.Target(device_type="cuda", arch=arch)
            stack.enter_context(patch.object(target, "current", lambda device_type="cpu": found))
        yield


def gpu_code(graph: Graph, arch: str | None = None, **options: Any) -> str:
    """The Python module that Inductor would compile and call.

    Args:
        graph: what Inductor lowers: after all its passes. Traced on CPU (which decides nothing here: the graphs of
            producers and quantizes are the same), with static shapes.
        arch: whose kernels our lowerings make; by default they find no GPU.
        **options: of ``torch._inductor.config``.
    """
    on_gpu, inputs = Graph(), []
    on_gpu.output(on_gpu.graph_copy(graph, {}))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    no_workers = {"compile_threads": 1}  # nothing is compiled
    with fake_gpu(arch), mode, V.set_fake_mode(mode), config.patch({**no_workers, **options}), DebugContext():
        for node in on_gpu.nodes:
            moved = map_aggregate((node.args, node.kwargs), lambda a: GPU if isinstance(a, torch.device) else a)
            node.args, node.kwargs = moved  # type: ignore[misc, assignment]
            if node.op == "placeholder":
                val = node.meta["val"]
                inputs.append(torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=GPU))
        module = GraphModule({}, on_gpu)
        FakeTensorProp(module, mode=mode).propagate(*inputs)
        lowering = GraphLowering(module, inputs, shape_env=mode.shape_env, is_inference=True, graph_id=0)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code: str = lowering.codegen()[0].value
    return code
