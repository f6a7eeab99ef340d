"""Linears that read one activation, q, k and v or gate and up, as one wider GEMM."""

from collections.abc import Mapping

from torch import nn

from quark_inductor.schemes.base import QuarkLinear

# Names of siblings in a module that its forward calls with one tensor, as the models of transformers have them.
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def merge_shared_input_(model: nn.Module) -> Mapping[str, str]:
    """Let the quantized Linears that read one activation share one GEMM when the model is compiled.

    The activation is then quantized once for all of them, and there are fewer, wider kernels. Nothing is merged that
    would change a number. Moving the model to another device undoes it.

    Args:
        model: with quantized Linears, from ``load`` or ``quantize_``; changed in place.

    Returns:
        For each group of siblings that was found, by the name of the module that holds it and theirs: ``""``, or why it
        stays as it is.
    """
    results: dict[str, str] = {}
    for name, module in model.named_modules():
        for group in SHARING:
            linears = [m for sibling in group if isinstance(m := getattr(module, sibling, None), QuarkLinear)]
            if len(linears) < 2:
                continue
            prefix = f"{name}." if name else ""
            results[f"{prefix}{{{','.join(group)}}}"] = (
                QuarkLinear.merge_(linears) if len(linears) == len(group) else "one of them is not quantized"
            ) or ""
    return results
