"""The PTX that decodes 4-bit weights, instruction by instruction, against what it stands for.

Neither the interpreter nor any test without a GPU can run it: here an evaluator of the few instructions does.
"""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quark_inductor.lowering.triton as provider
from quark_inductor.lowering.triton.source import functions
from quark_inductor.schemes.numerics import fp4

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
NAMES = {"bf16": "bfloat16", "f16": "float16"}
WORDS = np.arange(1 << 16, dtype=np.uint32)
# Every int16 in the lower half, and another one in the upper.
PAIRS = WORDS | ((WORDS * np.uint32(40503) + 12345) & 0xFFFF) << 16


def assembly() -> list[tuple[str, str, list[str]]]:
    """Of each inline assembly of ``decode.py``: the function it is in, its text, and the dtypes of its results."""
    tree = ast.parse(Path(str(provider.__file__)).with_name("decode.py").read_text())
    found = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "tl.inline_asm_elementwise":
                text = call.args[0]
                assert isinstance(text, ast.Constant)
                dtype = next(keyword.value for keyword in call.keywords if keyword.arg == "dtype")
                found.append((function.name, str(text.value), re.findall(r"tl\.(\w+)", ast.unparse(dtype))))
    return found


def text_of(function: str, dtype: str = "") -> str:
    (text,) = [text for name, text, dtypes in assembly() if name == function and dtype in ("", *dtypes)]
    return text


