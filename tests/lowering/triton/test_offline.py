"""``offline.py``: figures of machine code, from text written here and from three small kernels."""

import dataclasses
import importlib.util
import json
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load() -> ModuleType:
    """``offline.py``: tests are no package from which it could be imported."""
    spec = importlib.util.spec_from_file_location("offline", Path(__file__).with_name("offline.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline"] = module
    spec.loader.exec_module(module)
    return module


lib: Any = sys.modules.get("offline") or load()


@pytest.fixture(autouse=True)
def every_test_is_fresh() -> None:
    """Nothing of torch's is used here that would have to be forgotten."""


# --- the parsers


AMD = """\
kernel:
\ts_load_dwordx4 s[4:7], s[0:1], 0x0
\tv_mfma_f32_32x32x16_bf16 v[0:15], v[16:19], v[20:23], 0
.LBB0_1:                                ; %outer
\tv_add_u32_e32 v1, v2, v3
.LBB0_2:                                ; %inner
\tds_read_b128 v[20:23], v1
\tds_write_b128 v1, v[20:23]
\tv_accvgpr_read_b32 v4, a0
\tv_cvt_pk_fp8_f32 v5, v6, v7
\tv_lshlrev_b32_e32 v1, 2, v0
\tv_mov_b32_e32 v2, v1
\t; v_mfma_f32_32x32x16_bf16 in a comment
\tv_mfma_scale_f32_32x32x64_f8f6f4 v[0:15], v[16:19], v[20:23], v[0:15], v1, v2 op_sel_hi:[0,0,0] cbsz:4 blgp:4
\tv_mfma_f32_32x32x64_f8f6f4 v[0:15], v[16:23], v[24:27], v[0:15] blgp:4
\ts_cbranch_scc1 .LBB0_2
; %bb.3:
\ts_cbranch_vccnz .LBB0_1
.LBB0_4:
\tv_mul_f32_e32 v1, v2, v3
\ts_cbranch_scc1 .LBB0_4
\ts_branch .LBB0_5
.LBB0_5:
\ts_endpgm
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     6
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 3
    .vgpr_count:     98
    .vgpr_spill_count: 2
"""


def test_amd_figures() -> None:
    figures = lib.amd_figures(AMD, 1024)
    assert (figures.registers, figures.accumulator_registers, figures.stack) == (98, 6, 12)
    assert (figures.spills, figures.scalar_spills) == (2, 3)
    assert (figures.shared, figures.tensor_memory) == (1024, 0)
    assert figures.mma == {
        "v_mfma_f32_32x32x16_bf16": 1,
        "v_mfma_scale_f32_32x32x64_f8f6f4.fp4.fp4": 1,
        "v_mfma_f32_32x32x64_f8f6f4.fp8.fp4": 1,
    }
    assert figures.instructions == 17
    assert figures.count("v_mfma") == 3
    assert figures.count("v_mfma_scale.*fp4.fp4") == 1
    # The inner loop only: neither the outer one, nor the one without matrix instructions.
    assert figures.loop == lib.Loop(instructions=9, mma=2, shared_reads=1, valu=2, conversions=1)
    assert figures.instructions_per_mma == 4.5


def test_amd_without_accumulator_registers() -> None:
    assert (
        lib.amd_figures(AMD.replace(".agpr_count:     6", ".max_flat_workgroup_size: 32"), 0).accumulator_registers == 0
    )


def test_amd_without_metadata() -> None:
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        lib.amd_figures(AMD.replace(".vgpr_count", ".others"), 0)


def test_loop_with_most_mma() -> None:
    """Of two loops side by side; a longer way back to the same label is the same loop."""
    loop = "{0}:\n{1}\ts_cbranch_scc0 {0}\n"
    mma = "\tv_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]\n"
    early = f"{mma}\ts_cbranch_vccz .LBB0_2\n{mma * 3}"
    text = loop.format(".LBB0_1", mma) + loop.format(".LBB0_2", early) + loop.format(".LBB0_3", mma * 2)
    figures = lib.amd_figures(text + AMD[AMD.index("\t.amdgpu_metadata") :], 0)
    assert figures.loop == lib.Loop(instructions=6, mma=4, shared_reads=0, valu=0, conversions=0)


SASS = """\
\t.section\t.text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   STL.64 [R1+0x8], R2 ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/              @!P0 LDS.128 R8, [R2] ;
        /*0040*/                   OMMA.SF.16864.F32.E2M1.E2M1.E8 R4, R4, R8, R4, R1, R2 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   QMMA.16832.F32.E4M3.E4M3 R4, R4, R8, R4 ;
.L_x_2:
        /*0070*/             @!UP0 UTCQMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0 ;
        /*0080*/                   NOP ;
        /*0090*/             @!UPT BRA.U UP0, `(.L_x_1) ;
        /*00a0*/                   LDL R3, [R1+0x8] ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*10000*/                  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
"""
USAGE = "Resource usage:\n Function kernel:\n  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:932 TEXTURE:0\n"


def test_nvidia_figures() -> None:
    figures = lib.nvidia_figures(SASS, USAGE, 2048, 64)
    assert (figures.registers, figures.spills, figures.scalar_spills, figures.stack) == (40, 2, 0, 16)
    assert (figures.shared, figures.tensor_memory) == (2048, 64)
    assert figures.mma == {
        "HGMMA.64x128x16.F32.BF16": 1,
        "OMMA.SF.16864.F32.E2M1.E2M1.E8": 1,
        "QMMA.16832.F32.E4M3.E4M3": 1,
        "UTCQMMA": 1,
    }
    assert figures.instructions == 13
    assert figures.loop == lib.Loop(instructions=7, mma=3, shared_reads=2)


def test_nvidia_without_usage() -> None:
    with pytest.raises(ValueError, match="nothing of REG"):
        lib.nvidia_figures(SASS, "", 0, 0)


@pytest.mark.parametrize(
    ("opcode", "mma"),
    [
        ("v_mfma_i32_16x16x64_i8", True),
        ("v_wmma_i32_16x16x16_iu8", True),
        ("v_fma_f32", False),
        ("v_mad_u64_u32", False),
        ("UTCHMMA.2CTA", True),
        ("UTCOMMA.4X", True),
        ("IMMA.16832.S8.S8.SAT", True),
        ("IGMMA.64x128x32.S8.S8", True),
        ("UTCBAR", False),
        ("FFMA", False),
        ("HFMA2.MMA", False),
    ],
)
def test_is_mma(opcode: str, mma: bool) -> None:
    assert lib.is_mma(opcode) is mma


def figures(**changed: Any) -> Any:
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(lib.Figures)), 0)
    return lib.Figures(**{**nothing, "opcodes": {}, "loop": None, **changed})


