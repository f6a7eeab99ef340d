"""The table of schemes and targets in the README: ``python -m quark_inductor.support`` prints it."""

from quark_inductor.lowering import registry as lowerings  # noqa: F401
from quark_inductor.lowering.base import GemmProblem, select
from quark_inductor.lowering.target import Target
from quark_inductor.schemes import registry as schemes  # noqa: F401
from quark_inductor.schemes.base import scheme_for
from quark_inductor.schemes.spec import PRESETS

# Column title, target, and whether the tests run there.
TARGETS: tuple[tuple[str, Target, bool], ...] = (
    ("CPU, AVX512-VNNI", Target(device_type="cpu", arch="x86_64", isa="avx512_vnni"), True),
    ("CPU, other x86-64", Target(device_type="cpu", arch="x86_64", isa="portable"), True),
    ("CPU, aarch64", Target(device_type="cpu", arch="aarch64", isa="portable"), False),
    ("AMD gfx942", Target(device_type="cuda", arch="gfx942"), False),
    ("AMD gfx950", Target(device_type="cuda", arch="gfx950"), False),
    ("NVIDIA sm_90", Target(device_type="cuda", arch="sm_90"), False),
    ("NVIDIA sm_100", Target(device_type="cuda", arch="sm_100"), False),
)


def table() -> str:
    """Markdown: a row for each scheme name, a column for each target.

    A cell says *tested* where a kernel runs in the tests, *compiled only* where one is made and was never run, and
    *emulated* where no provider has one yet and the emulation is what Inductor compiles.
    """
    lines = [
        "| scheme | " + " | ".join(title for title, _, _ in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for name, spec in PRESETS.items():
        op = scheme_for(spec).fused_op
        cells = []
        for _, target, tested in TARGETS:
            provider = op and select(target, GemmProblem(op=op, m=None, n=4096, k=4096, dtype="bfloat16")).provider
            cells.append("emulated" if provider is None else "tested" if tested else "compiled only")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
