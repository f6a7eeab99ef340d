"""How the bytes of a weight lie in memory: as its checkpoint has them, or packed for the kernels of a device.

Who has kernels for a packed layout registers it here; the ground knows none by name. A packed weight is one uint8
tensor with an exact inverse, and the emulation reads it through that.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """How a checkpoint holds a weight's codes.

    Attributes:
        format: the weight's format, see :mod:`.operands`.
        shape: of the tensor of codes.
        transposed: whether that is ``[K, N]`` (4-bit integers: ``[K, N / 8]``) and not ``[N, K]``.
        activation: the format of what it is multiplied with, ``""`` if that is not quantized. A layout may refuse a
            weight for it; :meth:`Layout.unpack` does not know it.
    """

    format: str
    shape: tuple[int, ...]
    transposed: bool = False
    activation: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters a packed tensor takes the place of: the codes, and a block format's scales."""
        return ("weight", "weight_scale") if self.format in BLOCK_FORMATS else ("weight",)


class Layout(ABC):
    """A packed layout.

    Attributes:
        name: what ops carry.
        device_type: where weights are packed so when they are loaded.
        rows: output features in one entry of a packed tensor's first dimension; 0: no part of it is a packed weight.
        experts: whether kernels read several weights at once, packed one after the other.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    rows: ClassVar[int]
    experts: ClassVar[bool] = True

    @abstractmethod
    def refuses(self, tensors: Sequence[Tensor], stored: Stored) -> str | None:
        """``None`` if a weight can be packed, else why not."""

    @abstractmethod
    def pack(self, tensors: Sequence[Tensor], stored: Stored) -> Tensor:
        """One uint8 tensor from those of :attr:`Stored.names`."""

    @abstractmethod
    def unpack(self, packed: Tensor, stored: Stored) -> list[Tensor]:
        """The inverse of :meth:`pack`, byte for byte, in plain torch."""


_LAYOUTS: dict[str, Layout] = {}


def register_layout(cls: type[Layout]) -> type[Layout]:
    """Class decorator: make a layout known. The first one of a device type is that of its weights."""
    if cls.name in _LAYOUTS:
        raise QuarkInductorError(f"two layouts are named {cls.name!r}; rename one")
    _LAYOUTS[cls.name] = cls()
    return cls


def named(name: str) -> Layout:
    """The layout of a name.

    Raises:
        ValueError: there is none; names the known ones.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"there is no layout {name!r}; expected one of {', '.join(sorted(_LAYOUTS)) or '(none)'}")
    return _LAYOUTS[name]


def layout_for(device_type: str, tensors: Sequence[Tensor], stored: Stored) -> Layout | None:
    """The layout in which a weight is kept on a device; ``None``: as the checkpoint has it."""
    for layout in _LAYOUTS.values():
        if layout.device_type == device_type and layout.refuses(tensors, stored) is None:
            return layout
    return None
