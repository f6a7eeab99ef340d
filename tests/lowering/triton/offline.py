"""Triton kernels compiled for GPUs that are not there, and what their machine code says about them.

The ``triton`` package alone is enough: it brings the compilers, assemblers and disassemblers of both vendors. Nothing
is run. What a compiler does not check is checked here: whether the kernel fits on the chip, and whether it spills.

A compiler that fails may abort its process, and Triton 3.6 mixes up the FP8 formats of two AMD targets in one process:
``Offline`` compiles in workers, each for one target. ``python -P offline.py TARGET`` is such a worker.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel is compiled for, and what it may use there.

    Args:
        name: as in ``TARGETS``.
        backend: of Triton's: ``"hip"`` or ``"cuda"``.
        arch: ``"gfx950"``, or the compute capability times ten.
        warp_size: threads.
        shared_limit: bytes of shared memory (LDS) that one block may use.
        tensor_memory_limit: columns of tensor memory, where the chip has one.
    """

    name: str
    backend: str
    arch: str | int
    warp_size: int
    shared_limit: int
    tensor_memory_limit: int | None = None


TARGETS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("gfx942", "hip", "gfx942", 64, 64 * KIB),
        Chip("gfx950", "hip", "gfx950", 64, 160 * KIB),
        Chip("gfx1100", "hip", "gfx1100", 32, 64 * KIB),
        Chip("sm_80", "cuda", 80, 32, 163 * KIB),
        Chip("sm_90", "cuda", 90, 32, 227 * KIB),
        Chip("sm_100", "cuda", 100, 32, 227 * KIB, 512),
        Chip("sm_120", "cuda", 120, 32, 99 * KIB),
    )
}


# --- figures


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of one pass through the loop that holds the kernel's matrix instructions.

    Args:
        instructions: all of them.
        mma: matrix instructions.
        shared_reads: reads of shared memory (LDS).
        valu: vector instructions that are neither matrix instructions, nor conversions, nor moves between accumulators
            and other registers. None on NVIDIA.
        conversions: ``v_cvt_*``. None on NVIDIA.
    """

    instructions: int
    mma: int
    shared_reads: int
    valu: int | None = None
    conversions: int | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the machine code of one kernel says.

    Args:
        registers: of one thread: on AMD VGPRs, with those that hold accumulators.
        accumulator_registers: AMD: those of ``registers`` that are AGPRs.
        spills: accesses to memory for want of registers: AMD: VGPRs spilled; NVIDIA: STL and LDL instructions.
        scalar_spills: AMD: SGPRs spilled, to lanes of VGPRs and so without a memory access: no fault by itself.
        stack: bytes of private memory of one thread.
        shared: bytes of shared memory (LDS) of one block.
        tensor_memory: columns of tensor memory.
        instructions: of the whole kernel, without NOPs on NVIDIA.
        opcodes: how often each instruction stands in the whole kernel. The AMD instructions that take any small float
            say in a modifier which: that of each operand is appended, as ``v_mfma_f32_32x32x64_f8f6f4.fp8.fp4``.
        loop: the loop with the most matrix instructions among those that hold no smaller such loop.
    """

    registers: int
    accumulator_registers: int
    spills: int
    scalar_spills: int
    stack: int
    shared: int
    tensor_memory: int
    instructions: int
    opcodes: dict[str, int]
    loop: Loop | None

    @property
    def mma(self) -> dict[str, int]:
        """The matrix instructions among ``opcodes``."""
        return {opcode: count for opcode, count in self.opcodes.items() if is_mma(opcode)}

    @property
    def instructions_per_mma(self) -> float | None:
        """Of the loop."""
        return self.loop.instructions / self.loop.mma if self.loop else None

    def count(self, pattern: str) -> int:
        """How many instructions of the kernel begin with the regular expression."""
        return sum(count for opcode, count in self.opcodes.items() if re.match(pattern, opcode))

    def problems(self, chip: Chip) -> list[str]:
        """Why the kernel is slow or cannot be launched: what spills, what is over a limit of the chip."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills of vector registers to memory")
        elif self.stack:
            found.append(f"{self.stack} bytes of private memory a thread")
        if self.shared > chip.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, {chip.name} has {chip.shared_limit}")
        limit = chip.tensor_memory_limit or 0
        if self.tensor_memory > limit:
            found.append(f"{self.tensor_memory} columns of tensor memory, {chip.name} has {limit}")
        return found

    def golden(self) -> dict[str, Any]:
        """What is worth comparing with a file, ready for JSON: without the opcodes that are no matrix instructions."""
        figures = dataclasses.asdict(self)
        del figures["opcodes"]
        return {**figures, "mma": self.mma, "instructions_per_mma": self.instructions_per_mma}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Figures":
        """The inverse of ``dataclasses.asdict``, through JSON or not."""
        loop = figures["loop"]
        return cls(**{**figures, "loop": Loop(**loop) if loop else None})


@dataclasses.dataclass(frozen=True)
class Failure:
    """A kernel that does not compile.

    Args:
        reason: what the compiler says, without its dumps.
    """

    reason: str


# AMD's, then NVIDIA's of registers (HMMA), warp groups (HGMMA) and tensor memory (UTCHMMA).
_MMA = re.compile(r"v_(?:mfma|smfmac|wmma|swmmac)_|(?:UTC)?[BDHIOQ]?G?MMA\b")
# The element that each value of cbsz (first operand) and blgp (second) stands for. 0 is not written.
_SMALL_FLOATS = ("fp8", "bf8", "fp6", "bf6", "fp4")


def is_mma(opcode: str) -> bool:
    """Whether it multiplies matrices."""
    return _MMA.match(opcode) is not None


def _loops(lines: Sequence[str], label: re.Pattern[str], branch: re.Pattern[str]) -> list[range]:
    """The lines of each loop: from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for number, line in enumerate(lines):
        if found := label.match(line):
            labels[found[1]] = number
        elif (found := branch.match(line)) and found[1] in labels:
            ends[labels[found[1]]] = number
    return [range(start, end + 1) for start, end in ends.items()]


