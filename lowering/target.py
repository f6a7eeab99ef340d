"""What the code will run on. The only place that asks hardware and library versions."""

import functools
import os
import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A device as lowerings see it.

    Attributes:
        device_type: torch's name: ``"cpu"``, ``"cuda"``, ...
        arch: ``"x86_64"``, ``"aarch64"`` on CPU; ``"sm_90"``, ``"gfx942"`` on GPU.
        isa: on CPU the instruction set kernels are written for: ``"avx512_vnni"`` or ``"portable"``; else ``""``.
    """

    device_type: str
    arch: str
    isa: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.device_type, self.arch, self.isa) if part)


# What the avx512_vnni kernels use, as torch.cpu.get_capabilities() spells it.
_AVX512_VNNI = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")


@functools.cache
def current(device_type: str = "cpu") -> Target:
    """The target of this process for a device type.

    The environment variable ``QUARK_INDUCTOR_ISA=portable`` chooses the portable CPU kernels where faster ones exist.
    """
    if device_type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = all(can.get(feature) for feature in _AVX512_VNNI) and os.environ.get("QUARK_INDUCTOR_ISA") != "portable"
        return Target(device_type="cpu", arch=platform.machine(), isa="avx512_vnni" if fast else "portable")
    if device_type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gcn = getattr(properties, "gcnArchName", "").partition(":")[0]
        return Target(device_type="cuda", arch=gcn or f"sm_{properties.major}{properties.minor}")
    return Target(device_type=device_type, arch="unknown")
