"""Fused GEMMs of every pair of formats, with random operands, and what they should come to by the oracle.

A module of its own, given to tests by the fixture ``gemms``.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from quark_inductor.schemes.numerics.int4 import format_of
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

q = torch.ops.quark_inductor
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0, "uint8": 255.0, "int4": 7.0, "uint4": 15.0}
BLOCK_SIZES = {
    **dict.fromkeys(("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "amdfp4_g32"), 32),
    **dict.fromkeys(("nvfp4", "amdfp4_g16"), 16),
}


@dataclass(frozen=True)
class Weight:
    """A weight's format, and what shares a scale: of blocks ``"block"``, else ``"tensor"``, ``"channel"``, ``"group"``.

    ``offset``: with zero points. ``transposed``: stored so, as ``group`` weights in a checkpoint are. ``columns``: of
    a group.
    """

    format: str
    by: str = "block"
    offset: bool = False
    transposed: bool = False
    columns: int = 0

    @property
    def steps(self) -> tuple[int, int]:
        """What N and K must be multiples of."""
        packed = self.format.startswith(("int4", "uint4"))
        return 8 if packed else 1, self.columns or (8 if packed else BLOCK_SIZES.get(self.format, 1))


@dataclass(frozen=True)
class Activation:
    """An activation's format, scale rule, and what shares a scale; rule ``""``: it is quantized already."""

    format: str
    rule: str = ""
    by: str = "block"
    columns: int = 0

    @property
    def step(self) -> int:
        """What K must be a multiple of."""
        return self.columns or BLOCK_SIZES.get(self.format, 1)


@dataclass(frozen=True)
class Columns:
    """Neighbours along K that share a scale, where a format leaves the choice."""

    weight: int
    weight_block: int
    activation: int

    def of(self, weight: Weight) -> Weight:
        """With the columns of a group."""
        return dataclasses.replace(weight, columns=self.weight if weight.by == "group" else 0)

    def of_activation(self, x: Activation) -> Activation:
        """With the columns of a group."""
        return dataclasses.replace(x, columns=self.activation if x.by == "group" else 0)


_WEIGHTS = [
    *(Weight(format) for format in BLOCK_SIZES),
    *(Weight(format, by) for format in FP8 for by in ("tensor", "channel")),
    Weight("fp8_e5m2_5x128"),
    Weight("int8", "tensor", offset=True),
    Weight("int8", "channel"),
    Weight("int8", "channel", offset=True),
    Weight("int8", "group", offset=True, transposed=True),
    Weight("uint8", "tensor"),
    Weight("uint8", "channel", offset=True, transposed=True),
    Weight("uint8", "group", offset=True),
    *(
        Weight(format, by, offset=True)
        for format in ("int4", "uint4", "int4_order", "uint4_order")
        for by in ("channel", "group")
    ),
    Weight("int4_fp8", "channel", offset=True),
]
_PROLOGUES = [
    *(Activation(format, "even") for format in BLOCK_SIZES if format.startswith("mx")),
    Activation("mxfp8_e4m3", "rceil"),
    Activation("nvfp4", "combined"),
    Activation("nvfp4", "sequential"),
    Activation("amdfp4_g16", "nearest"),
    Activation("amdfp4_g32", "nearest"),
    *(
        Activation(format, rule, by)
        for format in FP8
        for rule, by in (("given", "tensor"), ("given", "token"), ("amax", "token"), ("amax", "group"))
    ),
    Activation("int8", "given", "tensor"),
    Activation("uint8", "given", "token"),
    *(
        Activation(format, rule, by)
        for format, by in (("int8", "token"), ("uint8", "group"), ("int4", "group"), ("uint4", "token"))
        for rule in ("symmetric", "asymmetric")
    ),
]
_QUANTIZED = [
    *(Activation(format) for format in BLOCK_SIZES),
    *(Activation(format, "", by) for format in (*FP8, "int8", "uint8") for by in ("tensor", "token", "group")),
]


