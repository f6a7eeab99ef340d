"""Numbers as people read them: three digits, and a unit."""

import math
from collections.abc import Iterable
from typing import Any


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else ``None``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def three_digits(value: float) -> str:
    """``"0.0312"``, ``"3.1"``, ``"312"``."""
    return f"{float(f'{value:.3g}'):g}"


def _scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    """In the first unit of which it is at least one, after it is rounded; else in the last."""
    unit = 1.0, ""
    for unit in units:
        if float(f"{abs(value):.3g}") >= unit[0]:
            break
    return f"{three_digits(value / unit[0])} {unit[1]}"


def seconds(value: Any) -> str:
    """``"2 min 5 s"``, ``"1.2 s"``, ``"340 ms"``, ``"41 µs"``; ``""`` if it is no number."""
    if (found := number(value)) is None:
        return ""
    if abs(found) >= 120:
        minutes, rest = divmod(round(abs(found)), 60)
        return f"{'-' * (found < 0)}{minutes} min {rest} s"
    return "0 s" if found == 0 else _scaled(found, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def size(value: Any) -> str:
    """``"3.1 MB"``; ``""`` if it is no number."""
    if (found := number(value)) is None:
        return ""
    return _scaled(found, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def share(value: Any) -> str:
    """``"93 %"``, ``"0.4 %"``; ``""`` if it is no number."""
    if (found := number(value)) is None:
        return ""
    if 0.0995 <= abs(found) < 0.995 or found in (0, 1):
        return f"{100 * found:.0f} %"
    # Nearly all is not all.
    return f"{min(100 * found, 99.9) if found < 1 else 100 * found:.1f} %"


def plain(value: Any) -> str:
    """Three digits; ``""`` if it is no number."""
    return "" if (found := number(value)) is None else three_digits(found)


def plural(count: int, one: str) -> str:
    """``"1 graph break"``, ``"2 graph breaks"``; the plural is made with "s", or with "es" after "s"."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}{'es' if one.endswith('s') else 's'}"
