"""The table of schemes and targets in the README: ``python -m quark_inductor.support`` prints it."""

import dataclasses

import torch
from torch import nn

from quark_inductor.lowering.base import select
from quark_inductor.lowering.target import Target
from quark_inductor.quantize import quantize_
from quark_inductor.schemes.spec import PRESETS
from quark_inductor.testing import rewrite

# Column title, target, and whether the tests run there.
TARGETS: tuple[tuple[str, Target, bool], ...] = (
    ("CPU, AVX512-VNNI", Target(device_type="cpu", arch="x86_64", isa="avx512_bf16"), True),
    ("CPU, AVX2", Target(device_type="cpu", arch="x86_64", isa="avx2"), True),
    ("CPU, other x86-64", Target(device_type="cpu", arch="x86_64", isa="portable"), True),
    ("CPU, aarch64", Target(device_type="cpu", arch="aarch64", isa="portable"), False),
    ("AMD gfx942", Target(device_type="cuda", arch="gfx942"), False),
    ("AMD gfx950", Target(device_type="cuda", arch="gfx950"), False),
    ("NVIDIA sm_90", Target(device_type="cuda", arch="sm_90"), False),
    ("NVIDIA sm_100", Target(device_type="cuda", arch="sm_100"), False),
    ("NVIDIA sm_120", Target(device_type="cuda", arch="sm_120"), False),
)


def table() -> str:
    """Markdown: a row for each scheme name, a column for each target.

    A cell says *tested* where a kernel runs in the tests, *compiled only* where one is made, for a GPU run in Triton's
    interpreter, and was never run on the target, and *emulated* where no provider has one and the emulation is what
    Inductor compiles.
    """
    lines = [
        "| scheme | " + " | ".join(title for title, _, _ in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for name in PRESETS:
        model = quantize_(nn.Sequential(nn.Linear(256, 256)), name, exclude=(), calibration=[torch.ones(2, 256)])
        (linear,) = rewrite(model, torch.ones(2, 256)).result.linears
        cells = []
        for _, target, tested in TARGETS:
            problem = linear.problem
            if problem is not None and target.device_type != "cpu":
                problem = dataclasses.replace(problem, layout="")  # weights are packed on CPU only
            provider = problem and select(target, problem).provider
            cells.append("emulated" if provider is None else "tested" if tested else "compiled only")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
