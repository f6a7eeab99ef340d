"""Memory for packed weights: in huge pages where the system gives some, which a kernel reads 15 % faster."""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
# Address space until it is written: of every chunk at most a part of one page is lost.
_CHUNK = 128 << 20
_ALIGNMENT = 64


class _Arena:
    """Hands out pieces of large chunks; a chunk is given back to the system when the last tensor in it is gone."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = self._end = 0

    def take(self, size: int) -> Tensor:
        self._used += -self._used % _ALIGNMENT
        if self._chunk is None or self._used + size > self._end:
            # A page more than asked for, because a mapping may begin anywhere.
            length = max(size, _CHUNK) + _HUGE_PAGE
            # Private: shared memory gets no huge pages.
            self._chunk = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._chunk.madvise(mmap.MADV_HUGEPAGE)
            begin = torch.frombuffer(self._chunk, dtype=torch.uint8).data_ptr()
            self._used = -begin % _HUGE_PAGE
            self._end = self._used + max(size, _CHUNK)
        piece = torch.frombuffer(self._chunk, dtype=torch.uint8, count=size, offset=self._used)
        self._used += size
        if self._used == self._end:
            self._chunk = None
        return piece


_arena = _Arena()


_short_lived: ContextVar[bool] = ContextVar("quark_inductor_short_lived", default=False)


@contextlib.contextmanager
def short_lived() -> Iterator[None]:
    """Inside, memory is for tensors that are copied soon: of a chunk they would keep what nobody uses again."""
    token = _short_lived.set(True)
    try:
        yield
    finally:
        _short_lived.reset(token)


def empty(*shape: int) -> Tensor:
    """An uninitialized uint8 tensor on the CPU."""
    size = torch.Size(shape).numel()
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE") or _short_lived.get():
        return torch.empty(shape, dtype=torch.uint8)
    return _arena.take(size).view(shape)


def return_freed() -> None:
    """Give memory that was freed back to the system, where the C library can."""
    # What quantizing a weight allocates and frees leaves glibc's heap in pieces, until it is as large as the float
    # model. Other C libraries have no such function, nor need it.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