def _mma_loop(opcodes: Sequence[str | None], loops: Sequence[range]) -> collections.Counter[str] | None:
    """The instructions of the innermost loop with matrix instructions; of several the one with the most.

    Args:
        opcodes: of each line.
        loops: lines.
    """
    counted = [(lines, collections.Counter(op for op in opcodes[lines.start : lines.stop] if op)) for lines in loops]
    holding = [(lines, counts) for lines, counts in counted if any(map(is_mma, counts))]
    innermost = [
        counts
        for lines, counts in holding
        if not any(lines != other and lines.start <= other.start and other.stop <= lines.stop for other, _ in holding)
    ]
    return max(innermost, key=lambda counts: _total(counts, is_mma), default=None)


def _counts(
    code: str, opcode: Callable[[str], str | None], label: re.Pattern[str], branch: re.Pattern[str]
) -> tuple[collections.Counter[str], collections.Counter[str] | None]:
    """The instructions of a kernel, and those of its innermost loop with matrix instructions."""
    lines = code.splitlines()
    opcodes = [opcode(line) for line in lines]
    inner = _mma_loop(opcodes, _loops(lines, label, branch))
    return collections.Counter(found for found in opcodes if found), inner


def _total(counts: Mapping[str, int], chosen: Callable[[str], bool]) -> int:
    return sum(count for opcode, count in counts.items() if chosen(opcode))


_AMD_INSTRUCTION = re.compile(r"\t([a-z][a-z0-9_]+)(?:\s|$)")
_AMD_LABEL = re.compile(r"(\.L?BB\d+_\d+):")
_AMD_BRANCH = re.compile(r"\ts_c?branch\w*\s+(\.L?BB\d+_\d+)")