class Pairs:
    """Every weight and activation, and pairs in which each of them occurs."""

    def __init__(self, columns: Columns, left_out: Callable[[Weight, Activation | None], bool]) -> None:
        self.columns, self.left_out = columns, left_out
        self.weights = [columns.of(weight) for weight in _WEIGHTS]
        self.weights.append(Weight(f"fp8_e4m3_16x{columns.weight_block}"))
        self.prologues = [columns.of_activation(x) for x in _PROLOGUES]
        self.quantized = [columns.of_activation(x) for x in _QUANTIZED]

    def __iter__(self) -> Iterator[tuple[Weight, Activation | None]]:
        """Those of the presets, then every one that has not occurred yet, each with another partner."""
        presets = [pair for pair in dict.fromkeys(map(self.of_preset, PRESETS.values())) if not self.left_out(*pair)]
        yield from presets
        prologues = [x for x in self.prologues if x not in {x for _, x in presets}]
        # Weights that no preset has come first, so that all of them do.
        weights = sorted(self.weights, key=lambda weight: weight in {weight for weight, _ in presets})
        for i, x in enumerate([*self.quantized, *prologues]):
            partners = (weights[(i + more) % len(weights)] for more in range(len(weights)))
            yield next(weight for weight in partners if not self.left_out(weight, x)), x

    def check_all_occur(self) -> None:
        """Fails if a format, or a preset, is in no pair."""
        pairs = list(self)
        assert {weight for weight, _ in pairs} == set(self.weights)
        assert {x for _, x in pairs} == {None, *self.prologues, *self.quantized}
        for name, spec in PRESETS.items():
            pair = self.of_preset(spec)
            assert pair in pairs or self.left_out(*pair), name

    def of_preset(self, spec: LinearSpec) -> tuple[Weight, Activation | None]:
        """The formats of a preset's GEMM, a scale that is computed for a whole tensor being given."""
        weight, x = spec.weight, spec.input
        assert weight is not None
        by = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}.get(weight.qscheme, "block")
        if weight.block_format is not None:
            of_weight = Weight(weight.block_format)
        elif weight.qscheme == "per_block":
            of_weight = self.weights[-1]  # cut off, as 128 x 128 would rarely be
        elif weight.second is not None:
            of_weight = Weight("int4_fp8", "channel", offset=True)
        elif weight.dtype in ("int4", "uint4"):
            of_weight = Weight(format_of(weight.dtype, spec.pack_method), by, offset=True)
        else:
            of_weight = Weight(weight.dtype, by, weight.dtype == "int8", weight.dtype == "int8" and by == "group")
        return self.columns.of(of_weight), None if x is None else self.columns.of_activation(_of_input(x))


def _of_input(x: TensorSpec) -> Activation:
    if x.block_format is not None:
        rule = x.scale_calculation_mode or ("sequential" if x.second is not None else "nearest")
        return Activation(x.block_format, rule)
    if x.qscheme == "per_tensor" or not x.is_dynamic:
        return Activation(x.dtype, "given", "tensor")
    rule = "amax" if x.dtype in FP8 else "symmetric" if x.symmetric else "asymmetric"
    return Activation(x.dtype, rule, "group" if x.qscheme == "per_group" else "token")


# --- operands