def test_problems() -> None:
    sm_100, sm_120, gfx942 = (lib.TARGETS[name] for name in ("sm_100", "sm_120", "gfx942"))
    assert figures(shared=232448, tensor_memory=512, scalar_spills=87).problems(sm_100) == []
    assert figures(spills=5, stack=20).problems(gfx942) == ["5 spills of vector registers to memory"]
    assert figures(stack=20).problems(gfx942) == ["20 bytes of private memory a thread"]
    assert figures(shared=114688).problems(sm_120) == ["114688 bytes of shared memory, sm_120 has 101376"]
    assert figures(shared=114688).problems(sm_100) == []
    assert figures(tensor_memory=1024).problems(sm_100) == ["1024 columns of tensor memory, sm_100 has 512"]
    assert figures(tensor_memory=1).problems(sm_120) == ["1 columns of tensor memory, sm_120 has 0"]


def test_figures_through_json() -> None:
    figures = lib.amd_figures(AMD, 1024)
    assert lib.Figures.from_dict(json.loads(json.dumps(dataclasses.asdict(figures)))) == figures
    golden = json.loads(json.dumps(figures.golden()))
    assert (golden["loop"]["mma"], golden["instructions_per_mma"], golden["registers"]) == (2, 4.5, 98)
    assert "v_mfma_f32_32x32x16_bf16" in golden["mma"]
    assert "opcodes" not in golden