def _amd_opcode(line: str) -> str | None:
    found = _AMD_INSTRUCTION.match(line)
    if not found:
        return None
    if not found[1].endswith("_f8f6f4"):
        return found[1]
    kinds = [re.search(rf"\b{modifier}:(\d)", line) for modifier in ("cbsz", "blgp")]
    return ".".join([found[1], *(_SMALL_FLOATS[int(kind[1]) if kind else 0] for kind in kinds)])


def _amd_is_valu(opcode: str) -> bool:
    return opcode.startswith("v_") and not is_mma(opcode) and not opcode.startswith(("v_cvt", "v_accvgpr"))


def amd_figures(asm: str, shared: int) -> Figures:
    """Figures of AMD assembly.

    Args:
        asm: of one kernel, with its metadata.
        shared: bytes; LDS is allocated at launch, so the assembly says 0.
    """

    def metadata(key: str) -> int:
        found = re.search(rf"^\s*(?:-\s*)?\.{key}:\s*(\d+)", asm, re.MULTILINE)
        if not found:
            raise ValueError(f"the assembly has no .{key}")
        return int(found[1])

    counts, inner = _counts(asm, _amd_opcode, _AMD_LABEL, _AMD_BRANCH)
    return Figures(
        registers=metadata("vgpr_count"),
        # Only chips that have such registers count them.
        accumulator_registers=metadata("agpr_count") if ".agpr_count:" in asm else 0,
        spills=metadata("vgpr_spill_count"),
        scalar_spills=metadata("sgpr_spill_count"),
        stack=metadata("private_segment_fixed_size"),
        shared=shared,
        tensor_memory=0,
        instructions=counts.total(),
        opcodes=dict(sorted(counts.items())),
        loop=None
        if inner is None
        else Loop(
            instructions=inner.total(),
            mma=_total(inner, is_mma),
            shared_reads=_total(inner, lambda opcode: opcode.startswith(("ds_read", "ds_load"))),
            valu=_total(inner, _amd_is_valu),
            conversions=_total(inner, lambda opcode: opcode.startswith("v_cvt")),
        ),
    )


