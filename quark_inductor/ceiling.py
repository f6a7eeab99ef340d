"""What a machine can do at most: bytes read and products computed in a second, measured once and kept in a file."""

import contextlib
import ctypes
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quark_inductor import __version__, machine
from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.target import Target

# Bytes that are read again and again. What fits in a cache comes from there: weights of a small model too.
SIZES = tuple(1 << power for power in range(20, 29))
_SECONDS, _RUNS = 0.2, 7

# A loop for each instruction, in registers only: so many sums that none waits for another.
_SOURCE = r"""
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define SUMS 12

template <typename Sum, typename Step>
static void run(int64_t count, void (*before)(), Step step, Sum start) {
  if (before) before();
  Sum memory[SUMS], sums[SUMS];
  for (int i = 0; i < SUMS; i++) memory[i] = start;
  asm volatile("" : "+m"(memory));  // else the compiler sees that all sums are the same
  for (int i = 0; i < SUMS; i++) sums[i] = memory[i];
  for (int64_t n = 0; n < count; n++) {
    #pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) sums[i] = step(sums[i], i);
  }
  for (int i = 0; i < SUMS; i++) memory[i] = sums[i];
  asm volatile("" :: "m"(memory));
}

#define PEAK(NAME, SUM, OPS, START, BEFORE, ...)                            \
  extern "C" int64_t NAME(int64_t count) {                                  \
    run<SUM>(count, BEFORE, [](SUM s, int i) { __VA_ARGS__; return s; }, START); \
    return int64_t(OPS) * SUMS * count;                                     \
  }

#if defined(AMX)
static void tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; i++) shapes.rows[i] = 16, shapes.column_bytes[i] = 64;
  asm volatile("ldtilecfg %0" :: "m"(shapes));
}
#define TILES(OP) i % 4 == 0 ? ({ asm volatile(OP " %tmm6, %tmm4, %tmm0"); }) : i % 4 == 1 \
  ? ({ asm volatile(OP " %tmm7, %tmm4, %tmm1"); }) : i % 4 == 2 ? ({ asm volatile(OP " %tmm6, %tmm5, %tmm2"); }) \
  : ({ asm volatile(OP " %tmm7, %tmm5, %tmm3"); })
PEAK(int8, int, 2 * 16 * 16 * 64, 0, tiles, TILES("tdpbsud"))
PEAK(bf16, int, 2 * 16 * 16 * 32, 0, tiles, TILES("tdpbf16ps"))
#elif defined(AVX512_VNNI)
// Of the intrinsics a compiler makes loops with a copy for each.
PEAK(int8, __m512i, 2 * 64, __m512i{}, nullptr, asm("vpdpbusd %1, %1, %0" : "+v"(s) : "v"(_mm512_set1_epi8(1))))
#if defined(AVX512_BF16)
PEAK(bf16, __m512i, 2 * 32, __m512i{}, nullptr, asm("vdpbf16ps %1, %1, %0" : "+v"(s) : "v"(_mm512_set1_epi16(0x3f80))))
#endif
#elif defined(AVX2) && defined(__AVXVNNI__)
PEAK(int8, __m256i, 2 * 32, __m256i{}, nullptr, asm("%{vex%} vpdpbusd %1, %1, %0" : "+x"(s) : "x"(_mm256_set1_epi8(1))))
#elif defined(AVX2)
PEAK(int8, __m256i, 2 * 32, _mm256_set1_epi32(1), nullptr,
     s = _mm256_add_epi16(s, _mm256_maddubs_epi16(s, _mm256_set1_epi8(5))))
#endif

#if defined(AVX2)
typedef float floats __attribute__((vector_size(32)));
PEAK(fp32, floats, 2 * 8, floats{} + 1, nullptr, s = s * (floats{} + 0.999f) + (floats{} + 0.001f))
#else
typedef float floats __attribute__((vector_size(64)));
PEAK(fp32, floats, 2 * 16, floats{} + 1, nullptr, s = s * (floats{} + 0.999f) + (floats{} + 0.001f))
#endif
"""
# What is defined for the source, of an instruction set and those it has with it.
_DEFINED = {"amx": "AMX", "avx512_bf16": "AVX512_BF16", "avx512_vnni": "AVX512_VNNI"}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine can do at most.

    Attributes:
        name: of the CPU or GPU.
        threads: that computed; 0: a GPU.
        isa: see :class:`.lowering.target.Target`; of a GPU its architecture.
        reads: GB/s by how many bytes are read again and again, none faster than a smaller one.
        peaks: GFLOP/s by instruction: on a CPU those of ``lowering/cpp``'s kernels (``"int8"``, ``"bf16"``,
            ``"fp32"``), on a GPU dtypes of a matmul (``"float8_e4m3fn"``, ``"bfloat16"``, ...).
    """

    name: str
    threads: int
    isa: str
    reads: Mapping[int, float]
    peaks: Mapping[str, float]

    def read_gb_s(self, size: int) -> float:
        """GB/s at which so many bytes can be read again and again: those of the next smaller size measured."""
        return self.reads[max((known for known in self.reads if known <= size), default=min(self.reads))]

    def peak(self, problem: GemmProblem, multiplies: str) -> float:
        """GFLOP/s of the instructions that a GEMM's kernel multiplies with.

        Args:
            problem: the GEMM.
            multiplies: a C++ kernel's instruction; ``""``: on a GPU two FP8 operands are multiplied as FP8, all else as
                the result's dtype. On a CPU an instruction without a peak is one that runs as float32.
        """
        both_fp8 = all(f.startswith("fp8") for f in (problem.x_format, problem.weight_format))
        name = multiplies or ("float8_e4m3fn" if both_fp8 else problem.dtype)
        return self.peaks.get(name) or self.peaks.get("fp32") or min(self.peaks.values())

    def facts(self, size: int) -> dict[str, Any]:
        """For a report of GEMMs that read so many bytes of weights together."""
        return {
            "cpu" if self.threads else "gpu": self.name,
            "threads": self.threads,
            "isa": self.isa,
            "read_gb_s": self.read_gb_s(size),
            "gflop_s": max(self.peaks.values()),
            "peaks": dict(self.peaks),
        }


def ceilings_of(device_type: str = "cpu", *, again: bool = False) -> Ceilings:
    """Those of this machine, from :func:`file` if they were measured before: that takes a few seconds.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``. What is measured on a GPU, no test has run yet.
        again: measure again, and keep the higher: what has other work to do is slower than it can be.
    """
    target = targets.current(device_type)
    threads = torch.get_num_threads() if device_type == "cpu" else 0
    name = machine.cpu_model() if device_type == "cpu" else torch.cuda.get_device_name()
    isa = target.isa or target.arch
    key = f"{name} | {threads} threads | {isa} | {__version__}"
    known = _read()
    before = known.get(key, {"reads": {}, "peaks": {}})
    if key not in known or again:
        reads, peaks = _of_cpu(target, threads) if device_type == "cpu" else _of_gpu()
        reads = {size: max(gb_s, before["reads"].get(str(size), 0.0)) for size, gb_s in reads.items()}
        peaks = {one: max(gflop_s, before["peaks"].get(one, 0.0)) for one, gflop_s in peaks.items()}
        known[key] = {"reads": {str(size): gb_s for size, gb_s in _falling(reads).items()}, "peaks": peaks}
        _write(known)
    found = known[key]
    return Ceilings(name, threads, isa, {int(size): gb_s for size, gb_s in found["reads"].items()}, found["peaks"])


def file() -> Path:
    """Where they are kept. Delete it to measure again."""
    return machine.cache_folder() / "ceilings.json"


def _read() -> dict[str, Any]:
    # One that is missing or broken is written anew.
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file().read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}


def _write(known: Mapping[str, Any]) -> None:
    # Where nothing can be written it is measured each time.
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        partial = file().with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
        partial.replace(file())


def _rate(run: Callable[[], int], amount: int) -> float:
    """How much the fastest call did in a nanosecond, of as many as fit into some time; ``amount``: what each does."""
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        begin = time.perf_counter_ns()
        run()
        best = max(best, amount / (time.perf_counter_ns() - begin))
    return best


def _falling(reads: Mapping[int, float]) -> dict[int, float]:
    """None faster than a smaller one: reading less is never slower but for what a loop costs to start."""
    result: dict[int, float] = {}
    fastest = 0.0
    for size, gb_s in sorted(reads.items(), reverse=True):
        result[size] = fastest = max(fastest, gb_s)
    return dict(sorted(result.items()))


def _of_cpu(target: Target, threads: int) -> tuple[dict[int, float], dict[str, float]]:
    from quark_inductor.peers.raw_read import build, raw_read
    from quark_inductor.schemes import memory

    memory_of_all = memory.empty(SIZES[-1]).fill_(1)

    reads = {}
    for size in SIZES:
        reads[size] = _rate(raw_read([memory_of_all[:size]], threads), size)

    defined = [define for isa, define in _DEFINED.items() if target.has(isa)]
    if target.isa == "avx2":
        defined.append("AVX2")
    library = build(_SOURCE, "the loops that multiply", "-ffp-contract=fast", *(f"-D{define}" for define in defined))
    peaks = {}
    for name in ("int8", "bf16", "fp32"):
        if (function := getattr(library, name, None)) is not None:
            function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
            # One core's, times the cores: a core that has other work would make all of them slow.
            run = functools.partial(function, 1 << 14)
            peaks[name] = _rate(run, run()) * min(threads, machine.cores())
    return reads, peaks


def _of_gpu() -> tuple[dict[int, float], dict[str, float]]:
    def rate(run: Callable[[], Any], amount: float) -> float:
        run()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()  # type: ignore[no-untyped-call]
        for _ in range(_RUNS):
            run()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        ms: float = begin.elapsed_time(end)  # type: ignore[no-untyped-call]
        return amount * _RUNS / ms / 1e6

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    # A copy reads and writes.
    reads = {source.nbytes: rate(lambda: copy.copy_(source), 2 * source.nbytes)}
    n = 8192

    def matmul(dtype: torch.dtype) -> Callable[[], Tensor]:
        a = torch.ones(n, n, device="cuda").to(dtype)
        if dtype.itemsize > 1:
            return lambda: a @ a
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)

    peaks = {}
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        with contextlib.suppress(RuntimeError):  # a GPU without FP8
            peaks[str(dtype).removeprefix("torch.")] = rate(matmul(dtype), 2 * n**3)
    return reads, peaks