def codes(format: str, rows: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes of a block format, and its scales; some scales are 0 where that is a number."""
    size = BLOCK_SIZES[format]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    if "fp8" in format:
        made = (torch.randn(rows, k, generator=generator) * 9).to(FP8[format.removeprefix("mx")])
    else:
        made = integers(0, 256, rows, k * (6 if "fp6" in format else 4) // 8)
    shape = rows, k // size
    if format == "nvfp4":
        scale = (torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)).to(
            FP8["fp8_e4m3"]
        )
        return {"": made, "_scale": scale, "_scale_2": torch.tensor(0.37)}
    if format.startswith("amdfp4"):
        return {"": made, "_scale": integers(90, 125, *shape) * (torch.rand(shape, generator=generator) > 0.1)}
    return {"": made, "_scale": integers(120, 127, *shape)}


def weight_tensors(weight: Weight, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Of each argument of the op, its suffix."""
    if weight.format in BLOCK_SIZES:
        return codes(weight.format, n, k, generator)
    name = weight.format
    groups = k // (weight.columns or k)
    shape = {"tensor": (), "channel": (n,), "group": (n, groups)}.get(weight.by, ())
    if name.startswith("fp8"):
        if weight.by == "block":
            rows, columns = map(int, name.rpartition("_")[2].split("x"))
            shape = -(-n // rows), -(-k // columns)
        made = {"": (torch.randn(n, k, generator=generator) * 30).to(FP8[name[:8]])}
        shape_of_scale, float_dtype = shape, torch.float32 if weight.by == "block" else dtype
        made["_scale"] = (torch.rand(shape_of_scale, generator=generator) / 64 + 2**-9).to(float_dtype)
        return made
    scale = (torch.rand(shape, generator=generator) / 64 + 2**-9).to(torch.float32 if shape == () else dtype)
    if name in ("int8", "uint8"):
        low, high, held = (-128, 128, torch.int8) if name == "int8" else (0, 256, torch.uint8)
        made = {"": torch.randint(low, high, (n, k), generator=generator, dtype=held), "_scale": scale}
        if weight.offset:
            made["_zero_point"] = torch.randint(low, high, shape, generator=generator, dtype=held)
        if weight.transposed:  # as the ops get it: a view whose strides are those of the stored tensor
            made = {suffix: tensor.t().contiguous().t() for suffix, tensor in made.items()}
        return made

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    if name == "int4_fp8":
        scale_2 = torch.rand(n, generator=generator) + 0.5
        both = {"_scale": torch.tensor(0.017), "_scale_2": scale_2}
        return {"": words(n, k // 8), **both, "_zero_point": words(n // 8)}
    if weight.by == "channel":
        return {"": words(n, k // 8), "_scale": scale, "_zero_point": words(n // 8)}
    return {"": words(k, n // 8), "_scale": scale.t().contiguous(), "_zero_point": words(groups, n // 8)}


def activation_tensors(
    x: Activation | None, m: int, k: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Of each argument of the op, its suffix. Rows: zeros, ordinary, with a NaN, with an infinity, ordinary ones."""
    if x is not None and x.rule == "":
        return quantized_tensors(x, m, k, dtype, generator)
    values = torch.randn(m, k, generator=generator) * torch.randn(m, 1, generator=generator).exp()
    values[0::7] = 0.0
    unspecified = x is not None and x.rule == "given" and "int" in x.format  # the code of a NaN
    values[2::7, k // 2] = math.inf if unspecified else math.nan
    values[3::7, k - 1] = -math.inf
    made = {"": values.to(dtype)}
    if x is not None and x.format == "nvfp4":
        made["_scale_2"] = torch.tensor(4 / (6 * 448))
    if x is None or x.rule != "given":
        return made
    shape = (m, 1) if x.by == "token" else ()
    made["_scale"] = ((torch.rand(shape, generator=generator) + 3) / LARGEST[x.format]).to(dtype)
    if "int" in x.format:
        made["_zero_point"] = torch.randint(0, 9, shape, generator=generator, dtype=torch.int32)
    return made


def quantized_tensors(
    x: Activation, m: int, k: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """As :func:`activation_tensors`; a NaN is in row 2, if the format has one."""
    if x.format in BLOCK_SIZES:
        made = codes(x.format, m, k, generator)
        if x.format != "nvfp4":
            made["_scale"][2::7, -1] = 255
        return made
    shape = {"tensor": (), "token": (m, 1), "group": (m, k // (x.columns or k))}[x.by]
    scale = ((torch.rand(shape, generator=generator) + 0.5) / LARGEST[x.format]).to(dtype)
    if x.format in FP8:
        values = (torch.randn(m, k, generator=generator) * LARGEST[x.format] / 4).to(FP8[x.format])
        values.view(torch.uint8)[2::7, k // 2] = 0x7F
        return {"": values, "_scale": scale}
    low, high, held = (-128, 128, torch.int8) if x.format == "int8" else (0, 256, torch.uint8)
    values = torch.randint(low, high, (m, k), generator=generator, dtype=held)
    return {
        "": values,
        "_scale": scale,
        "_zero_point": torch.randint(max(low, -5), 6, shape, generator=generator, dtype=torch.int32),
    }


# --- many GEMMs in one graph


class Gemms(nn.Module):
    """A GEMM of each pair of formats; sizes, dtype and bias change from one to the next. K: a multiple of ``step``."""

    def __init__(self, pairs: list[tuple[Weight, Activation | None]], oracle: ModuleType, step: int = 1) -> None:
        super().__init__()
        self.pairs, self.oracle, self.step = pairs, oracle, step
        generator = torch.Generator().manual_seed(7)
        self.sizes = [self.size(i) for i in range(len(pairs))]
        self.dtypes = [DTYPES[i % 3] for i in range(len(pairs))]
        self.weights = [
            weight_tensors(weight, *self.sizes[i], self.dtype(i), generator) for i, (weight, _) in enumerate(pairs)
        ]
        self.biases = [
            torch.randn(n, generator=generator).to(self.dtype(i)) if i % 4 < 2 else None
            for i, (n, _) in enumerate(self.sizes)
        ]
        self.values = self.weight_values()

    def weight_values(self) -> list[np.ndarray]:
        return [self.weight_value(i, self.dtype(i)) for i in range(len(self.pairs))]

    def weight_value(self, i: int, dtype: torch.dtype) -> np.ndarray:
        """Numbers of a weight, rounded to a dtype."""
        values: np.ndarray = self.oracle.weight_values(*arguments(self.weights[i]), self.pairs[i][0].format, dtype)
        return values

    def operand(self, i: int, held: dict[str, Tensor], dtype: torch.dtype) -> np.ndarray:
        """Numbers of an activation, rounded to a dtype."""
        _, x = self.pairs[i]
        values: np.ndarray
        if x is None:
            values = self.oracle.to_numpy(held[""])
        elif x.rule == "":
            values = self.oracle.activation_values(*arguments(held), x.format, dtype)
        else:
            values = self.oracle.quantized_values(*arguments(held), x.format, x.rule, x.columns, dtype)
        return values

    def keep_one_of_each_channel(self) -> None:
        """Make a weight zero everywhere but at one place a channel, in place: the graph stays as it is."""
        for (weight, _), held in zip(self.pairs, self.weights, strict=True):
            if "_zero_point" in held:
                held["_zero_point"].zero_()
            held[""].copy_(one_of_each_channel(weight, held[""]))
        self.values = self.weight_values()
        assert all(((values != 0).sum(-1) <= 1).all() and values.any() for values in self.values)

    def size(self, i: int) -> tuple[int, int]:
        """N below, at and above a tile of 32, and K with remainders of 16 where the format can have them."""
        weight, x = self.pairs[i]
        rows, columns = weight.steps
        step = math.lcm(self.step, columns, 1 if x is None else x.step)
        k = (1, 17, 33, 100)[i % 4] if step == 1 else step * (1, 3, 2, 5)[i % 4]
        return rows * -(-(1, 31, 32, 33, 70)[i % 5] // rows), k

    def dtype(self, i: int) -> torch.dtype:
        return self.dtypes[i]

    def only(self, chosen: Sequence[int]) -> "Gemms":
        """Some of these GEMMs, which share their tensors with these."""
        some = copy.copy(self)
        for name in ("pairs", "sizes", "dtypes", "weights", "biases", "values"):
            setattr(some, name, [getattr(self, name)[i] for i in chosen])
        return some

    def on(self, device: str) -> "Gemms":
        """These GEMMs with weights on a device; :meth:`check` and :meth:`check_either` are for those on CPU."""
        there = copy.copy(self)
        there.weights, there.biases = torch.utils._pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (self.weights, self.biases)
        )
        return there

    def inputs(self, *rows_of_each: int) -> list[dict[str, Tensor]]:
        """Of each GEMM the activation's tensors; the last number of rows is for the rest too."""
        generator = torch.Generator().manual_seed(rows_of_each[0])
        return [
            activation_tensors(
                x, rows_of_each[min(i, len(rows_of_each) - 1)], self.sizes[i][1], self.dtype(i), generator
            )
            for i, (_, x) in enumerate(self.pairs)
        ]

    def forward(self, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
        outputs = []
        for i, ((weight, x), held) in enumerate(zip(self.pairs, inputs, strict=True)):
            by_weight = *arguments(self.weights[i]), self.biases[i]
            if x is None:
                outputs.append(q.weight_only_gemm(held[""], *by_weight, weight.format))
            elif x.rule == "":
                dtype = str(self.dtype(i)).removeprefix("torch.")
                outputs.append(q.quantized_gemm(*arguments(held), *by_weight, x.format, weight.format, dtype))
            else:
                outputs.append(
                    q.prologue_gemm(*arguments(held), *by_weight, x.format, x.rule, x.columns, weight.format)
                )
        return outputs

    def check(self, inputs: list[dict[str, Tensor]], outputs: list[Tensor], *, exactly: bool = False) -> None:
        """Each product is that of operands rounded as the emulation rounds them."""
        check = check_one_product if exactly else self.oracle.check_product
        self._check(outputs, lambda i, y: check(y, self.operand(i, inputs[i], y.dtype), self.values[i], self.biases[i]))

    def check_either(
        self, inputs: list[dict[str, Tensor]], outputs: list[Tensor], slack: Callable[[int], float] = lambda i: 0.0
    ) -> None:
        """Each product is that of operands which are rounded as the emulation rounds them, or not at all.

        Args:
            inputs: of each GEMM.
            outputs: of each GEMM.
            slack: of each GEMM by its index, see ``check_product`` in ``oracle.py``.
        """

        def check(i: int, y: Tensor) -> None:
            errors = []
            for x_dtype, weight_dtype in itertools.product((y.dtype, torch.float32), repeat=2):
                x, weight = self.operand(i, inputs[i], x_dtype), self.weight_value(i, weight_dtype)
                try:
                    return self.oracle.check_product(y, x, weight, self.biases[i], slack(i))
                except AssertionError as error:
                    errors.append(str(error))
            raise AssertionError(errors[-1])

        self._check(outputs, check)

    def _check(self, outputs: list[Tensor], check: Callable[[int, Tensor], None]) -> None:
        wrong = []
        for i, ((weight, x), y) in enumerate(zip(self.pairs, outputs, strict=True)):
            assert y.dtype is self.dtype(i)
            try:
                check(i, y)
            except AssertionError as error:
                first = (str(error).splitlines() or ["numbers that are not finite are elsewhere"])[0]
                wrong.append(f"{x} by {weight} {self.sizes[i]} {y.dtype} {len(y)}: {first}")
        assert not wrong, "\n".join(wrong)


def one_of_each_channel(weight: Weight, codes: Tensor) -> Tensor:
    """The codes of a weight with all but one of each channel set to code 0."""
    by_k = weight.by == "group" and codes.dtype == torch.int32  # [K, N/8]: a word has one code of eight channels
    n, entries = (codes.shape[1] * 8, codes.shape[0]) if by_k else codes.shape
    kept, raw = torch.zeros_like(codes), codes.view(torch.uint8) if codes.is_floating_point() else codes
    target = kept.view(torch.uint8) if codes.is_floating_point() else kept
    for channel in range(n):
        i = channel * 7 % entries
        if by_k:
            target[i, channel // 8] |= raw[i, channel // 8] & (
                -1 << 28 if channel % 8 == 7 else 15 << 4 * (channel % 8)
            )
            continue
        mask = -1
        if codes.dtype == torch.int32:
            mask = 15 << 4 * (channel % 7)
        elif "fp6" in weight.format:
            i, mask = i // 3 * 3, 63
        elif "fp4" in weight.format:
            mask = 15 << 4 * (channel % 2)
        target[channel, i] = raw[channel, i] & mask if mask != -1 else raw[channel, i]
    return kept


def check_one_product(y: Tensor, x: np.ndarray, weight: np.ndarray, bias: Tensor | None) -> None:
    """Bit by bit, as a number of ``y`` is one product: rounded to float32, the bias added there, then to the dtype.

    Not for rows with numbers that are not finite: those times a zero are NaN.
    """
    finite = np.isfinite(x).all(-1)
    assert finite.any()
    product = (x[finite].astype(np.float64) @ weight.T.astype(np.float64)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(product if bias is None else product + bias.float().numpy()).to(y.dtype)
    got = y[torch.from_numpy(finite)]
    assert torch.equal(got, expected), f"{(got != expected).sum()} of {got.numel()} numbers differ"


def arguments(tensors: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """In the order of the ops."""
    return tuple(tensors.get(suffix) for suffix in ("", "_scale", "_scale_2", "_zero_point"))