# An address, perhaps a predicate (@!P0, @UP1, @!UPT), the opcode with its modifiers.
_SASS_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")
_SASS_LABEL = re.compile(r"(\.L_x_\d+):")
_SASS_BRANCH = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?BRA\b.*`\((\.L_x_\d+)\)")


def _sass_opcode(line: str) -> str | None:
    found = _SASS_INSTRUCTION.match(line)
    return found[1] if found and found[1] != "NOP" else None


def nvidia_figures(sass: str, usage: str, shared: int, tensor_memory: int) -> Figures:
    """Figures of NVIDIA machine code.

    Args:
        sass: by ``nvdisasm -c``, of one kernel.
        usage: by ``cuobjdump -res-usage``.
        shared: bytes, with what is allocated at launch.
        tensor_memory: columns.
    """

    def used(key: str) -> int:
        found = re.search(rf"\b{key}:(\d+)", usage)
        if not found:
            raise ValueError(f"cuobjdump says nothing of {key}: {usage}")
        return int(found[1])

    counts, inner = _counts(sass, _sass_opcode, _SASS_LABEL, _SASS_BRANCH)
    return Figures(
        registers=used("REG"),
        accumulator_registers=0,
        spills=_total(counts, lambda opcode: opcode.split(".")[0] in ("STL", "LDL")),
        scalar_spills=0,
        stack=used("STACK"),
        shared=shared,
        tensor_memory=tensor_memory,
        instructions=counts.total(),
        opcodes=dict(sorted(counts.items())),
        loop=None
        if inner is None
        else Loop(
            instructions=inner.total(),
            mma=_total(inner, is_mma),
            shared_reads=_total(inner, lambda opcode: opcode.split(".")[0] in ("LDS", "LDSM")),
        ),
    )


# --- one kernel, in this process


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel that compiles.

    Args:
        target: a key of ``TARGETS``.
        asm: what Triton keeps of each stage: ``"ttgir"``, ``"llir"``, ``"amdgcn"`` or ``"ptx"``, ``"cubin"``...
        shared: bytes of shared memory of one block.
        tensor_memory: columns.
    """

    target: str
    asm: Mapping[str, Any]
    shared: int
    tensor_memory: int

    def figures(self) -> Figures:
        """NVIDIA's are of the binary, by the tools that Triton brings."""
        if TARGETS[self.target].backend == "hip":
            return amd_figures(self.asm["amdgcn"], self.shared)
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            sass = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
            usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        return nvidia_figures(sass, usage, self.shared, self.tensor_memory)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _StubDriver:
    """What Triton asks a driver while it traces. Without one it takes the wrong branch and does not say so."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


@contextlib.contextmanager
def _stub_driver(target: Any) -> Iterator[None]:
    from triton.runtime.driver import driver

    active = driver._active  # driver.active would look for a real one
    driver.set_active(_StubDriver(target))
    try:
        yield
    finally:
        driver.set_active(active)


@contextlib.contextmanager
def _imported(source: str) -> Iterator[ModuleType]:
    """Triton reads a kernel from a file: this one lasts as long as the kernel is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.py")
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def compile_source(
    source: str,
    name: str,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    options: Mapping[str, object],
    divisible: Collection[str] = (),
) -> Compiled:
    """Compile a kernel to machine code, specialized as a launch with aligned tensors below 2 GiB would.

    Args:
        source: text of a Python module.
        name: of a ``triton.jit`` function in it.
        signature: type of each argument that is no constant: ``"*bf16"``, ``"*u8"``, ``"*fp8e4nv"``, ``"i32"``...
        constants: value of each other argument.
        target: a key of ``TARGETS``.
        options: ``num_warps``, ``num_stages`` and the other options of the target's compiler.
        divisible: integer arguments that are multiples of 16. Pointers always are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    chip = TARGETS[target]
    gpu = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    # Triton ignores those.
    unknown = options.keys() - {field.name for field in dataclasses.fields(make_backend(gpu).parse_options({}))}
    if unknown:
        raise ValueError(f"{target} has no options {sorted(unknown)}")
    pointer = [["tt.divisibility", 16], *([["tt.pointer_range", 32]] if chip.backend == "hip" else [])]
    with _stub_driver(gpu), _imported(source) as module:
        kernel = getattr(module, name)
        given = {*signature, *constants}
        if given != {*kernel.arg_names} or not given.issuperset(divisible):
            raise ValueError(f"{name} takes {kernel.arg_names}, given are {sorted(given.union(divisible))}")
        types = {arg: "constexpr" if arg in constants else signature[arg] for arg in kernel.arg_names}
        attributes = {
            (index,): pointer if kind.startswith("*") else [["tt.divisibility", 16]]
            for index, (argument, kind) in enumerate(types.items())
            if kind.startswith("*") or argument in divisible
        }
        compiled = triton.compile(
            ASTSource(kernel, types, constexprs=dict(constants), attrs=attributes), target=gpu, options=dict(options)
        )
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Compiled(target, compiled.asm, compiled.metadata.shared, tensor_memory)


# --- many kernels, in processes of their own


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of ``compile_source``. Constants must pickle, as numbers, strings and Triton's dtypes do."""

    source: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    target: str
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    divisible: Collection[str] = ()


# What a compiler prints for people, without the place before it, which is in a temporary file or inside Triton.
_COMPLAINT = re.compile(r"\b(?:LLVM ERROR|fatal\s*:|error\s*:|Assertion `).*")
# Dumps of stacks and modules, and what every failure says.
_NOISE = re.compile(r"\s*$|\s*(?:#\d|%|\^|//)|Repro command|.*processing an MLIR pass pipeline")
_SHORT = 300


