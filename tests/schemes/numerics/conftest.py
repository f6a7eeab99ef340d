"""Random floating-point numbers of every magnitude."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def random_floats(seed: int, rows: int, size: int, dtype: str) -> np.ndarray:
    """Finite numbers ``[rows, size]`` of a dtype, as float32: every row of one of eight kinds, by turns.

    Any bit pattern (all exponents, subnormals); a normal distribution around any power of two; the same with outliers;
    mostly zeros of both signs; subnormals only; the largest magnitudes; few bits of mantissa, so that many quotients
    are ties; one magnitude with changing signs.
    """
    generator = np.random.default_rng(seed)
    number, largest = NUMPY[dtype], float(ml_dtypes.finfo(NUMPY[dtype]).max)
    smallest = float(ml_dtypes.finfo(number).smallest_subnormal)
    low, high = np.log2(smallest), np.log2(largest)

    def normal(rows: int) -> np.ndarray:
        exponents = generator.integers(int(low), int(high) - 2, (rows, 1))
        return np.ldexp(generator.standard_normal((rows, size)), exponents)

    def patterns(rows: int) -> np.ndarray:
        width = np.iinfo(BITS[dtype])
        found = generator.integers(0, width.max, (rows, size), dtype=BITS[dtype], endpoint=True).view(number)
        return np.where(np.isfinite(found.astype(np.float32)), found.astype(np.float64), 0.0)

    def with_outliers(rows: int) -> np.ndarray:
        x = normal(rows)
        x[np.arange(rows), generator.integers(0, size, rows)] *= 100.0
        return x

    def sparse(rows: int) -> np.ndarray:
        x = np.where(generator.random((rows, size)) < 0.05, normal(rows), 0.0)
        return np.where(generator.random((rows, size)) < 0.5, x, -x)

    def subnormal(rows: int) -> np.ndarray:
        return smallest * generator.integers(-200, 201, (rows, size))

    def large(rows: int) -> np.ndarray:
        return largest * (1 - generator.random((rows, size)) ** 4) * generator.choice([-1, 1], (rows, size))

    def ties(rows: int) -> np.ndarray:
        exponents = generator.integers(int(low) + 8, int(high) - 8, (rows, 1))
        return np.ldexp(generator.integers(-64, 65, (rows, size)).astype(np.float64), exponents)

    def even(rows: int) -> np.ndarray:
        return np.abs(normal(rows)[:, :1]) * generator.choice([-1, 1], (rows, size))

    kinds = [patterns, normal, with_outliers, sparse, subnormal, large, ties, even]
    x = np.concatenate([kind(len(range(i, rows, 8))) for i, kind in enumerate(kinds)])
    with np.errstate(over="ignore", under="ignore"):
        x = np.clip(x, -largest, largest).astype(np.float32).astype(number).astype(np.float32)
    return np.where(np.isfinite(x), x, np.float32(largest))  # what rounded beyond it


@pytest.fixture(scope="session")
def floats() -> Callable[[int, int, int, str], np.ndarray]:
    """:func:`random_floats`."""
    return random_floats
