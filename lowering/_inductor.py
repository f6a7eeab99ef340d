"""Every private Inductor name the lowerings use, and what differs between torch 2.11 and 2.13. Imported lazily."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

# First: it and cpp_gemm_template import each other, and only this order works.
import torch._inductor.lowering  # noqa: F401  isort: skip

from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import counters, dynamo_timed
from torch._inductor import config, ir
from torch._inductor.codegen import cpp
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateCaller, CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.codegen.subgraph import SubgraphTemplate
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import MemoryDep
from torch._inductor.lowering import (
    add,
    empty_strided,
    expand,
    fallback_handler,
    lowerings,
    register_lowering,
    sum_,
    to_dtype,
    view,
)
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.utils import Placeholder, parallel_num_threads, sympy_index_symbol
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "DTYPE_TO_CPP",
    "CppTemplate",
    "CppTemplateCaller",
    "CppTemplateKernel",
    "Placeholder",
    "SymbolicGridFn",
    "TritonTemplate",
    "V",
    "add",
    "called",
    "check_all_epilogues",
    "config",
    "contiguous",
    "counters",
    "empty",
    "expand",
    "gen_2d_view_of_epilogue_buf",
    "get_export_declaration",
    "ir",
    "lowered",
    "ops",
    "parallel_num_threads",
    "realized_inputs",
    "register_lowering",
    "select_choice",
    "static_size",
    "subgraph_choice",
    "sum_",
    "sympy_index_symbol",
    "timed",
    "to_dtype",
    "view",
]


def timed(name: str) -> AbstractContextManager[Any]:
    """What torch's own records of a compilation show under a name of ours. Costs some 20 microseconds."""
    return dynamo_timed(f"quark.{name}")


def realized_inputs(nodes: Mapping[str, Any], strided: Sequence[str] = ()) -> list[Any]:
    """The nodes realized as buffers, each of its own, which a template can take a pointer of.

    A kernel gets a buffer's beginning, and each buffer once: a part that begins elsewhere, or a buffer that is given
    for a second argument, is copied.

    Args:
        nodes: Inductor IR by name.
        strided: names of those that may have any strides; the others are made contiguous.
    """
    found: list[Any] = []
    for name, given in nodes.items():
        realized = realize_inputs(given)
        node = realized if name in strided else ir.ExternKernel.require_contiguous(realized)
        elsewhere = node.get_layout().offset != 0 or node.get_name() in {f.get_name() for f in found}
        found.append(ir.ExternKernel.copy_input(node) if elsewhere else node)
    return found


def contiguous(node: Any) -> Any:
    """The node realized as a contiguous buffer."""
    realized = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))
    return realized if isinstance(realized, ir.TensorBox) else ir.TensorBox(realized)


def empty(size: Sequence[Any], dtype: Any, device: Any) -> Any:
    """A contiguous buffer that nothing is written to yet: a template writes it that has it among its mutated inputs."""
    return empty_strided(size, None, dtype=dtype, device=device)


def lowered(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What Inductor's own lowering of an aten op makes of IR nodes."""
    return lowerings[op](*args, **kwargs)


def called(op: Any, *args: Any) -> Any:
    """The IR node of a call of an op as it is. Tensors must have the strides that the op wants."""
    return fallback_handler(op, add_to_fallback_set=False)(*args)


def select_choice(
    name: str,
    choices: list[Any],
    inputs: Sequence[Any],
    layout: Any,
    made: Mapping[int, Callable[[Any], Any]] | None = None,
) -> Any:
    """The IR node of the best choice; ``made``: what to measure it with, of inputs that cannot be random, by place."""
    result = autotune_select_algorithm(name, choices, list(inputs), layout, input_gen_fns=made)
    return result[0] if isinstance(result, tuple) else result  # torch 2.11 gives the node, 2.12 a (node, choice)


def subgraph_choice(name: str, inputs: Sequence[Any], layout: Any, function: Callable[..., Any]) -> Any:
    """A choice that computes a function of tensors as a graph of its own, in which nothing more is measured."""

    def graph(*tensors: Any) -> Any:
        with V.fake_mode:  # what the function creates must be fake too
            return make_fx(function, select_decomp_table())(*tensors)

    with enable_python_dispatcher():
        choice = SubgraphTemplate(name).generate(name, list(inputs), layout, graph)
    choice.config_patches = {"max_autotune": False, "max_autotune_gemm": False}
    return choice


def check_all_epilogues() -> None:
    """The graph that is being lowered is scheduled with a check of all epilogues of a C++ template.

    A template writes its tile where the last epilogue's result is, as if that had the template's own order. So each
    epilogue must write where it reads. Inductor (torch 2.11 to 2.13; pytorch pull request 135661) only asks that of
    those that read the template's buffer: of ``gelu(transpose(silu(gemm)))`` the second, which reads the first, is
    fused too, and its numbers land in the wrong places.
    """
    graph: Any = V.graph
    if "_update_scheduler" in vars(graph):
        return  # done for another GEMM of it
    schedule = graph._update_scheduler

    def checked() -> None:
        with patch.object(cpp, "template_fusion_with_epilogues_supported", _supported):
            schedule()

    graph._update_scheduler = checked


_inductors_check = cpp.template_fusion_with_epilogues_supported


def _supported(template: Any, epilogues: list[Any]) -> tuple[bool, bool]:
    """Whether epilogues may be fused, and all read and write alike: as Inductor's function of the longer name."""
    nodes = [node.node for epilogue in epilogues for node in epilogue.get_nodes() if node.node is not None]
    written = {buffer.get_name() for node in (template, *epilogues) for buffer in node.get_outputs()}
    for node in nodes:
        accesses = node.get_read_writes()
        read = [dep for dep in accesses.reads if dep.name in written]
        if not all(isinstance(dep, MemoryDep) for dep in read):
            return False, False
        if any(dep.index != write.index for dep in read for write in accesses.writes):
            return False, False
    supported: tuple[bool, bool] = _inductors_check(template, epilogues)
    return supported


def static_size(expr: Any) -> int | None:
    """A size as an int, or ``None`` if it is symbolic."""
    return int(expr) if getattr(expr, "is_number", True) else None
