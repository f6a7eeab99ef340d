"""How fast memory is: a loop that reads the bytes of weights and does nothing else."""

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quark_inductor.schemes.errors import QuarkInductorError

# Each thread reads its own part of each weight, as the kernels do. Eight sums, so that no load waits for an addition.
_SOURCE = r"""
#include <cstdint>
#include <cstddef>
#include <cstring>
typedef uint64_t vec __attribute__((vector_size(64)));

static uint64_t sum(const char* begin, const char* end) {
  vec s[8] = {};
  for (const char* p = begin; p + 512 <= end; p += 512) {
    for (int i = 0; i < 8; i++) {
      __builtin_prefetch(p + 8192 + 64 * i, 0, 3);
      vec v;
      memcpy(&v, p + 64 * i, 64);
      s[i] += v;
    }
  }
  for (int i = 1; i < 8; i++) s[0] += s[i];
  uint64_t total = 0;
  for (int i = 0; i < 8; i++) total += s[0][i];
  return total;
}

extern "C" uint64_t raw_read(const char* const* parts, const size_t* sizes, size_t count, int threads) {
  uint64_t total = 0;
  for (size_t i = 0; i < count; i++) {
    size_t blocks = sizes[i] / 512;
    #pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int t = 0; t < threads; t++)
      total += sum(parts[i] + blocks * t / threads * 512, parts[i] + blocks * (t + 1) / threads * 512);
  }
  return total;
}
"""


def compiler() -> str:
    """The C++ compiler, which is that of Inductor."""
    return os.environ.get("CXX", "g++")


def build(source: str, what: str, *flags: str) -> Any:
    """A C++ source as a loaded library.

    Args:
        source: with ``extern "C"`` functions.
        what: it is, for an error.
        *flags: of the compiler.

    Raises:
        QuarkInductorError: it does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="quark-inductor-bench-") as directory:
        file, library = Path(directory, "source.cpp"), Path(directory, "library.so")
        file.write_text(source, encoding="utf-8")
        command = [compiler(), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *flags, str(file)]
        built = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False)
        if built.returncode:
            raise QuarkInductorError(f"{compiler()} cannot compile {what}:\n{built.stderr}")
        # Mapped: it may be deleted now.
        return ctypes.CDLL(str(library))


@functools.cache
def _library() -> Any:
    loaded = build(_SOURCE, "the loop that reads memory")
    loaded.raw_read.restype = ctypes.c_uint64
    loaded.raw_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return loaded


def raw_read(tensors: list[Any], threads: int) -> Callable[[], int]:
    """A call that reads all bytes of the tensors, but for less than 512 at the end of each."""
    function = _library().raw_read
    parts = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_size_t * len(tensors))(*(t.nbytes for t in tensors))

    def read() -> int:
        total: int = function(parts, sizes, len(tensors), threads)
        return total

    read.tensors = tensors  # type: ignore[attr-defined]  # keeps them alive
    return read
