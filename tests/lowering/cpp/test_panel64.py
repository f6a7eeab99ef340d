"""The layout of panels, byte by byte: where the docstring says that a code is, there it is."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quark_inductor.lowering.cpp.panel64 import Panel64
from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

LAYOUT = Panel64()
BITS = {"mxfp4": 4, "nvfp4": 4, "amdfp4_g16": 4, "amdfp4_g32": 4, "mxfp6_e2m3": 6, "mxfp6_e3m2": 6}
SHAPES = [(64, 32), (8, 96), (200, 64), (1100, 224), (24, 48), (72, 40)]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def cases(n: int, k: int) -> list[tuple[Stored, list[Tensor]]]:
    found: list[tuple[Stored, list[Tensor]]] = []
    for name, f in BLOCK_FORMATS.items():
        if k % f.size == 0 and f.packed(k) * f.size % 8 == 0:
            scales = (random((n, k // f.size), torch.uint8) % 190).view(f.scales_dtype)
            codes = random((n, f.packed(k)), f.codes_dtype)
            found.append((Stored(format=name, shape=tuple(codes.shape)), [codes, scales]))
    for name, dtype in (
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("int8", torch.int8),
        ("uint8", torch.uint8),
    ):
        found.append((Stored(format=name, shape=(n, k)), [random((n, k), dtype)]))
        found.append((Stored(format=name, shape=(k, n), transposed=True), [random((k, n), dtype)]))
    for name in ("int4", "uint4", "int4_order", "uint4_order"):
        found.append((Stored(format=name, shape=(n, k // 8)), [random((n, k // 8), torch.int32)]))
        found.append((Stored(format=name, shape=(k, n // 8), transposed=True), [random((k, n // 8), torch.int32)]))
    return found


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_round_trip(n: int, k: int) -> None:
    for stored, tensors in cases(n, k):
        assert LAYOUT.refuses(tensors, stored) is None
        packed = LAYOUT.pack(tensors, stored)
        assert packed.dtype == torch.uint8
        assert packed.shape[:2] == (-(-n // 64), -(-k // 32))
        for tensor, back in zip(tensors, LAYOUT.unpack(packed, stored), strict=True):
            assert (tensor.dtype, tensor.shape) == (back.dtype, back.shape), stored
            assert torch.equal(tensor.contiguous().view(torch.uint8), back.contiguous().view(torch.uint8)), stored


def codes_of(tensors: list[Tensor], stored: Stored) -> np.ndarray:
    """``[N, K]``, one code an entry, from the formats' definitions and nothing of ours."""
    held = tensors[0].contiguous()
    bits = BITS.get(stored.format, 4 if "int4" in stored.format else 8)
    if bits == 8:
        codes = held.view(torch.uint8).numpy()
    elif bits == 6 or stored.format in BITS:  # a stream of bits, the lowest first
        stream = np.unpackbits(held.numpy(), axis=1, bitorder="little").reshape(held.shape[0], -1, bits)
        codes = (stream << np.arange(bits)).sum(-1)
    else:
        order = range(8) if stored.format.endswith("_order") else (0, 4, 1, 5, 2, 6, 3, 7)
        words = held.numpy().view(np.uint32)
        codes = np.stack([words >> (4 * place) & 15 for place in order], -1).reshape(held.shape[0], -1)
    return codes.T if stored.transposed else codes


def place(bits: int, integer: bool, channel: int, k: int) -> int:
    """The first bit of a code in a tile of 64 x 32, after its scales: the docstring, written out."""
    chunk = ((channel // 16) * 4 + k // 8) * 16 * 8 * bits
    channel, k = channel % 16, k % 8
    if bits == 4:
        byte, high = {0: (0, 0), 4: (1, 0), 1: (2, 0), 5: (3, 0), 2: (0, 1), 6: (1, 1), 3: (2, 1), 7: (3, 1)}[k]
        return chunk + (channel * 4 + byte) * 8 + 4 * high
    half, t = k // 4 * 64, k % 4
    if integer:
        return chunk + (half + channel * 4 + t) * 8
    return chunk + (half + channel // 4 * 16 + t // 2 * 8 + channel % 4 * 2 + t % 2) * bits


@pytest.mark.parametrize(("n", "k"), [(72, 64), (24, 48)])
def test_where_a_code_is(n: int, k: int) -> None:
    for stored, tensors in cases(n, k):
        bits = BITS.get(stored.format, 4 if "int4" in stored.format else 8)
        integer = stored.format in ("int8", "uint8")
        packed, codes = LAYOUT.pack(tensors, stored).numpy(), codes_of(tensors, stored)
        size = BLOCK_FORMATS[stored.format].size if stored.format in BLOCK_FORMATS else 0
        scales = 64 * (32 // size) if size else 0
        assert packed.shape[2] == scales + 64 * 32 * bits // 8
        stream = np.unpackbits(packed[:, :, scales:], axis=2, bitorder="little")
        for channel in range(n):
            for column in range(k):
                at = place(bits, integer, channel % 64, column % 32)
                found = stream[channel // 64, column // 32, at : at + bits]
                code = int((found.astype(int) << np.arange(bits)).sum())
                expected = int(codes[channel, column]) ^ (128 if stored.format == "int8" else 0)
                assert code == expected, (stored, channel, column)
                if size:
                    byte = packed[channel // 64, column // 32, column % 32 // size * 64 + channel % 64]
                    assert byte == tensors[1].view(torch.uint8)[channel, column // size]


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int8", "fp8_e4m3"])
def test_padding_is_zero(format: str) -> None:
    stored, tensors = next(case for case in cases(8, 48 if format == "nvfp4" else 96) if case[0].format == format)
    packed = LAYOUT.pack(tensors, stored)
    wide = Stored(format=format, shape=(64, *stored.shape[1:]))
    codes, *scales = LAYOUT.unpack(packed, wide)
    assert not codes[8:].view(torch.uint8).any()
    assert not any(s[8:].view(torch.uint8).any() for s in scales)


def test_refusals() -> None:
    scales = torch.full((4, 2), 191, dtype=torch.uint8)
    stored = Stored(format="mxfp4", shape=(4, 32))
    assert LAYOUT.refuses([torch.zeros(4, 32, dtype=torch.uint8), scales], stored) == "it has block scales above 2^63"
    fnuz = Stored(format="fp8_e4m3fnuz", shape=(4, 32))
    assert LAYOUT.refuses([torch.zeros(4, 32, dtype=torch.float8_e4m3fnuz)], fnuz) == "fp8_e4m3fnuz is for GPUs"


@pytest.mark.parametrize(("n", "k"), SHAPES[:3])
def test_the_op_knows_its_results_without_the_bytes(n: int, k: int) -> None:
    """Schema, fake and eager implementation agree, for every kind of weight."""
    for stored, tensors in cases(n, k):
        packed = LAYOUT.pack(tensors, stored)
        args = packed, "panel64", stored.format, list(stored.shape), stored.transposed
        torch.library.opcheck(torch.ops.quark_inductor.unpack_weight.default, args, test_utils="test_faketensor")
