"""Our Triton kernels beside AITER's, at the same tiles: what their machine code says.

    python benchmarks/triton_static.py

For every GEMM of ``aiter_static.json`` the kernel that Inductor generates for the same operation is compiled for a GPU
that is not there, at the tile, the warps, the stages and the MFMA of AITER's, and else as the provider launches it: no
number of waves is asked for. Writes ``triton_static.json``, and prints the table of ``triton_static.md``. Takes half a
minute.
"""

import argparse
import importlib.util
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import quark_inductor.lowering.registry  # noqa: F401 - lowers the ops
from quark_inductor.lowering.base import forcing
from quark_inductor.lowering.triton.tiles import Tile

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
TRITON_TESTS = "lowering/triton/generated.py", "lowering/triton/offline.py"
q = torch.ops.quark_inductor
Row = dict[str, Any]

E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
ANCHOR, OURS = HERE / "aiter_static.json", HERE / "triton_static.json"
# Where they were not recorded.
M, STAGES = 4096, 2
# Tiles of which a kernel has as many MFMAs and as much LDS as a row, whose own has half as many.
OTHER_TILES = {"gfx950 gemm_afp8wfp8 64x64x128": ((64, 128, 128), (128, 64, 128))}


def load(path: Path) -> ModuleType:
    """A module that is in no package."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def operands(op: str, target: str, m: int, n: int, k: int) -> tuple[str, list[Tensor | None], tuple[Any, ...]]:
    """A fused op of ours, its tensors in its order, and the arguments after them, for an op of AITER's."""

    def codes(rows: int, columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype)

    def scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    mxfp4 = [codes(n, k // 2), codes(n, k // 32), None, None, None]
    fp8 = FNUZ if target == "gfx942" else E4M3
    per_token = [codes(m, k, fp8), scales(m, 1), None, None]
    if op.startswith("gemm_afp4wfp4"):
        x = [codes(m, k // 2), codes(m, k // 32), None, None]
        return "quantized_gemm", [*x, *mxfp4], ("mxfp4", "mxfp4", "bfloat16")
    if op == "gemm_a16wfp4":
        return "prologue_gemm", [codes(m, k, torch.bfloat16), None, None, None, *mxfp4], ("mxfp4", "even", 0, "mxfp4")
    if op == "gemm_a8wfp4":
        return "quantized_gemm", [*per_token, *mxfp4], ("fp8_e4m3", "mxfp4", "bfloat16")
    if op == "gemm_afp8wfp8":
        x = [codes(m, k, E4M3), codes(m, k // 32), None, None]
        weight = [codes(n, k, E4M3), codes(n, k // 32), None, None, None]
        return "quantized_gemm", [*x, *weight], ("mxfp8_e4m3", "mxfp8_e4m3", "bfloat16")
    if op == "gemm_a8w8_blockscale":
        x = [codes(m, k, E4M3), scales(m, k // 128, dtype=torch.float32), None, None]
        weight = [codes(n, k, E4M3), scales(n // 128, k // 128, dtype=torch.float32), None, None, None]
        return "quantized_gemm", [*x, *weight], ("fp8_e4m3", "fp8_e4m3_128x128", "bfloat16")
    if op == "gemm_a8w8 fp8":
        format = "fp8_e4m3fnuz" if fp8 == FNUZ else "fp8_e4m3"
        weight = [codes(n, k, fp8), scales(n), None, None, None]
        return "quantized_gemm", [*per_token, *weight], (format, format, "bfloat16")
    if op == "gemm_a8w8 int8":
        x = [codes(m, k, torch.int8), scales(m, 1), None, None]
        weight = [codes(n, k, torch.int8), scales(n), None, None, None]
        return "quantized_gemm", [*x, *weight], ("int8", "int8", "bfloat16")
    raise ValueError(f"no op of ours for {op}")


def name_of(row: Row) -> str:
    """One name a row."""
    return f"{row['target']} {row['op']} {'x'.join(map(str, row['tile']))}"


def gemms(anchor: Row) -> dict[str, Row]:
    """The rows of ``aiter_static.json`` that are GEMMs, by name; what holds of several tiles at each."""
    found = {}
    for row in anchor["kernels"]:
        if row["op"].startswith("gemm_"):
            found[name_of(row)] = row
            others = ({**row, "tile": list(tile)} for tile in OTHER_TILES.get(name_of(row), ()))
            found.update({name_of(other): other for other in others})
    return found


def job(row: Row, n: int, k: int) -> Any:
    """Our kernel for a row, as what ``offline.py`` compiles."""
    from quark_inductor.lowering.triton import template

    fake_gpu, generated, offline = (load(TESTS / name) for name in ("fake_gpu.py", *TRITON_TESTS))
    op, tensors, rest = operands(row["op"], row["target"], row["m"] or M, n, k)
    there = [tensor is not None for tensor in tensors]

    def function(*given: Tensor) -> tuple[Tensor]:
        left = iter(given)
        return (getattr(q, op)(*(next(left) if is_there else None for is_there in there), *rest),)

    graph = generated.graph_of(function, *(tensor for tensor in tensors if tensor is not None)).graph
    sizes = dict(zip("mnk", row["tile"], strict=True))
    tile = Tile(**sizes, warps=row["num_warps"], stages=row["num_stages"] or STAGES)
    with forcing("triton"), patch.object(template, "tiles_for", lambda *args, **options: [tile]):
        (kernel,) = generated.kernels(fake_gpu.gpu_code(graph, row["target"]))
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    options["matrix_instr_nonkdim"] = row["matrix_instr_nonkdim"]
    return offline.Job(
        source=kernel.source,
        name=kernel.name,
        signature=kernel.signature,
        constants={},
        target=row["target"],
        options=options,
        divisible=[name for name in kernel.divisible if not kernel.signature[name].startswith("*")],
    )


def figures_of(found: Any) -> Row:
    """What ``offline.py`` found, for JSON, under the names of ``aiter_static.json``."""
    figures: Row = found.golden()
    kept = ("registers", "accumulator_registers", "spills", "shared", "loop", "instructions", "mma")
    return {name: figures[name] for name in kept}


def per_mma(row: Row, what: str) -> float | None:
    """Instructions of some kind in the loop for each MFMA; where there is no loop, ``None``."""
    return row["loop"][what] / row["loop"]["mma"] if row["loop"] else None


def cells(row: Row) -> list[str]:
    """Of the table, for one of the two."""
    agprs, loop = row["accumulator_registers"], row["loop"]
    total = f"{row['instructions']} in all" if loop is None else ""
    reads = "" if loop is None or loop["shared_reads"] is None else f", {loop['shared_reads']} reads"
    return [
        f"{row['registers']}" + (f" ({agprs})" if agprs else ""),
        f"{row['spills']}",
        f"{row['shared']}",
        total or f"{loop['instructions']} / {loop['valu'] + loop['conversions']} / {loop['mma']}{reads}",
    ]


def table(anchor: Row, ours: Row) -> str:
    """Both, in Markdown."""
    what = ["VGPR (AGPR)", "spills", "LDS", "loop: all / VALU / MFMA"]
    head = ["kernel", *(f"{whose} {name}" for whose in ("AITER", "ours") for name in what), "ours to AITER's"]
    lines = [head, ["---"] * len(head)]
    for name, row in gemms(anchor).items():
        mine = ours["kernels"][name]
        theirs, other = per_mma(row, "instructions"), per_mma(mine, "instructions")
        both = (other, theirs) if theirs and other else (mine["instructions"], row["instructions"])
        lines.append([name, *cells(row), *cells(mine), f"{both[0] / both[1]:.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Compile, write, print."""
    import triton

    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    anchor = json.loads(ANCHOR.read_text())
    rows = gemms(anchor)
    with load(TESTS / TRITON_TESTS[1]).Offline() as compiler:
        found = compiler.compile([job(row, anchor["n"], anchor["k"]) for row in rows.values()])
    ours = {
        "source": "Kernels of quark-inductor at the tiles of aiter_static.json, by benchmarks/triton_static.py.",
        "date": str(datetime.now(UTC).date()),
        "triton": triton.__version__,
        "torch": torch.__version__.partition("+")[0],
        "kernels": {name: figures_of(figures) for name, figures in zip(rows, found, strict=True)},
    }
    lines = [f"    {json.dumps(name)}: {json.dumps(figures)}" for name, figures in ours["kernels"].items()]
    text = json.dumps({**ours, "kernels": {}}, indent=2).removesuffix("{}\n}")
    OURS.write_text(f"{text}{{\n" + ",\n".join(lines) + "\n  }\n}\n")
    print(table(anchor, ours))


if __name__ == "__main__":
    main()
