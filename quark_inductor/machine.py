"""What a measurement depends on: facts about this machine and what is installed on it."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# Of /proc/cpuinfo, x86 and aarch64: instruction sets that kernels of quantized GEMMs are written for.
FLAGS = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512vbmi avx512_vnni avx512_bf16 avx512_fp16 gfni "
    "amx_tile amx_int8 amx_bf16 asimd asimddp bf16 i8mm sve sve2"
).split()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpuinfo(key: str) -> str:
    found = re.search(rf"^{key}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else ""


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cores() -> int:
    """How many physical cores those are."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(topology.format(cpu)) or cpu for cpu in usable_cpus()})


def last_level_cache() -> int:
    """Bytes of all last-level caches of those cores together; 0: unknown."""
    sizes: dict[str, int] = {}
    for cpu in usable_cpus():
        levels = sorted(Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"))
        if levels and (size := re.fullmatch(r"(\d+)K", _read(levels[-1] / "size"))):
            sizes[_read(levels[-1] / "shared_cpu_list")] = int(size[1]) * 1024
    return sum(sizes.values())


def huge_page_share(addresses: Iterable[int]) -> float:
    """How much of the mappings that hold these addresses is in transparent huge pages, from 0 to 1."""
    wanted, resident, huge, inside = list(addresses), 0, 0, False
    for line in _read("/proc/self/smaps").splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = int(mapping[1], 16), int(mapping[2], 16)
            inside = any(begin <= address < end for address in wanted)
        elif inside and (size := re.match(r"(Rss|AnonHugePages|ShmemPmdMapped):\s+(\d+)", line)):
            resident += int(size[2]) if size[1] == "Rss" else 0
            huge += int(size[2]) if size[1] != "Rss" else 0
    return huge / resident if resident else 0.0


class PeakMemory:
    """The most memory that this process has had resident since this was made."""

    def __init__(self) -> None:
        try:
            # Linux forgets the peak so far.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._since = False
        else:
            self._since = True

    def peak(self) -> int | None:
        """Bytes; ``None`` where the system cannot say since when."""
        found = re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE) if self._since else None
        return int(found[1]) * 1024 if found else None


def cache_folder() -> Path:
    """Where downloads and measurements are kept by default: a folder of ours in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "quark-inductor"


def cpu_model() -> str:
    """The CPU's name; ``""``: unknown."""
    return _cpuinfo("model name") or platform.processor()


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0]


def version_of(package: str) -> str:
    """The version of an installed package; ``""``: there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def facts() -> dict[str, Any]:
    """All of it, by name; what cannot be found out is empty."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    huge = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": cpu_model(),
        "cpu_family_model_stepping": "/".join(_cpuinfo(key) for key in ("cpu family", "model", "stepping")),
        "arch": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "logical_cpus": len(usable_cpus()),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "transparent_huge_pages": huge[1] if huge else "",
        "system": platform.system() + " " + platform.release(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version_of("torch"),
        "compiler": _first_line(os.environ.get("CXX", "g++"), "--version"),
    }
