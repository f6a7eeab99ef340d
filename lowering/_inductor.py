"""Every private Inductor name the lowerings use, and what differs between torch 2.11 and 2.13. Imported lazily."""

from collections.abc import Mapping, Sequence
from typing import Any

# First: it and cpp_gemm_template import each other, and only this order works.
import torch._inductor.lowering  # noqa: F401  isort: skip

from torch._dynamo.utils import counters
from torch._inductor import config, ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateCaller, CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.lowering import register_lowering, view
from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs
from torch._inductor.utils import Placeholder, parallel_num_threads
from torch._inductor.virtualized import V, ops

__all__ = [
    "DTYPE_TO_CPP",
    "CppTemplate",
    "CppTemplateCaller",
    "CppTemplateKernel",
    "Placeholder",
    "V",
    "config",
    "counters",
    "gen_2d_view_of_epilogue_buf",
    "get_export_declaration",
    "ir",
    "ops",
    "parallel_num_threads",
    "realized_inputs",
    "register_lowering",
    "select_choice",
    "static_size",
    "view",
]


def realized_inputs(nodes: Mapping[str, Any], strided: Sequence[str] = ()) -> list[Any]:
    """The nodes realized as buffers, each of its own, which a template can take a pointer of.

    A kernel gets a buffer's beginning, and each buffer once: a part that begins elsewhere, or a buffer that is given
    for a second argument, is copied.

    Args:
        nodes: Inductor IR by name.
        strided: names of those that may have any strides; the others are made contiguous.
    """
    found: list[Any] = []
    for name, realized in zip(nodes, realize_inputs(*nodes.values()), strict=True):
        node = realized if name in strided else ir.ExternKernel.require_contiguous(realized)
        elsewhere = node.get_layout().offset != 0 or node.get_name() in {f.get_name() for f in found}
        found.append(ir.ExternKernel.copy_input(node) if elsewhere else node)
    return found


def select_choice(name: str, choices: list[Any], inputs: Sequence[Any], layout: Any) -> Any:
    """The IR node of the best choice."""
    result = autotune_select_algorithm(name, choices, list(inputs), layout)
    return result[0] if isinstance(result, tuple) else result  # torch 2.11 gives the node, 2.12 a (node, choice)


def static_size(expr: Any) -> int | None:
    """A size as an int, or ``None`` if it is symbolic."""
    return int(expr) if getattr(expr, "is_number", True) else None
