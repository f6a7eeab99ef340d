"""Every private Inductor name the lowerings use, and what differs between torch 2.11 and 2.13. Imported lazily."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from torch._inductor.scheduler import Scheduler
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.utils import Placeholder, parallel_num_threads, sympy_index_symbol
from torch._inductor.virtualized import V, ops
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.schemes.ops import FUSED_OPS, NAMESPACE

__all__ = [
    "DTYPE_TO_CPP",
    "CppTemplate",
    "CppTemplateCaller",
    "CppTemplateKernel",
    "GemmKernel",
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
    "watch_gemms",
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


@dataclass(frozen=True, slots=True)
class GemmKernel:
    """What code was generated for a fused op: a kernel, or a call of a library.

    Attributes:
        node: the fused op in the graph that was lowered.
        epilogue: names of the aten ops that run in the kernel after the GEMM.
        producers: the same of the kernels that compute what it reads, all of them together.
        multiplies: what a C++ template multiplies with, see its ``Kernel``; ``""``: it is none.
    """

    node: Any
    epilogue: tuple[str, ...]
    producers: tuple[str, ...]
    multiplies: str


@contextlib.contextmanager
def watch_gemms(range_of: Callable[[Any], str]) -> Iterator[list[GemmKernel]]:
    """Collect a result for each kernel and library call of a fused op for which code is generated inside.

    Args:
        range_of: of a fused op in a graph, the name of the profiler's range that its Python code shall be in; ``""``:
            none. With ranges, a graph's code is not what it would be without, and must not get into a cache.
    """
    create, extern = Scheduler.create_backend, Scheduler.codegen_extern_call
    found: list[GemmKernel] = []

    def generate(scheduler: Any, node: Any, epilogue: Iterable[Any], code: Callable[[], Any]) -> Any:
        gemm = _fused_op(node.node)
        # A MultiOutput takes a tensor out of what a call gave.
        if gemm is None or isinstance(node.node, ir.MultiOutput):
            return code()
        own = set(node.node.origins)
        after = _ops(o for n in epilogue if n.node is not None for o in n.node.origins if o not in own)
        before = _ops(_origins_of_inputs(scheduler, node))
        if name := range_of(gemm):
            # Cheaper than torch.profiler.record_function by some microseconds, which is what a small GEMM takes.
            V.graph.wrapper_code.writeline(f"quark_range = torch._C._profiler._RecordFunctionFast({name!r})")
            V.graph.wrapper_code.writeline("quark_range.__enter__()")
        result = code()
        if name:
            V.graph.wrapper_code.writeline("quark_range.__exit__(None, None, None)")
        template = getattr(node.node, "template", None)
        found.append(GemmKernel(gemm, after, before, getattr(template, "multiplies", "")))
        return result

    def create_backend(scheduler: Any, device: Any) -> Any:
        backend: Any = create(scheduler, device)
        inner = backend.codegen_template

        def codegen_template(template: Any, epilogue: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            code = functools.partial(inner, template, epilogue, *args, **kwargs)
            # A choice's source, to measure it.
            return code() if kwargs.get("only_gen_src_code") else generate(scheduler, template, epilogue, code)

        backend.codegen_template = codegen_template
        return backend

    def codegen_extern_call(scheduler: Any, node: Any) -> Any:
        return generate(scheduler, node, (), functools.partial(extern, scheduler, node))

    with (
        patch.object(Scheduler, "create_backend", create_backend),
        patch.object(Scheduler, "codegen_extern_call", codegen_extern_call),
    ):
        yield found


def _fused_op(operation: Any) -> Any:
    """The fused op in the graph that a buffer computes; ``None``: it computes something else."""
    # What comes before may be among the origins too: a GEMM's, whose result this reads.
    last = max((o for o in getattr(operation, "origins", ()) if o.op == "call_function"), default=None)
    schema = getattr(last and last.target, "_schema", None)
    namespace, _, op = schema.name.partition("::") if schema is not None else ("", "", "")
    return last if namespace == NAMESPACE and op in FUSED_OPS else None


def _origins_of_inputs(scheduler: Any, node: Any) -> Iterator[Any]:
    """Where the kernels come from that compute what a kernel reads, but for other GEMMs."""
    for read in node.read_writes.reads:
        buffer = scheduler.name_to_buf.get(read.name)
        operation = getattr(buffer, "defining_op", None)
        if operation is None:
            continue
        kernel = scheduler.name_to_fused_node[operation.get_name()]
        for n in kernel.get_nodes():
            yield from getattr(n.node, "origins", ())


# Views, by their schema none.
_VIEWS = frozenset({"reshape", "_unsafe_view"})


def _ops(nodes: Iterable[Any]) -> tuple[str, ...]:
    """Names of what was called before it was decomposed, each once, in the graph's order; no views."""
    names: dict[str, None] = {}
    for node in sorted(set(nodes)):
        target = node.meta.get("original_aten") or node.target
        if hasattr(target, "_schema") and not target.is_view:
            names.setdefault(target._schema.name.partition("::")[2])
    return tuple(name for name in names if name not in _VIEWS)