@pytest.mark.parametrize(
    ("error", "printed", "reason"),
    [
        (
            "RuntimeError: PassManager::run failed",
            "/tmp/a/kernel.py:5:0: error: 'ttg.x' op is odd\nmodule {\n  %0 = tt.load\n}\n"
            "/tmp/a/kernel.py:5:0: error: Failures have been detected while processing an MLIR pass pipeline\n",
            "RuntimeError: PassManager::run failed; error: 'ttg.x' op is odd",
        ),
        (
            "the compiler's process ended: SIGABRT",
            "python: /build/mlir/A.cpp:1: void f(): Assertion `a < b' failed.\n#0 0x00 in abort\n",
            "the compiler's process ended: SIGABRT; Assertion `a < b' failed.",
        ),
        ("KeyError: 1", "\nsome words\n", "KeyError: 1; some words"),
        (
            "CompilationError: at 2:8:\ndef k(x):\n    tl.dot(x, x)\n    ^\n\nno matrix",
            "",
            "CompilationError: at 2:8; tl.dot(x, x); no matrix",
        ),
        ("ValueError: " + "x" * 1000, "", "ValueError: " + "x" * 288),
    ],
)
def test_shortened(error: str, printed: str, reason: str) -> None:
    assert lib.shortened(error, printed) == reason


# --- the compilers


KERNELS = textwrap.dedent(
    """
    import triton
    import triton.language as tl

    @triton.jit
    def dot(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
        acc = tl.zeros((M, N), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
            b = tl.load(b_ptr + n[None, :] * K + start + k[:, None])
            acc = tl.dot(a, b, acc)
        tl.store(c_ptr + m[:, None] * N + n[None, :], acc)

    @triton.jit
    def dot_scaled(a_ptr, as_ptr, b_ptr, bs_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
        m, n, k, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK // 2), tl.arange(0, BLOCK // 32)
        acc = tl.zeros((M, N), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            a = tl.load(a_ptr + m[:, None] * (K // 2) + start // 2 + k[None, :])
            b = tl.load(b_ptr + n[None, :] * (K // 2) + start // 2 + k[:, None])
            a_scale = tl.load(as_ptr + m[:, None] * (K // 32) + start // 32 + s[None, :])
            b_scale = tl.load(bs_ptr + n[:, None] * (K // 32) + start // 32 + s[None, :])
            acc = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1", acc)
        tl.store(c_ptr + m[:, None] * N + n[None, :], acc)

    @triton.jit
    def cast(x_ptr, y_ptr, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n)
        if tl.target_info.is_hip():
            x += 1.0
        tl.store(y_ptr + i, x.to(DTYPE), i < n)
    """
)


def dot(target: str, block: int = 64, **options: Any) -> Any:
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    return lib.Job(KERNELS, "dot", signature, {"M": 128, "N": 128, "BLOCK": block}, target, options, ["K"])


def dot_scaled(target: str) -> Any:
    signature = {**dict.fromkeys(("a_ptr", "as_ptr", "b_ptr", "bs_ptr"), "*u8"), "c_ptr": "*fp32", "K": "i32"}
    constants = {"M": 128, "N": 64, "BLOCK": 128}
    return lib.Job(KERNELS, "dot_scaled", signature, constants, target, {"num_warps": 4}, ["K"])


def cast(target: str, source: str = KERNELS, **constants: Any) -> Any:
    import triton.language as tl

    signature = {"x_ptr": "*fp32", "y_ptr": "*bf16", "n": "i32"}
    return lib.Job(source, "cast", signature, {"DTYPE": tl.bfloat16, "BLOCK": 1024, **constants}, target, {}, ["n"])


