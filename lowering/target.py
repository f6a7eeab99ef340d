"""What the code will run on. The only place that asks hardware and library versions."""

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quark_inductor.schemes.errors import OptionError

# Instruction sets that kernels are written for, each with all that follow; what it needs beyond the next one, as
# torch.cpu.get_capabilities() spells it.
ISA_LEVELS: Mapping[str, tuple[str, ...]] = {
    "amx": ("amx_tile", "amx_bf16", "amx_int8"),
    "avx512_bf16": ("avx512_bf16", "avx512_vbmi"),
    "avx512_vnni": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"),
    "avx2": ("avx2", "fma3", "f16c"),
    "portable": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A device as lowerings see it.

    Attributes:
        device_type: torch's name: ``"cpu"``, ``"cuda"``, ...
        arch: ``"x86_64"``, ``"aarch64"`` on CPU; ``"sm_90"``, ``"gfx942"`` on GPU.
        isa: on CPU the best of :data:`ISA_LEVELS` it has; else ``""``.
    """

    device_type: str
    arch: str
    isa: str = ""

    def has(self, isa: str) -> bool:
        """Whether kernels written for an instruction set run here."""
        return self.isa in ISA_LEVELS and list(ISA_LEVELS).index(self.isa) <= list(ISA_LEVELS).index(isa)

    def __str__(self) -> str:
        return " ".join(part for part in (self.device_type, self.arch, self.isa) if part)


@functools.cache
def current(device_type: str = "cpu") -> Target:
    """The target of this process for a device type.

    The environment variable ``QUARK_INDUCTOR_ISA`` forces a lower one of :data:`ISA_LEVELS`.

    Raises:
        OptionError: it names none, or one that this CPU has not.
    """
    if device_type == "cpu":
        forced = os.environ.get("QUARK_INDUCTOR_ISA") or None
        return Target(device_type="cpu", arch=platform.machine(), isa=_isa(forced))
    if device_type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Target(device_type="cuda", arch=gpu_arch(properties))
    return Target(device_type=device_type, arch="unknown")


def gpu_arch(properties: Any) -> str:
    """A GPU's architecture: ``"sm_90"``, ``"gfx942"``."""
    gcn = getattr(properties, "gcnArchName", "").partition(":")[0]
    return gcn or f"sm_{properties.major}{properties.minor}"


def rocm_version() -> tuple[int, int] | None:
    """Major and minor version of the ROCm that torch is built for, ``None`` if it is not built for ROCm."""
    if torch.version.hip is None:
        return None
    major, minor, *_ = torch.version.hip.split(".")
    return int(major), int(minor)


def isa_refusals() -> dict[str, str]:
    """Why kernels of the levels above that of :func:`current` do not run here, by level."""
    can, best, whole = torch.cpu.get_capabilities(), current().isa, _isa(None)
    refusals: dict[str, str] = {}
    below = whole
    for isa in reversed(list(ISA_LEVELS)[: list(ISA_LEVELS).index(best)]):
        if list(ISA_LEVELS).index(isa) >= list(ISA_LEVELS).index(whole):
            refusals[isa] = f"QUARK_INDUCTOR_ISA is {best!r}"
        else:
            refusals[isa] = _lacks(isa, can) or f"it needs all of {below}"
            below = isa
    return refusals


def _lacks(isa: str, can: Mapping[str, bool]) -> str | None:
    """What this machine lacks of what a level has beyond the one below; ``None``: nothing."""
    if missing := [feature for feature in ISA_LEVELS[isa] if not can.get(feature)]:
        return f"the CPU has no {', '.join(missing)}"
    if isa == "amx" and not torch.cpu._init_amx():
        return "the system does not let a process use AMX"
    return None


def _isa(forced: str | None) -> str:
    can, found = torch.cpu.get_capabilities(), ["portable"]
    for isa in reversed(list(ISA_LEVELS)):
        if _lacks(isa, can) is not None:
            break
        found.append(isa)
    if forced is None:
        return found[-1]
    if forced not in found:
        raise OptionError(f"QUARK_INDUCTOR_ISA is {forced!r}; this CPU has {', '.join(dict.fromkeys(found))}")
    return forced
