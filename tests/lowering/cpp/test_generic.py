"""The kernels of ``generic.h``, for every pair of formats, against float64 products of operands by the oracle.

Their operands are the emulation's, rounded where it rounds, so only the sum in float32 and the result's dtype leave
anything to tolerate.
"""

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from quark_inductor.lowering.cpp import kernels
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
# Neighbours along K that share a scale, where a format leaves the choice: none a multiple of 8.
WEIGHT_GROUP, ACTIVATION_GROUP = 6, 9


@dataclass(frozen=True)
class Weight:
    """A weight's format, and what shares a scale: of blocks ``"block"``, else ``"tensor"``, ``"channel"``, ``"group"``.

    ``offset``: with zero points. ``transposed``: stored so, as ``group`` weights in a checkpoint are.
    """

    format: str
    by: str = "block"
    offset: bool = False
    transposed: bool = False

    @property
    def steps(self) -> tuple[int, int]:
        """What N and K must be multiples of."""
        packed = self.format.startswith(("int4", "uint4"))
        return 8 if packed else 1, WEIGHT_GROUP if self.by == "group" else 8 if packed else BLOCK_SIZES.get(
            self.format, 1
        )


@dataclass(frozen=True)
class Activation:
    """An activation's format, scale rule, and what shares a scale; rule ``""``: it is quantized already."""

    format: str
    rule: str = ""
    by: str = "block"

    @property
    def step(self) -> int:
        """What K must be a multiple of."""
        return ACTIVATION_GROUP if self.by == "group" else BLOCK_SIZES.get(self.format, 1)