DOT = {
    "gfx942": "v_mfma_f32_.*_bf16",
    "gfx950": "v_mfma_f32_.*_bf16",
    "gfx1100": "v_wmma_f32_16x16x16_bf16",
    "sm_80": "HMMA.16816.F32.BF16",
    "sm_90": "HGMMA.*BF16",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA.16816.F32.BF16",
}


# What becomes of two-sided MXFP4. Of gfx942 see test_unsupported.
DOT_SCALED = {
    "gfx950": r"v_mfma_scale_f32_.*_f8f6f4\.fp4\.fp4",
    "sm_90": r"HGMMA.*\.BF16",
    "sm_100": "UTCOMMA",
    "sm_120": r"OMMA\.SF\..*E2M1\.E2M1",
}


@pytest.fixture(scope="session")
def compiled(offline: Any) -> dict[tuple[str, str], Any]:
    """What came of kernels that several tests look at, by kernel and target: one worker a target for all of them."""
    jobs = {("dot", target): dot(target, num_warps=8, num_stages=2) for target in lib.TARGETS}
    jobs |= {("dot_scaled", target): dot_scaled(target) for target in [*DOT_SCALED, "gfx942"]}
    jobs |= {("cast", target): cast(target) for target in ("gfx942", "gfx950", "sm_90")}
    jobs["large", "sm_120"] = dot("sm_120", block=128, num_warps=8, num_stages=3)
    jobs["one warp", "sm_80"] = dot("sm_80", num_warps=1, num_stages=2)
    return dict(zip(jobs, offline.compile([*jobs.values()]), strict=True))


@pytest.mark.parametrize("target", lib.TARGETS)
def test_dot(compiled: dict[tuple[str, str], Any], target: str) -> None:
    found = compiled["dot", target]
    assert isinstance(found, lib.Figures), found
    assert found.count(DOT[target]) == sum(found.mma.values()) > 0
    assert found.problems(lib.TARGETS[target]) == []
    assert found.loop
    assert 0 < found.loop.mma < found.loop.instructions < found.instructions
    assert found.shared >= 2 * 128 * 64 * 2
    assert (found.tensor_memory > 0) == (target == "sm_100")
    assert 32 <= found.registers <= 512


@pytest.mark.parametrize("target", DOT_SCALED)
def test_dot_scaled(compiled: dict[tuple[str, str], Any], target: str) -> None:
    found = compiled["dot_scaled", target]
    assert isinstance(found, lib.Figures), found
    assert found.count(DOT_SCALED[target]) == sum(found.mma.values()) > 0
    assert found.problems(lib.TARGETS[target]) == []


def test_elementwise(compiled: dict[tuple[str, str], Any]) -> None:
    """Without matrix instructions there is no loop of theirs. The kernel asks what it is compiled for."""
    amd, nvidia = compiled["cast", "gfx950"], compiled["cast", "sm_90"]
    assert (amd.loop, amd.mma, amd.instructions_per_mma) == (None, {}, None)
    assert (nvidia.loop, nvidia.mma, nvidia.shared) == (None, {}, 0)
    assert amd.count("v_cvt_pk_bf16_f32") > 0
    assert amd.count("v_(pk_)?add_f32") > 0
    # Tensors are aligned and below 2 GiB.
    assert amd.count("buffer_load_dwordx4") > 0 == amd.count("global_load")
    assert nvidia.count(r"LDG\.E\.128") > 0
    assert nvidia.count("FADD") == 0


def test_over_a_limit(compiled: dict[tuple[str, str], Any]) -> None:
    """Triton compiles what cannot be launched."""
    found = compiled["large", "sm_120"]
    assert found.problems(lib.TARGETS["sm_120"]) == [f"{found.shared} bytes of shared memory, sm_120 has 101376"]


def test_spills(compiled: dict[tuple[str, str], Any]) -> None:
    found = compiled["one warp", "sm_80"]
    assert found.spills > 0
    assert found.problems(lib.TARGETS["sm_80"])[0] == f"{found.spills} spills of vector registers to memory"