def numbers(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Pairs in 32 bits, the lower first, as numbers ``[..., 2]``."""
    return torch.from_numpy(np.ascontiguousarray(bits, np.uint32).view(np.int16).reshape(-1, 2)).view(dtype)


def pairs(x: Tensor) -> np.ndarray:
    """The inverse of :func:`numbers`."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint32).reshape(-1)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """``a * b + c``, rounded once: products of such numbers are exact in float64, and here sums are."""
    x, y, z = (numbers(value, dtype).double() for value in np.broadcast_arrays(a, b, c))
    exact = x * y + z
    return pairs(exact.float().to(dtype) if dtype == torch.bfloat16 else exact.to(dtype))


def run(text: str, results: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """What ``$0``, ... hold after the instructions, all of 32 bits."""
    registers = {f"${results + i}": np.asarray(value, np.uint32) for i, value in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.asarray(int(name, 0), np.uint32)

    for line in re.findall(r"[^{};]+", text):
        opcode, _, rest = line.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        to, *operands = [word.strip() for word in rest.split(",")]
        a, *others = map(value, operands)
        match opcode.split("."):
            case ["shl", "b32"]:
                registers[to] = a << others[0]
            case ["shr", "u32"]:
                registers[to] = a >> others[0]
            case ["and", "b32"]:
                registers[to] = a & others[0]
            case ["lop3", "b32"]:
                b, c, table = others
                terms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8))
                registers[to] = sum((term for i, term in enumerate(terms) if int(table) >> i & 1), a & 0)
            case ["fma", "rn", ("bf16x2" | "f16x2") as pair]:
                registers[to] = fused(a, others[0], others[1], DTYPES[pair.removesuffix("x2")])
            case _:
                raise NotImplementedError(line)
    return [registers[f"${i}"] for i in range(results)]


def nibble(i: int) -> Tensor:
    """Nibble i of each half of ``PAIRS``."""
    return torch.from_numpy(np.stack([PAIRS >> 4 * i & 15, PAIRS >> 16 + 4 * i & 15], -1).astype(np.int32))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", DTYPES)
def test_integers(kind: str, signed: bool) -> None:
    dtype, moved = DTYPES[kind], 8 if signed else 0
    magic = (0x4300 if kind == "bf16" else 0x6400) + moved
    offset = (128 if kind == "bf16" else 1024) + moved
    quarters = run(text_of("nibbles"), 4, PAIRS, np.asarray(magic * 0x10001))
    for i, bits in enumerate(quarters):
        codes = nibble(i)
        codes = (codes ^ 8) - 8 if signed else codes
        assert torch.equal(numbers(bits, dtype).int(), codes + offset)
        for zero in (-8, 0, 7) if signed else (0, 8, 15):
            minus = pairs(torch.tensor([-offset - zero] * 2, dtype=dtype))
            one = pairs(torch.ones(2, dtype=dtype))
            (difference,) = run(text_of("multiply_add", NAMES[kind]), 1, bits, one, minus)
            assert torch.equal(numbers(difference, dtype).int(), codes - zero)
            scale = torch.tensor([0.0123, 57.3], dtype=dtype)
            (product,) = run(text_of("multiply_add", NAMES[kind]), 1, difference, pairs(scale), np.asarray(0x80008000))
            assert torch.equal(numbers(product, dtype), ((codes - zero).float() * scale.float()).to(dtype))


# Of E8M0 all, but that 2**-127 and NaN are not 0 and infinity; of E4M3 some.
SCALES = {"bf16": [2.0**i for i in range(-127, 128, 12)] + [2.0**127, float("nan")], "f16": [2.0**-9, 0.4375, 448.0]}


@pytest.mark.parametrize("kind", DTYPES)
def test_fp4(kind: str) -> None:
    dtype = DTYPES[kind]
    table = fp4.decode(torch.arange(16, dtype=torch.uint8))
    factor = pairs(torch.tensor([2.0**126 if kind == "bf16" else 2.0**14] * 2, dtype=dtype))
    fma, minus_zero = text_of("multiply_add", NAMES[kind]), np.asarray(0x80008000)
    for i, bits in enumerate(run(text_of("fp4_quarters", NAMES[kind]), 4, PAIRS)):
        expected = table[nibble(i).long()].double()
        (plain,) = run(fma, 1, bits, factor, minus_zero)
        assert torch.equal(numbers(plain, dtype).double(), expected)
        for scale in SCALES[kind]:
            (scaled,) = run(fma, 1, plain, pairs(torch.tensor([scale] * 2, dtype=dtype)), minus_zero)
            wanted = (expected.float() * scale).to(dtype)
            assert torch.equal(numbers(scaled, dtype).nan_to_num(7.0), wanted.nan_to_num(7.0))


# --- and NVIDIA's assembler


KERNEL = """
import triton
import triton.language as tl
{functions}

@triton.jit
def kernel(W, S, Y, N: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    w = tl.load(as_words(W) + at)
    DOT: tl.constexpr = tl.{dtype}
    q0, q1, q2, q3 = {call}
    tl.store(Y + at, q0 + q1 + q2 + q3)
"""
CALLS = [
    "int4_quarters(w, tl.full((16, 1), 3, tl.int32), True, DOT, True)",
    "fp4_quarters(w, tl.load(S + tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :])"
    ".to(tl.float32), 16, 256, 32, DOT, True)",
    "int4_by_groups(w, tl.load(as_words(W) + tl.arange(0, 64))[None, :], "
    "tl.load(S + tl.arange(0, 256))[None, :], 256, False, True, DOT, True)",
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_ptxas_takes_it(offline: Any, target: str) -> None:
    lib: ModuleType = sys.modules["offline"]
    jobs = []
    for call in CALLS:
        for kind, dtype in NAMES.items():
            pointer = {"bf16": "*bf16", "f16": "*fp16"}[kind]
            jobs.append(
                lib.Job(
                    source=KERNEL.format(functions=functions(call + " as_words("), dtype=dtype, call=call),
                    name="kernel",
                    signature={"W": "*i32", "S": pointer, "Y": pointer, "N": "constexpr"},
                    constants={"N": 1},
                    target=target,
                    options={"num_warps": 4},
                    divisible=("W", "S", "Y"),
                )
            )
    for figures in offline.compile(jobs):
        assert not isinstance(figures, lib.Failure), figures
        assert not figures.spills