WEIGHTS = [
    *(Weight(format) for format in BLOCK_SIZES),
    *(Weight(format, by) for format in FP8 for by in ("tensor", "channel")),
    Weight("fp8_e4m3_16x24"),
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
PROLOGUES = [
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
QUANTIZED = [
    *(Activation(format) for format in BLOCK_SIZES),
    *(Activation(format, "", by) for format in (*FP8, "int8", "uint8") for by in ("tensor", "token", "group")),
]


def own_kernel(weight: Weight, x: Activation | None) -> bool:
    """The two pairs of formats that do not come here."""
    if x is None or x.format != weight.format:
        return False
    return (x.format == "mxfp4" and x.rule in ("", "even")) or (x.format == "fp8_e4m3" and x.by != "group")


def of_preset(spec: LinearSpec) -> tuple[Weight, Activation | None]:
    """The formats of a preset's GEMM, a scale that is computed for a whole tensor being given."""
    weight, x = spec.weight, spec.input
    assert weight is not None
    by = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}.get(weight.qscheme, "block")
    if weight.block_format is not None:
        of_weight = Weight(weight.block_format)
    elif weight.qscheme == "per_block":
        of_weight = Weight("fp8_e4m3_16x24")  # cut off, as 128 x 128 would rarely be
    elif weight.second is not None:
        of_weight = Weight("int4_fp8", "channel", offset=True)
    elif weight.dtype in ("int4", "uint4"):
        of_weight = Weight(format_of(weight.dtype, spec.pack_method), by, offset=True)
    else:
        of_weight = Weight(weight.dtype, by, weight.dtype == "int8", weight.dtype == "int8" and by == "group")
    return of_weight, None if x is None else _of_input(x)


def _of_input(x: TensorSpec) -> Activation:
    if x.block_format is not None:
        rule = x.scale_calculation_mode or ("sequential" if x.second is not None else "nearest")
        return Activation(x.block_format, rule)
    if x.qscheme == "per_tensor" or not x.is_dynamic:
        return Activation(x.dtype, "given", "tensor")
    rule = "amax" if x.dtype in FP8 else "symmetric" if x.symmetric else "asymmetric"
    return Activation(x.dtype, rule, "group" if x.qscheme == "per_group" else "token")


def pairs() -> list[tuple[Weight, Activation | None]]:
    """Those of the presets, then every weight and activation that has not occurred yet, each with another partner."""
    found = [pair for pair in dict.fromkeys(map(of_preset, PRESETS.values())) if not own_kernel(*pair)]
    rest: list[Activation | None] = [*QUANTIZED, *(x for x in PROLOGUES if x not in {x for _, x in found})]
    # Weights that no preset has come first, so that all of them do.
    weights = sorted(WEIGHTS, key=lambda weight: weight in {weight for weight, _ in found})
    for i, x in enumerate(rest):
        weight = weights[i % len(weights)]
        found.append((weights[(i + 1) % len(weights)] if own_kernel(weight, x) else weight, x))
    return found


PAIRS = pairs()


def test_every_format_occurs() -> None:
    weights, activations = {weight for weight, _ in PAIRS}, {x for _, x in PAIRS}
    assert weights == set(WEIGHTS)
    assert activations == {None, *PROLOGUES, *QUANTIZED}
    for name, spec in PRESETS.items():
        assert of_preset(spec) in PAIRS or own_kernel(*of_preset(spec)), name


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
    groups = k // WEIGHT_GROUP
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
    shape = {"tensor": (), "token": (m, 1), "group": (m, k // ACTIVATION_GROUP)}[x.by]
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
        "_zero_point": torch.randint(-5, 6, shape, generator=generator, dtype=torch.int32),
    }


# --- many GEMMs in one graph


class Gemms(nn.Module):
    """A GEMM of each pair of formats; sizes, dtype and bias change from one to the next."""

    def __init__(self, pairs: list[tuple[Weight, Activation | None]], oracle: ModuleType) -> None:
        super().__init__()
        self.pairs, self.oracle = pairs, oracle
        generator = torch.Generator().manual_seed(7)
        self.sizes = [self.size(i) for i in range(len(pairs))]
        self.weights = [
            weight_tensors(weight, *self.sizes[i], self.dtype(i), generator) for i, (weight, _) in enumerate(pairs)
        ]
        self.biases = [
            torch.randn(n, generator=generator).to(self.dtype(i)) if i % 4 < 2 else None
            for i, (n, _) in enumerate(self.sizes)
        ]
        self.values = self.weight_values()

    def weight_values(self) -> list[np.ndarray]:
        return [
            self.oracle.weight_values(*arguments(held), weight.format, self.dtype(i))
            for i, ((weight, _), held) in enumerate(zip(self.pairs, self.weights, strict=True))
        ]

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
        step = math.lcm(columns, 1 if x is None else x.step)
        k = (1, 17, 33, 100)[i % 4] if step == 1 else step * (1, 3, 2, 5)[i % 4]
        return rows * -(-(1, 31, 32, 33, 70)[i % 5] // rows), k

    def dtype(self, i: int) -> torch.dtype:
        return DTYPES[i % 3]

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
                group = ACTIVATION_GROUP if x.by == "group" else 0
                outputs.append(q.prologue_gemm(*arguments(held), *by_weight, x.format, x.rule, group, weight.format))
        return outputs

    def check(self, inputs: list[dict[str, Tensor]], outputs: list[Tensor], *, exactly: bool = False) -> None:
        check = check_one_product if exactly else self.oracle.check_product
        wrong = []
        for i, ((weight, x), held, y) in enumerate(zip(self.pairs, inputs, outputs, strict=True)):
            if x is None:
                operand = self.oracle.to_numpy(held[""])
            elif x.rule == "":
                operand = self.oracle.activation_values(*arguments(held), x.format, self.dtype(i))
            else:
                group = ACTIVATION_GROUP if x.by == "group" else 0
                operand = self.oracle.quantized_values(*arguments(held), x.format, x.rule, group)
            assert y.dtype is self.dtype(i)
            try:
                check(y, operand, self.values[i], self.biases[i])
            except AssertionError as error:
                wrong.append(f"{x} by {weight} {self.sizes[i]} {y.dtype} {len(y)}: {str(error).splitlines()[0]}")
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


def any_m(inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Mark the number of rows of every tensor as not known before run time."""
    for tensor in torch.utils._pytree.tree_leaves(inputs):
        if tensor.ndim:
            torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


def test_any_number_of_rows(isa: str, oracle: ModuleType) -> None:
    """One kernel for every M; 600 is more than the 512 rows prepared at a time, 32 rows a tile."""
    model = Gemms(PAIRS[::6] if isa == "portable" else PAIRS, oracle)
    compiled = torch.compile(model, backend="quark", fullgraph=True)
    first = any_m(model.inputs(5))
    outputs, (code,) = run_and_get_code(compiled, first)
    assert code.count("quark::generic::tile(") == len(model.pairs)
    model.check(first, outputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (2, 3, 8, 9, 33, 600):
            inputs = model.inputs(m)
            model.check(inputs, compiled(inputs))
        # The roundings of the operands: a sum of many in bfloat16 would hide them.
        model.keep_one_of_each_channel()
        inputs = model.inputs(40)
        model.check(inputs, compiled(inputs), exactly=True)


def test_a_number_of_rows_known_when_compiling(isa: str, oracle: ModuleType) -> None:
    """Up to 32 rows a tile of just so many."""
    model = Gemms(PAIRS[1::10] if isa == "portable" else PAIRS[2::7], oracle)
    inputs = model.inputs(1, 1, 3, 8, 9, 32, 33)
    model.check(inputs, torch.compile(model, backend="quark", fullgraph=True, dynamic=False)(inputs))


def test_no_rows(oracle: ModuleType) -> None:
    model = Gemms([PAIRS[2]], oracle)
    (y,) = torch.compile(model, backend="quark", fullgraph=True)(model.inputs(0))
    assert y.shape == (0, model.sizes[0][0])


@pytest.fixture
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's numbers are wanted, also where the emulation would be faster and the provider says no."""
    monkeypatch.setattr(kernels, "_MANY_TOKENS", 1 << 20)


# --- edges of the formats


@pytest.mark.usefixtures("any_number_of_tokens")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_every_fifth_bfloat16(oracle: ModuleType, dtype: torch.dtype) -> None:
    """Every fifth number of bfloat16 as the largest of its block or row, with others from it down to nothing.

    The weight is the identity in int8, which shows the activation itself: bit by bit, but for blocks whose numbers are
    not finite. Each activation comes in one dtype and those whose scale rounds in both.
    """
    rounding = [x for x in PROLOGUES if x.rule in ("nearest", "amax", "symmetric", "asymmetric")]
    others = [x for x in PROLOGUES if x not in rounding and x.rule != "given"]
    chosen = [*rounding, *others] if dtype is torch.bfloat16 else rounding[::2] + others[::2]
    numbers = torch.arange(0, 65536, 5, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    ratios = {k: torch.tensor([1, -1, 0, *(i / k * (-1) ** i for i in range(k - 3))]).double() for k in (32, 18)}

    def k_of(x: Activation) -> int:
        return 18 if x.by == "group" else 32

    inputs = {k: (numbers[:, None] * ratio).to(dtype) for k, ratio in ratios.items()}
    weights = {k: torch.eye(k, dtype=torch.int8) for k in ratios}
    one, half = torch.ones(()), torch.tensor(0.37)

    def products(inputs: dict[int, Tensor]) -> list[Tensor]:
        return [
            q.prologue_gemm(
                inputs[k_of(x)],
                None,
                half if x.format == "nvfp4" else None,
                None,
                weights[k_of(x)],
                one,
                *(None, None, None),
                x.format,
                x.rule,
                ACTIVATION_GROUP if x.by == "group" else 0,
                "int8",
            )
            for x in chosen
        ]

    for x, y in zip(chosen, torch.compile(products, backend="quark", fullgraph=True)(inputs), strict=True):
        values = inputs[k_of(x)]
        group = ACTIVATION_GROUP if x.by == "group" else 0
        expected = oracle.quantized_values(
            values, None, half if x.format == "nvfp4" else None, None, x.format, x.rule, group
        )
        finite = torch.from_numpy(np.isfinite(expected).all(-1))
        assert 0.9 < finite.double().mean() < 1, x
        assert torch.equal(y[finite], torch.from_numpy(expected).to(dtype)[finite]), x
        assert not y[~finite].isfinite().all(-1).any(), x


@pytest.mark.usefixtures("any_number_of_tokens")
@pytest.mark.parametrize("format", ["mxfp8_e4m3", "nvfp4", "amdfp4_g32"])
def test_every_scale_byte(oracle: ModuleType, format: str) -> None:
    """Of a weight and of an activation: E8M0, E4M3, E5M3, of which 0 is eps in an activation."""
    size, k = BLOCK_SIZES[format], 64
    codes_of = torch.zeros(256, k // (1 if "fp8" in format else 2), dtype=torch.uint8)
    codes_of[:, -1] = 0x31
    scales = torch.full((256, k // size), 0x38, dtype=torch.uint8)
    scales[:, -1] = torch.arange(256)
    global_scale = torch.tensor(0.5) if format == "nvfp4" else None
    held = (
        codes_of.view(FP8["fp8_e4m3"]) if "fp8" in format else codes_of,
        (scales.view(FP8["fp8_e4m3"]) if format == "nvfp4" else scales),
    )
    ones, one = torch.ones(1, k), torch.ones(())
    by = torch.ones(1, k, dtype=torch.int8)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        as_weight = q.weight_only_gemm(x, *held, global_scale, None, None, format)
        return as_weight, q.quantized_gemm(
            held[0], held[1], global_scale, None, by, one, None, None, None, format, "int8", "float32"
        )

    as_weight, as_activation = torch.compile(both, backend="quark", fullgraph=True)(ones)
    for y, values_of in (
        (as_weight, lambda: oracle.weight_values(*held, global_scale, None, format, torch.float32)),
        (as_activation.t(), lambda: oracle.activation_values(*held, global_scale, None, format, torch.float32)),
    ):
        # At most two numbers that are not 0 in a row, the second 3 times the first: their sum is exact.
        expected = values_of().sum(-1)
        np.testing.assert_array_equal(y.numpy()[0], expected)
        assert 1 <= np.isnan(expected).sum() <= 2
