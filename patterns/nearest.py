"""Which rule came nearest to a GEMM that none rewrote, and where the graph parts from it."""

from typing import Any

import torch
from torch.fx import Node

from quark_inductor.patterns._inductor import Match, attempt
from quark_inductor.patterns.base import FLOAT_DTYPES, PRODUCTS, registered_rules


def nearest(node: Node, known: dict[Any, str]) -> str:
    """The reason why no rule's pattern is the graph that ends in ``node``.

    Args:
        node: a GEMM.
        known: reasons found so far, by form of the graph; a model's layers are mostly alike. Extended.
    """
    form = node.target, *(_form(argument, depth=6) for argument in node.args)
    if form not in known:
        known[form] = _nearest(node)
    return known[form]


def _nearest(node: Node) -> str:
    dtype = node.meta["val"].dtype
    if dtype not in FLOAT_DTYPES:
        return f"the GEMM is in {dtype}, the rules know {', '.join(map(str, FLOAT_DTYPES))}"
    most, reason = (-1, -1), ""
    for rule in registered_rules():
        if rule.targets is not None and node.target not in rule.targets:
            continue
        if (end := rule.operand(node)) is None:
            continue
        for traced in rule.possible(end):
            if isinstance((found := attempt(traced.pattern, end)), Match):
                continue  # a variant that the rule refused, or that another one came before
            matched, where = found
            if matched > most:
                most, reason = matched, f"; the nearest is {rule.name}, {_told(where)}"
    return f"no rule's pattern is this graph{reason}"


def _form(value: Any, depth: int) -> Any:
    if not isinstance(value, Node):
        return type(value)
    if depth == 0 or value.op != "call_function" or value.target in PRODUCTS:
        return "operand"
    return value.target, *(_form(argument, depth - 1) for argument in value.args)


def _told(where: Any) -> str:
    """A failure of the matcher in words."""
    arguments, form = where.args, where.format_string
    if form.startswith("function_mismatch") and arguments:
        found, pattern = arguments
        if _name(pattern.fns[0]) == _name(found):
            return f"whose {_name(found)} has other arguments"
        return f"which has {_name(pattern.fns[0])} where this graph has {_name(found)}"
    if form.startswith("constant_args"):
        node, found = arguments
        return f"whose {_name(node)} has {where.kwargs['pattern']!r} where this graph has {_name(found)}"
    if form.startswith("kwarg"):
        return f"which has one {arguments[0]} where this graph has two" if arguments else "of which two parts differ"
    if form.startswith("repeated pattern"):
        return "which reads one value twice where this graph reads two"
    return f"which it is not by form ({form.partition(':')[0].partition(' ')[0]})"


def _name(value: Any) -> str:
    if isinstance(value, Node):
        return _name(value.target) if value.op == "call_function" else "an input"
    if isinstance(value, torch._ops.OpOverload):
        return str(value).removesuffix(".default")
    return getattr(value, "__name__", repr(value))
