"""The quantize to a block format: what Inductor generates for it, interpreted, and compiled for GPUs."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from quark_inductor.lowering.triton import quantize
from quark_inductor.schemes.numerics import block

q = torch.ops.quark_inductor
GLOBAL_SCALE = torch.tensor(0.37)
FORMATS = [
    ("mxfp4", "even"),
    ("mxfp6_e2m3", "even"),
    ("mxfp6_e3m2", "even"),
    ("nvfp4", "sequential"),
    ("nvfp4", "combined"),
    ("amdfp4_g16", "nearest"),
    ("amdfp4_g32", "nearest"),
]


def load(name: str) -> ModuleType:
    """A module beside this one. Tests are no package from which it could be imported."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated: Any = load("generated")
offline: Any = load("offline")


def global_scale(format: str) -> tuple[Tensor, ...]:
    return (GLOBAL_SCALE,) if block.BLOCK_FORMATS[format].has_global_scale else ()


def quantizes(format: str, rule: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op as a function of the activation, and of a global scale where the format has one."""

    def quantized(x: Tensor, *scale: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = q.block_quantize(x, format, rule, *scale)
        return codes, scales

    return quantized


@pytest.fixture
def interpreted(interpreter: Any, gpu_code: Callable[..., str]) -> Callable[..., list[Tensor]]:
    """``interpreted(function, *tensors)``: its results by the kernels of a GPU, of which there are ``kernels``."""

    def run(fn: Callable[..., Any], *tensors: Tensor, kernels: int = 1) -> list[Tensor]:
        def run_kernel(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
            for name, left in interpreter.run(kernel.source, kernel.name, arguments, grid).items():
                arguments[name].copy_(left)

        code = gpu_code(generated.graph_of(fn, *tensors), tensors, arch="gfx950")
        assert len(generated.kernels(code)) == kernels
        found: list[Tensor] = generated.call(code, tensors, run_kernel)
        return found

    return run


def same(got: tuple[Tensor, ...] | list[Tensor], expected: tuple[Tensor, ...], format: str) -> None:
    """Bit for bit, but for the codes of blocks whose scale is NaN."""
    (codes, scales), f = got, block.BLOCK_FORMATS[format]
    assert [(t.dtype, t.shape, t.stride()) for t in got] == [(t.dtype, t.shape, t.stride()) for t in expected]
    assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))
    number = scales.view(torch.uint8) & 0x7F != 0x7F if f.scale == "e4m3" else scales != 255
    bytes_of = f.packed(f.size)
    blocks = (t.unflatten(-1, (-1, bytes_of))[number] for t in (codes, expected[0]))
    assert torch.equal(*blocks)


# --- numbers


def numbers(dtype: torch.dtype) -> Tensor:
    """Every number of 16 bits that is not negative, with infinity and NaN: float32 has those of bfloat16."""
    of = torch.bfloat16 if dtype == torch.float32 else dtype
    return torch.arange(1 << 15, dtype=torch.int32).to(torch.uint16).view(of).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("format", "rule"), FORMATS)
def test_every_number_as_the_maximum_of_a_block(
    interpreted: Callable[..., list[Tensor]],
    oracle: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    rule: str,
    dtype: torch.dtype,
) -> None:
    size = block.BLOCK_FORMATS[format].size
    # Halves of eighths, and of 12ths: ties of most formats. The largest is at a place that depends on the block.
    ratios = torch.cat([torch.arange(-size // 2, size // 2) / size, torch.arange(size) / (1.5 * size)]).view(2, size)
    maxima = numbers(dtype)
    x = maxima[:, None] * ratios[torch.arange(len(maxima)) % 2]
    x[torch.arange(len(x)), torch.arange(len(x)) % size] = maxima * (1 - 2 * (torch.arange(len(x)) // 2 % 2))
    x = x.to(dtype)
    monkeypatch.setattr(quantize, "ELEMENTS", 1 << 18)  # few programs: the interpreter is slow for each
    scale = global_scale(format)
    codes, scales = interpreted(quantizes(format, rule), x, *scale)
    same([codes, scales], block.quantize(x, format, rule, *scale), format)
    given = scale[0] if scale else None
    values = oracle.activation_values(codes, scales, given, None, format, torch.float32)
    expected = oracle.quantized_values(x, None, given, None, format, rule, 0, torch.float32)
    finite = np.isfinite(expected).all(-1)
    assert 0.9 < finite.mean() < 1
    np.testing.assert_array_equal(values[finite], expected[finite])
    assert not np.isfinite(values[~finite]).all(-1).any()


@pytest.mark.parametrize(("format", "rule"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (37, 96), (3, 5, 160), (64,), (129, 64)], ids=str)
def test_any_shape(interpreted: Callable[..., list[Tensor]], format: str, rule: str, shape: tuple[int, ...]) -> None:
    """With blocks that hold NaN, infinity and nothing; the last program has blocks past the end."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0.0
    flat = x.view(-1, 32)
    flat[-1, 5] = float("nan")
    flat[len(flat) // 2, 17] = -float("inf")
    flat[len(flat) // 3] = 0.0
    x, scale = x.bfloat16(), global_scale(format)
    same(interpreted(quantizes(format, rule), x, *scale), block.quantize(x, format, rule, *scale), format)


@pytest.mark.parametrize(
    "part", [lambda x: x[:, 32:96], lambda x: x[2:], lambda x: x.view(96, 8).t()], ids=["columns", "rows", "transposed"]
)
def test_a_part_of_a_tensor_is_copied(
    interpreted: Callable[..., list[Tensor]], part: Callable[[Tensor], Tensor]
) -> None:
    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = q.block_quantize(part(x), "mxfp4", "even")
        return codes, scales

    whole = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    same(
        interpreted(quantized, whole, kernels=2),
        block.quantize(part(whole).contiguous(), "mxfp4", "even"),
        "mxfp4",
    )


def test_what_is_computed_before_and_after(interpreted: Callable[..., list[Tensor]]) -> None:
    """The activation is a buffer, which is read again; codes and scales are read by other kernels."""
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu(x)
        codes, scales = q.block_quantize(y, "mxfp4", "even")
        return codes, scales, y * 2, codes.to(torch.int32) + 1, scales.to(torch.float32)

    codes, scales, *others = interpreted(fn, x, kernels=3)
    expected = fn(x)
    same([codes, scales], expected[:2], "mxfp4")
    for got, wanted in zip(others, expected[2:], strict=True):
        assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("result", [0, 1], ids=["codes", "scales"])
def test_one_result_that_nobody_reads(interpreted: Callable[..., list[Tensor]], result: int) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    (found,) = interpreted(lambda x: (q.block_quantize(x, "mxfp4", "even")[result],), x)
    assert torch.equal(found, block.quantize(x, "mxfp4", "even")[result])


# --- machine code


@pytest.fixture(scope="module")
def compiler() -> Iterator[Any]:
    with offline.Offline() as started:
        yield started


# Instructions of a number, at most: of the static code, and so with the rare ways of a division.
FAMILIES = {"mxfp4": 26, "mxfp6_e3m2": 36, "nvfp4": 44, "amdfp4_g16": 44}


@pytest.mark.parametrize("target", offline.TARGETS)
def test_machine_code(gpu_code: Callable[..., str], compiler: Any, target: str) -> None:
    """Nothing spills, and each thread reads 16 bytes at once."""
    chip, jobs = offline.TARGETS[target], {}
    for format, rule in FORMATS:
        if format not in FAMILIES or rule == "combined" or (format, target) == ("nvfp4", "sm_80"):
            continue
        x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
        scale = tuple(t.to("meta") for t in global_scale(format))
        (kernel,) = generated.kernels(gpu_code(quantizes(format, rule), (x, *scale), arch=target))
        constants = {name: kernel.constants[name] for name, kind in kernel.signature.items() if kind == "constexpr"}
        signature = {name: kind for name, kind in kernel.signature.items() if kind != "constexpr"}
        options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
        jobs[format] = offline.Job(kernel.source, kernel.name, signature, constants, target, options, kernel.divisible)
    for format, found in zip(jobs, compiler.compile([*jobs.values()]), strict=True):
        assert isinstance(found, offline.Figures), (format, found)
        assert found.problems(chip) == [], format
        assert found.count(r"buffer_load_(dwordx4|b128)|LDG\.E\.128") > 0, format
        assert found.instructions * quantize.WARPS * chip.warp_size / quantize.ELEMENTS <= FAMILIES[format], format
        assert found.registers <= 128, format
