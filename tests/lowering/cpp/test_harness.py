"""The kernels of packed weights by themselves, without Inductor: random shapes and values against float64, in C++.

Each harness packs random weights by the layout's description, prepares random activations (zero blocks, NaN,
infinities, the tiniest and the largest numbers, outliers among them) and compares every result with a product in double
of the operands that generic.h dequantizes, to 1e-6 of the sum of the magnitudes of what is added.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder

from quark_inductor.lowering import target

HERE = Path(__file__).parent
HEADERS = Path(target.__file__).parent / "cpp"
# What each needs; one of AVX2 is compiled for nothing more, with and without AVX-VNNI.
HARNESSES = {
    "vnni": "avx512_vnni",
    "bf16": "avx512_bf16",
    "amx_vnni": "amx",
    "amx_bf16": "amx",
    "avx2": "avx2",
    "avx2_vnni": "avx2",
    "avx2_fp32": "avx2",
}
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-DQUARK_AVX2")
# Vector registers that a function keeps on the stack.
_STACK = re.compile(r"vmov[a-z0-9]+ .*(?:%[yz]mm\d+,.*\(%r[sb]p|\(%r[sb]p[^)]*\),%[yz]mm)")
# The loops that must not: the microkernels, by their names. The portable one is as it may be.
_MICROKERNELS = re.compile(r"(?<!portable::)\b(?:gemv|multiply\w*|dot)<")


def build(name: str, folder: Path, *flags: str) -> Path:
    """A harness, for this CPU."""
    if not target.current().has(HARNESSES[name]):
        pytest.skip(f"this CPU has no {HARNESSES[name]}")
    instructions = ["-march=native", "-DQUARK_AVX512"]
    if HARNESSES[name] == "amx":
        instructions.append("-DHARNESS_AMX")
    if HARNESSES[name] == "avx2":
        instructions = [*_AVX2, "-mavxvnni"] if name == "avx2_vnni" else [*_AVX2]
        if name == "avx2_vnni" and not torch.cpu.get_capabilities().get("avx_vnni"):
            pytest.skip("this CPU has no AVX-VNNI")
    compiler = shutil.which(cpp_builder.get_cpp_compiler())
    assert compiler
    include = Path(torch.__file__).parent / "include"
    program = folder / name
    command = [compiler, "-std=c++17", *instructions, "-fopenmp", f"-I{HEADERS}", f"-I{include}"]
    source = HERE / f"harness_{name.removeprefix('amx_').replace('avx2_vnni', 'avx2')}.cpp"
    done = subprocess.run([*command, *flags, source, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return program


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("name", HARNESSES)
def test_random_shapes_equal_float64(name: str, tmp_path: Path) -> None:
    """Compiled with Inductor's flags, under which a NaN must stay one; nobody reads debug information."""
    flags = cpp_builder.CppTorchOptions(vec_isa=cpp_builder.invalid_vec_isa, warning_all=False).get_cflags()
    left_out = ("D", "fPIC", "g1", "shared", "march")
    program = build(name, tmp_path, *(f"-{flag}" for flag in flags if not flag.startswith(left_out)))
    assert " 0 wrong" in run(program)
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("no objdump to look for spilled registers with")
    text = subprocess.run(
        [tool, "-dC", "--no-show-raw-insn", program], capture_output=True, text=True, check=True
    ).stdout
    spilling = []
    for function in re.split(r"\n\n", text):
        title, _, body = function.partition("\n")
        if _MICROKERNELS.search(title) and "lambda" not in title:
            loops = _inner_loops(body)
            # A constant that is read again once a group of columns costs nothing; accumulators that go back and forth
            # are every other instruction.
            if sum(bool(_STACK.search(line)) for line in loops) > len(loops) / 20:
                spilling.append(title)
    assert not spilling


def _inner_loops(body: str) -> list[str]:
    """The lines of a function from the target of a jump back to that jump, where no other such jump is between."""
    lines = body.splitlines()
    at = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*([0-9a-f]+):", line))}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"\sj[a-z]+\s+([0-9a-f]+)", line)
        if jump and at.get(jump[1], i + 1) <= i:
            loops.append(range(at[jump[1]], i + 1))
    inner = [a for a in loops if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in loops)]
    return [lines[i] for i in sorted({i for loop in inner for i in loop})]


EVERY_CPU = r"""
template <typename T>
void all(const uint8_t* rows, const uint8_t* panel, uint8_t* scratch, float* out) {
  using namespace quark::portable;
  InTile<quark::generic::E8M0, 32> mx{1.0f};
  tile<4, Fp4, T>(rows, 5, 64, panel, 0, 32, 1.0f, mx, scratch, out, 64);
  tile<2, Fp6E2M3, T>(rows, 5, 64, panel, 2, 32, 1.0f, mx, scratch, out, 32);
  tile<1, Fp8E4M3, T>(rows, 5, 64, panel, 3, 32, 1.0f, mx, scratch, out, 16);
  auto fill = [](int64_t, float* s, float* z) { for (int c = 0; c < 64; c++) s[c] = z[c] = 1.0f; };
  tile<4, Int4, T>(rows, 5, 64, panel, 0, 64, 1.0f, Beside{fill}, scratch, out, 64);
  tile<4, UInt8, T>(rows, 5, 64, panel, 0, 64, 1.0f, Beside{fill}, scratch, out, 64);
}
template void all<float>(const uint8_t*, const uint8_t*, uint8_t*, float*);
template void all<at::BFloat16>(const uint8_t*, const uint8_t*, uint8_t*, float*);
template void all<at::Half>(const uint8_t*, const uint8_t*, uint8_t*, float*);
"""


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_the_portable_kernels_compile_for(machine: str, tmp_path: Path) -> None:
    """A cross compiler checks what it would make, without a warning of our own."""
    compiler = shutil.which(f"{machine}-linux-gnu-g++")
    if compiler is None:
        pytest.skip(f"no {machine}-linux-gnu-g++")
    names = sorted(h.name for h in HEADERS.glob("*.h"))
    source = tmp_path / "all.cpp"
    # In the order in which the template has them.
    first = [name for name in ("common.h", "generic.h", "panels.h", "bf16_codes.h", "amx.h", "vnni.h") if name in names]
    includes = [*first, *(name for name in names if name not in first)]
    source.write_text("".join(f'#include "{name}"\n' for name in includes) + EVERY_CPU)
    include = Path(torch.__file__).parent / "include"
    flags = "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused", f"-I{HEADERS}", f"-isystem{include}"
    done = subprocess.run([compiler, *flags, source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", HARNESSES)
def test_the_sanitizers_find_nothing(name: str, tmp_path: Path) -> None:
    flags = "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    assert " 0 wrong" in run(build(name, tmp_path, *flags))