def test_unsupported(compiled: dict[tuple[str, str], Any]) -> None:
    """Up to Triton 3.7 gfx942 takes scales on one side only. What is compiled next is not the worse for it."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 7):
        pytest.skip("Triton compiles it")
    failed = compiled["dot_scaled", "gfx942"]
    assert isinstance(failed, lib.Failure)
    assert "Unsupported DotScaleOp" in failed.reason
    assert len(failed.reason) < 1000
    assert isinstance(compiled["cast", "gfx942"], lib.Figures)


DIES = KERNELS + "\nimport os, sys\nprint('LLVM ERROR: of this job', file=sys.stderr, flush=True)\nos.abort()\n"


def test_worker_dies(offline: Any) -> None:
    """Jobs before and after are compiled, and each failure has its own reason. Results are in the order of the jobs."""
    jobs = [cast("sm_90"), cast("gfx950", DIES), cast("gfx950"), cast("gfx950", "syntax error"), cast("sm_90", BLOCK=7)]
    first, died, second, refused, odd = offline.compile(jobs)
    assert died == lib.Failure("the compiler's process ended: SIGABRT; LLVM ERROR: of this job")
    assert first.count("EXIT") > 0
    assert second.count("s_endpgm") > 0
    assert refused.reason.startswith("SyntaxError: invalid syntax")
    assert "LLVM ERROR" not in refused.reason
    assert "power of 2" in odd.reason


def test_reason_is_that_of_its_job(offline: Any) -> None:
    """Not what the job before printed, in the same process."""
    prints = "import sys\nprint('LLVM ERROR: of this job', file=sys.stderr, flush=True)\nint('x')"
    printed, silent = offline.compile([cast("gfx950", prints), cast("gfx950", "int('y')")])
    assert printed.reason.startswith("ValueError: invalid literal for int")
    assert printed.reason.endswith("'x'; LLVM ERROR: of this job")
    assert silent.reason.endswith("'y'")


def test_job_that_hangs() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[triton]'")
    with lib.Offline(timeout=1) as compiler:
        assert compiler.compile([cast("sm_90", "import time\ntime.sleep(600)")]) == [
            lib.Failure("took longer than 1 s")
        ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"options": {"num_wraps": 4}}, r"gfx950 has no options \['num_wraps'\]"),
        ({"signature": {"x_ptr": "*fp32", "n": "i32"}}, r"cast takes \['x_ptr', 'y_ptr', .*given are \['BLOCK'"),
        ({"divisible": ["N"]}, r"cast takes .*given are .*'N'"),
        ({"name": "other"}, "no attribute 'other'"),
    ],
)
def test_job_that_is_wrong(offline: Any, changed: dict[str, Any], reason: str) -> None:
    (failed,) = offline.compile([dataclasses.replace(cast("gfx950"), **changed)])
    assert isinstance(failed, lib.Failure)
    assert re.search(reason, failed.reason)


def test_one_worker_a_target(offline: Any) -> None:
    """The process that compiles for one AMD target never compiles for another; for the same it is kept."""
    offline.compile([cast("gfx942")])
    process = offline._worker._process.pid
    offline.compile([cast("sm_90"), cast("gfx942")])
    assert offline._worker.target == "sm_90"
    assert offline._worker._process.pid != process
    process = offline._worker._process.pid
    offline.compile([cast("sm_90")])
    assert offline._worker._process.pid == process


def test_cache(offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private and gone with the session, unless the user names one. The interpreter's variable changes nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "named"))
    with lib.Offline() as compiler:
        (found,) = compiler.compile([cast("gfx950")])
    assert found.instructions > 0
    assert any((tmp_path / "named").iterdir())
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with lib.Offline() as compiler:
        folder = Path(compiler._cache.name)
        assert compiler.compile([cast("gfx950")]) == [found]
        assert any(folder.iterdir())
    assert not folder.exists()