def shortened(error: str, printed: str) -> str:
    """One line that says why a kernel does not compile.

    Args:
        error: of Python.
        printed: to stderr, with whole modules in it.
    """
    lines = [line.strip() for line in error.splitlines() if not _NOISE.match(line)]
    outputs = [line.strip() for line in printed.splitlines() if not _NOISE.match(line)]
    complaints = [found[0] for line in outputs if (found := _COMPLAINT.search(line))]
    # Triton's own errors begin with the source and end with what is wrong in it.
    said = [*lines[:1], *lines[1:][-2:], *(complaints or outputs[-1:])]
    return "; ".join(line[:_SHORT].rstrip(":") for line in dict.fromkeys(said[:6]))


class _Worker:
    """A process that compiles for one target."""

    def __init__(self, target: str, environment: Mapping[str, str]) -> None:
        self.target = target
        self._printed = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs, self._answers = self._process.stdin, self._process.stdout

    def compile(self, job: Job, timeout: float) -> Figures | Failure:
        """A job that kills the worker, or takes longer than the timeout, leaves it dead."""
        before = self._printed_bytes()
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            pickle.dump(vars(job), self._jobs)
            self._jobs.flush()
            answer = json.loads(self._answers.readline() or "null")
        except BrokenPipeError:
            answer = None
        except BaseException:
            self._process.kill()  # its answer would be taken for that of the next job
            raise
        finally:
            timer.cancel()
        if answer is not None and "error" not in answer:
            return Figures.from_dict(answer)
        if answer is not None:
            return Failure(shortened(answer["error"], self._read(before)))
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        ended = f"took longer than {timeout:g} s" if late.is_set() else f"the compiler's process ended: {how}"
        return Failure(shortened(ended, self._read(before)))

    def _printed_bytes(self) -> int:
        return os.fstat(self._printed.fileno()).st_size

    def _read(self, start: int) -> str:
        """What was printed from a byte on. Seeking would move the worker, too: it shares the position."""
        return os.pread(self._printed.fileno(), self._printed_bytes() - start, start).decode(errors="replace")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._printed.close()


class Offline:
    """Compiles jobs, of whatever target, in one worker at a time.

    Keeps the last worker, as starting one costs more than most kernels: it is best asked for many kernels of one
    target in a row. What Triton compiled for another run does not answer for this one, unless the environment variable
    ``TRITON_CACHE_DIR`` says where it is.

    Args:
        timeout: seconds that one job may take.
    """

    def __init__(self, timeout: float = 120.0) -> None:
        self._timeout = timeout
        self._cache = tempfile.TemporaryDirectory(prefix="quark-inductor-triton-", ignore_cleanup_errors=True)
        self._worker: _Worker | None = None

    def __enter__(self) -> "Offline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def compile(self, jobs: Sequence[Job]) -> list[Figures | Failure]:
        """What came of each job, in their order."""
        results: dict[int, Figures | Failure] = {}
        # Those of the worker that is there come first.
        here = self._worker.target if self._worker else ""
        for index in sorted(range(len(jobs)), key=lambda i: (jobs[i].target != here, jobs[i].target)):
            results[index] = self._worker_for(jobs[index].target).compile(jobs[index], self._timeout)
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        """End the worker and remove what it cached."""
        if self._worker:
            self._worker.close()
            self._worker = None
        self._cache.cleanup()

    def _worker_for(self, target: str) -> _Worker:
        if self._worker and (self._worker.target != target or not self._worker.alive):
            self._worker.close()
            self._worker = None
        if not self._worker:
            # Line numbers are no code. Under the interpreter nothing would be compiled.
            defaults = {"TRITON_CACHE_DIR": self._cache.name, "TRITON_DISABLE_LINE_INFO": "1"}
            environment = {**defaults, **os.environ}
            environment.pop("TRITON_INTERPRET", None)
            self._worker = _Worker(target, environment)
        return self._worker


def _serve(target: str) -> None:
    """Read jobs from stdin, each pickled; answer each in a line of JSON on what was stdout."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # that a compiler aborts is expected
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers print where they like
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        assert job["target"] == target
        try:
            answer = dataclasses.asdict(compile_source(**job).figures())
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
