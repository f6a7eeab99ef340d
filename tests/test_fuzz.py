"""Random graphs of quantized Linears: compiled, each computes what its formulas say, and every Linear is fused.

A program is straight-line Python that is run three times over: by :class:`Module`, which is compiled, and by
:class:`Bound`, which computes in float64 what the compiled code should have got, and how far from it rounding may be.
A quantized Linear amplifies: a last bit may change a code, and a code all that follows. So every check is local. The
compiled function returns the input of each of its Linears too, and :class:`Bound` goes on from that one, with no error:

* what goes into a Linear is as near to the exact result of the operations since the Linears before it as their
  roundings allow, and so is what the program returns;
* a Linear's result is the float64 product of the operands that the emulation makes of the input it really had, up to
  the roundings of a float32 sum of K products and a bias, and one to the dtype.

``emulate_precision_casts`` makes Inductor round where eager code does: else a quantize may read what is never rounded.
"""

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.codegen.cpp import CppScheduling

import quark_inductor as qi
from quark_inductor.lowering.cpp import kernels
from quark_inductor.patterns.pipeline import GraphResult, collect_results
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS
from quark_inductor.testing import rewrite

pytestmark = pytest.mark.usefixtures("fresh")
FUZZ = pytest.mark.fuzz  # all of it: an hour on two cores

TOKENS = (1, 2, 3, 5, 8, 17, 33)
# (K, N, bias): few, so that programs share kernels. What follows a Linear may make a kernel of its own of it.
SHAPES = ((128, 128, True), (128, 256, False), (256, 128, True))
OF_INPUT = {k: [s for s in SHAPES if s[0] == k] for k in (128, 256)}
# What is in an input, and how often.
SPECIAL = {
    "usual": 4,
    "unlike rows": 4,
    "zeros": 1,
    "negative zeros": 1,
    "one row of zeros": 1,
    "large": 2,
    "tiny": 2,
    "a NaN": 2,
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Half the distance of 1 to the next number, and the largest number that may be lost at the small end.
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float16: 2.0**-11}
LEAST = {torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float16: 2.0**-24}
U32 = 2.0**-24


# --- layers


@functools.cache
def layer_of(preset: str, dtype: torch.dtype, shape: tuple[int, int, bool], number: int) -> QuarkLinear:
    """A quantized Linear with random weights, one of several of this kind."""
    k, n, bias = shape
    generator = torch.Generator().manual_seed(hash((k, n, number)) % 2**31)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * k**-0.5)
    model = nn.Sequential(linear)
    # Several times less than "large" gives: static scales saturate there.
    qi.quantize_(model, preset, exclude=(), calibration=[torch.randn(64, k, generator=generator).to(dtype)])
    layer = model[0]
    assert isinstance(layer, QuarkLinear)
    return layer


def sharing_weight(layer: QuarkLinear) -> QuarkLinear:
    """Another Linear with the same parameters, without a bias."""
    other = copy.copy(layer)
    other._parameters = {**layer._parameters, "bias": None}
    return other


def nan_is_specified(layer: QuarkLinear) -> bool:
    """Integers have no NaN: with a static scale its code is unspecified."""
    spec = layer.scheme.spec.input
    return spec is None or "int" not in spec.dtype or spec.is_dynamic


# --- programs


@dataclass
class Program:
    """A random graph.

    Attributes:
        dtype: of all of it.
        shape: of its input.
        lines: Python: ``v0`` is the input, ``o`` what has the operations.
        layers: its Linears, by the numbers in ``lines``.
        outputs: the variables it returns.
        special: what is in its input.
        calls: how many times it calls a quantized Linear.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    special: str
    lines: list[str] = field(default_factory=list)
    layers: list[QuarkLinear] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    calls: int = 0

    @functools.cached_property
    def run(self) -> Callable[[Any, Any], Any]:
        """``run(o, v0)``."""
        namespace: dict[str, Any] = {}
        exec(compile(str(self), f"<program {id(self)}>", "exec"), namespace)
        run: Callable[[Any, Any], Any] = namespace["run"]
        return run

    def __str__(self) -> str:
        # A failure shows it.
        kinds = [f"# {i}: {layer.scheme.spec}, {tuple(layer.weight.shape)}" for i, layer in enumerate(self.layers)]
        head = f"# {self.dtype} {list(self.shape)}, {self.special}"
        body = "\n".join(f"    {line}" for line in (*self.lines, f"return [{', '.join(self.outputs)}]"))
        return "\n".join([head, *kinds, "def run(o, v0):", body])

    def input(self, generator: torch.Generator, shape: Sequence[int], special: str) -> Tensor:
        """Random numbers of a special kind."""
        x = torch.randn(shape, generator=generator)
        half = self.dtype == torch.float16
        if special in ("zeros", "negative zeros"):
            x = x * 0
            x = -x.abs() if special == "negative zeros" else x.abs()
        elif special == "large":
            x = x * 2.0 ** (1 if half else 12)
        elif special == "tiny":
            x = x * 2.0 ** (-12 if half else -60)
        elif special == "one row of zeros":
            x.view(-1, x.shape[-1])[0] = 0
        elif special == "unlike rows":
            rows = x.view(-1, x.shape[-1])
            rows.mul_(torch.logspace(-2, 1, len(rows))[:, None])
        elif special == "a NaN":
            x.view(-1)[-1] = torch.nan
        return x.to(self.dtype)


class Writer:
    """Writes one random program."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        r = self.random
        k, tokens = r.choice((128, 256)), r.choice(TOKENS)
        lead = r.choice([(tokens,), (tokens,), (r.choice((1, 2, 3)), tokens), (2, 3, tokens)])
        self.program = Program(
            r.choices(DTYPES, (4, 4, 1))[0], (*lead, k), r.choices(list(SPECIAL), list(SPECIAL.values()))[0]
        )
        self.preset = r.choice(list(PRESETS))
        self.mixed = r.random() < 0.2
        self.used: set[tuple[str, int]] = set()
        self.products = 0
        self.count = 0

    def line(self, text: str) -> str:
        """``v<n> = <text>``; returns ``v<n>``."""
        self.count += 1
        self.program.lines.append(f"v{self.count} = {text}")
        return f"v{self.count}"

    def linear(self, x: str, shape: tuple[int, int, bool]) -> str:
        """A call of a new Linear."""
        preset = self.random.choice(list(PRESETS)) if self.mixed else self.preset
        # Few, as quantizing takes time; never twice the same with one input, which would be one node of the graph.
        number = len(self.program.layers) % 8
        return self.call(x, layer_of(preset, self.program.dtype, shape, number))

    def call(self, x: str, layer: QuarkLinear) -> str:
        self.program.layers.append(layer)
        self.program.calls += 1
        return self.line(f"o.linear({x}, {len(self.program.layers) - 1})")

    def norm(self, x: str) -> str:
        return self.line(f"o.{self.random.choice(('rms_norm', 'llama_norm', 'layer_norm'))}({x})")

    def unary(self, x: str) -> str:
        return self.line(f"o.{self.random.choice(('gelu', 'relu', 'silu'))}({x})")

    def gated(self, a: str, b: str) -> str:
        """Not often: each doubles the exponent, and nothing may overflow."""
        self.products += 1
        few = self.products <= (1 if self.program.dtype == torch.float16 else 2)
        return self.line(f"o.{'silu_mul' if few else 'add'}({a}, {b})")

    # Blocks: from a variable of width k to one of another width, or of the same.

    def plain(self, x: str, k: int) -> tuple[str, int]:
        shape = self.random.choice(OF_INPUT[k])
        return self.linear(x, shape), shape[1]

    def activated(self, x: str, k: int) -> tuple[str, int]:
        y, n = self.plain(x, k)
        return self.unary(y), n

    def normed(self, x: str, k: int) -> tuple[str, int]:
        return self.plain(self.norm(x), k)

    def qkv(self, x: str, k: int) -> tuple[str, int]:
        h = self.norm(x) if self.random.random() < 0.5 else x
        shape = self.random.choice(OF_INPUT[k])
        q, key, value = (self.linear(h, shape) for _ in range(3))
        return self.line(f"o.add({self.gated(key, value)}, {q})"), shape[1]

    def mlp(self, x: str, k: int) -> tuple[str, int]:
        h = self.norm(x)
        up = self.random.choice(OF_INPUT[k])
        y, n = self.plain(self.gated(self.linear(h, up), self.linear(h, up)), up[1])
        return (self.line(f"o.add({x}, {y})"), n) if n == k else (y, n)

    def used_twice(self, x: str, k: int) -> tuple[str, int]:
        y, n = self.plain(x, k)
        return self.line(f"o.add({self.unary(y)}, {y})"), n

    def shared_weight(self, x: str, k: int) -> tuple[str, int]:
        shape = self.random.choice(OF_INPUT[k])
        a = self.linear(x, shape)
        layer = self.program.layers[-1]
        b = self.call(self.unary(x), self.random.choice((layer, sharing_weight(layer))))
        return self.line(f"o.add({a}, {b})"), shape[1]

    def chunked(self, x: str, k: int) -> tuple[str, int]:
        if k != 128:
            return self.plain(x, k)
        y = self.linear(x, (128, 256, False))
        a, b = (self.line(f"o.chunk({y}, {i})") for i in (0, 1))
        return self.gated(a, b), 128

    def joined(self, x: str, k: int) -> tuple[str, int]:
        if k != 128:
            return self.plain(x, k)
        return self.plain(self.line(f"o.cat({self.linear(x, (128, 128, True))}, {x})"), 256)

    def transposed(self, x: str, k: int) -> tuple[str, int]:
        """By a layout that is not contiguous."""
        if len(self.program.shape) < 3:
            return self.flat(x, k)
        y, n = self.plain(self.line(f"o.transpose({x}, 0, 1)"), k)
        return self.line(f"o.transpose({y}, 0, 1)"), n

    def flat(self, x: str, k: int) -> tuple[str, int]:
        view = self.line(f"o.flatten({x})")
        y, n = self.plain(view, k)
        return self.line(f"o.like({y}, {x})"), n

    def heads(self, x: str, k: int) -> tuple[str, int]:
        """As attention writes its heads: apart, turned, and back together before the Linear that reads them."""
        apart = self.line(f"o.heads({x}, 4)")
        return self.plain(self.line(f"o.merge({self.unary(apart)})"), k)

    def halves(self, x: str, k: int) -> tuple[str, int]:
        """Half as wide, and twice as many rows."""
        if k != 256:
            return self.heads(x, k)
        y = self.linear(self.line(f"o.rows({x}, 128)"), (128, 128, True))
        return self.line(f"o.like({y}, {x})"), 256

    def last_token(self, x: str, k: int) -> tuple[str, int]:
        """To an output of its own."""
        y, _ = self.plain(self.line(f"o.last({x})"), k)
        self.program.outputs.append(y)
        return x, k

    def sliced(self, x: str, k: int) -> tuple[str, int]:
        return (self.plain(self.line(f"o.chunk({x}, 1)"), 128)) if k == 256 else self.plain(x, k)

    BLOCKS = (
        plain,
        activated,
        normed,
        qkv,
        mlp,
        used_twice,
        shared_weight,
        chunked,
        joined,
        transposed,
        flat,
        heads,
        halves,
        last_token,
        sliced,
    )

    def write(self) -> Program:
        x, k = "v0", self.program.shape[-1]
        for _ in range(self.random.choices((1, 2, 3, 4), (4, 3, 2, 1))[0]):
            x, k = self.random.choice(self.BLOCKS)(self, x, k)
        self.program.outputs.append(x)
        if self.program.special == "a NaN" and not all(map(nan_is_specified, self.program.layers)):
            self.program.special = "usual"
        return self.program


def programs(seed: int, count: int) -> list[Program]:
    return [Writer(f"{seed}.{i}").write() for i in range(count)]


# --- operations


class Module(nn.Module):
    """Several programs as one module: returns what each returns, and the input of each of its Linears."""

    def __init__(self, programs: Sequence[Program]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(p) for p in programs)

    def forward(self, *inputs: Tensor) -> list[list[Tensor]]:
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


class Part(nn.Module):
    """The operations in torch."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.run = program.run
        self.layers = nn.ModuleList(program.layers)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.run(self, x)
        outputs += self.seen
        self.seen.clear()  # as it was found: it is part of what a compiled graph is guarded by
        return outputs

    def linear(self, x: Tensor, i: int) -> Tensor:
        self.seen.append(x)
        return self.layers[i](x)

    def rms_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-5)

    def llama_norm(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def layer_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)

    gelu = staticmethod(F.gelu)
    relu = staticmethod(F.relu)
    silu = staticmethod(F.silu)

    def silu_mul(self, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(a) * b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def cat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b), -1)

    # Views.

    def chunk(self, x: Tensor, i: int) -> Tensor:
        return x.chunk(2, -1)[i]

    def transpose(self, x: Tensor, a: int, b: int) -> Tensor:
        return x.transpose(a, b)

    def flatten(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2)

    def like(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(*y.shape[:-1], -1)

    def rows(self, x: Tensor, width: int) -> Tensor:
        return x.reshape(-1, width)

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, -1)).transpose(-2, -3) if x.ndim > 2 else x.unflatten(-1, (count, -1))

    def merge(self, x: Tensor) -> Tensor:
        return (x.transpose(-2, -3) if x.ndim > 3 else x).flatten(-2)

    def last(self, x: Tensor) -> Tensor:
        return x[..., -1:, :]


@dataclass
class Value:
    """The exact result, and how far from it a computed one may be, both float64."""

    exact: Tensor
    error: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.exact.shape


class Bound:
    """The operations on :class:`Value`.

    ``u`` is the rounding of the dtype, once after each operation. What float32 does inside one is small in bfloat16
    and counted all the same: ``n`` of its roundings are ``n * 2**-24``.

    Args:
        program: whose Linears these are.
        seen: what went into each of its calls of a Linear.
    """

    def __init__(self, program: Program, seen: Iterator[Tensor]) -> None:
        self.layers, self.seen, self.dtype = program.layers, seen, program.dtype

    def rounded(self, exact: Tensor, error: Tensor, relative: float = 0.0) -> Value:
        """After an operation whose float32 result is off by ``relative``, a rounding to the dtype."""
        error = error + relative * (exact.abs() + error)
        u = UNIT[self.dtype] * (1 + 2.0**-5)  # relative to the rounded number instead of the exact one
        return Value(exact, error + u * (exact.abs() + error) + LEAST[self.dtype])

    def linear(self, x: Value, i: int) -> Value:
        layer, seen = self.layers[i], next(self.seen)
        compare(seen, x, f"the input of Linear {i}")
        rows = seen.reshape(-1, layer.in_features)
        a = layer.scheme.fake_quantize_input(layer, rows).double()
        w = layer.scheme.dequantize_weight(layer, self.dtype).double()
        bias = torch.zeros(()).double() if layer.bias is None else layer.bias.double()
        sums = (a.abs() @ w.abs().T + bias.abs()) * (layer.in_features + 2) * U32 + layer.in_features * 2.0**-126
        y = self.rounded(a @ w.T + bias, sums)
        return Value(*(t.reshape(*seen.shape[:-1], layer.out_features) for t in (y.exact, y.error)))

    def rms_norm(self, x: Value) -> Value:
        return self._normed(x.exact, x.error)

    llama_norm = rms_norm

    def layer_norm(self, x: Value) -> Value:
        v, e = x.exact, x.error
        # The mean has that of the errors and of K sums.
        spread = e + e.mean(-1, keepdim=True) + v.shape[-1] * U32 * v.abs().mean(-1, keepdim=True) + U32 * v.abs()
        return self._normed(v - v.mean(-1, keepdim=True), spread)

    def _normed(self, v: Tensor, e: Tensor) -> Value:
        """``r / s`` where ``s``, a norm of r, may be off by that norm of its error."""
        s = (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        d = e.square().mean(-1, keepdim=True).sqrt()
        # Not where the error may be all there is.
        d = torch.where(d < s, d, torch.inf)
        error = torch.where(d < s, e / (s - d) + v.abs() * d / (s * (s - d)), torch.inf)
        error = torch.where(d.isnan(), torch.nan, error)
        return self.rounded(v / s, error, (v.shape[-1] + 8) * U32)

    def gelu(self, x: Value) -> Value:
        exact = F.gelu(x.exact)
        return self.rounded(exact, 1.13 * x.error + 8 * U32 * x.exact.abs())

    def relu(self, x: Value) -> Value:
        return Value(F.relu(x.exact), x.error)

    def silu(self, x: Value) -> Value:
        # Its exponential overflows where the result is below 2**-121.
        return self.rounded(F.silu(x.exact), 1.1 * x.error + 2.0**-121, 8 * U32)

    def silu_mul(self, a: Value, b: Value) -> Value:
        s = self.silu(a)
        return self.rounded(
            s.exact * b.exact, s.error * b.exact.abs() + b.error * s.exact.abs() + s.error * b.error, U32
        )

    def add(self, a: Value, b: Value) -> Value:
        return self.rounded(a.exact + b.exact, a.error + b.error, U32)

    def cat(self, a: Value, b: Value) -> Value:
        return Value(torch.cat((a.exact, b.exact), -1), torch.cat((a.error, b.error), -1))

    def __getattr__(self, name: str) -> Callable[..., Value]:
        """A view."""

        def view(x: Value, *args: Any) -> Value:
            f = getattr(Part, name)
            return Value(f(None, x.exact, *args), f(None, x.error, *args))

        return view


def compare(got: Tensor, expected: Value, what: str) -> None:
    """Every number within its bound, and NaN exactly where it is expected."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    nan = expected.exact.isnan()
    assert torch.equal(got.isnan(), nan), f"{what}: {int(got.isnan().sum())} NaN, expected {int(nan.sum())}"
    # An overflow would compare nothing with nothing.
    assert expected.exact[~nan].isfinite().all(), f"{what}: the program overflows"
    assert expected.error[~nan].isfinite().all(), f"{what}: has no bound"
    excess = ((got.double() - expected.exact).abs() - expected.error)[~nan]
    assert (excess <= 0).all(), f"{what}: {int((excess > 0).sum())} of {excess.numel()} off, by {float(excess.max())}"


def check(program: Program, x: Tensor, got: Sequence[Tensor]) -> None:
    """What a program returned, and what went into its Linears."""
    outputs, seen = got[: len(program.outputs)], got[len(program.outputs) :]
    assert len(seen) == program.calls
    try:
        expected = program.run(Bound(program, iter(seen)), Value(x.double(), torch.zeros_like(x).double()))
        for i, (output, value) in enumerate(zip(outputs, expected, strict=True)):
            assert output.dtype == program.dtype
            compare(output, value, f"output {i}")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{program}") from e


def assert_all_fused(result: GraphResult, all_programs: Sequence[Program]) -> None:
    """Every call of a quantized Linear is known to the rules, and fused."""
    assert len(result.linears) == sum(program.calls for program in all_programs)
    left = [f"{linear.layer}: {linear.problem}: {linear.refusals}" for linear in result.linears if not linear.fused]
    assert left == []
    assert result.unfused == ()


# --- the tests


# Other sizes than those that a function was compiled for: 1 has code of its own, and equal sizes stay equal.
OTHER_TOKENS = {1: 1, 2: 3, 3: 5, 5: 7, 8: 9, 17: 20, 33: 40}


def inputs_of(
    all_programs: Sequence[Program], seed: int, *, other_sizes: bool = False, special: str | None = None
) -> list[Tensor]:
    """Random inputs: what the programs say, or of other sizes and kinds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [p.shape for p in all_programs]
    if other_sizes:
        shapes = [(*(OTHER_TOKENS[n] for n in lead), k) for *lead, k in shapes]
    return [p.input(generator, shape, special or p.special) for p, shape in zip(all_programs, shapes, strict=True)]


@pytest.fixture(autouse=True)
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and compared also where the emulation would be faster and the provider says no."""
    monkeypatch.setattr(kernels, "_MANY_TOKENS", 1 << 20)


@pytest.fixture
def one_loop_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor joins loops that follow each other, of whatever programs: no kernel would be found in the cache."""
    monkeypatch.setattr(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 1)


def assert_compiled(seed: int, count: int, *, dynamic: bool, epilogue_fusion: bool) -> None:
    """As many programs as one function: every Linear fused, every number within its bound, for every size."""
    these = programs(seed, count)
    assert len(these) == count
    options = {"emulate_precision_casts": True, "epilogue_fusion": epilogue_fusion}
    compiled = torch.compile(Module(these), backend="quark", fullgraph=True, dynamic=dynamic, options=options)
    with collect_results() as results:
        first = compiled(*(inputs := inputs_of(these, seed)))
    (result,) = results
    assert_all_fused(result, these)
    for program, x, got in zip(these, inputs, first, strict=True):
        check(program, x, got)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = compiled(*(inputs := inputs_of(these, seed + 1, other_sizes=dynamic, special="unlike rows")))
    for program, x, got in zip(these, inputs, again, strict=True):
        check(program, x, got)


# A quarter of the functions are for any number of tokens (which takes four times as long to trace), half may fuse what
# follows a GEMM into its kernel.
@FUZZ
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.usefixtures("one_loop_a_kernel")
def test_compiled(seed: int) -> None:
    assert_compiled(seed, 50, dynamic=seed % 4 == 0, epilogue_fusion=seed % 8 > 3)


@pytest.mark.usefixtures("one_loop_a_kernel")
def test_some_compiled() -> None:
    assert_compiled(1005, 5, dynamic=True, epilogue_fusion=True)


@pytest.mark.parametrize("seed", [2001, *(pytest.param(seed, marks=FUZZ) for seed in range(2002, 2041))])
def test_rewritten(seed: int) -> None:
    """The graph that the rules leave, interpreted: their ops are the emulation."""
    these = programs(seed, 20)
    inputs = inputs_of(these, seed)
    done = rewrite(Module(these), *inputs, dynamic=seed % 4 == 0)
    assert_all_fused(done.result, these)
    for program, x, got in zip(these, inputs, done.output, strict=True):
        check(program, x, got)


# --- the check itself


@pytest.mark.parametrize("seed", [3000, *(pytest.param(seed, marks=FUZZ) for seed in range(3001, 3020))])
def test_eager_code_is_within_the_bounds(seed: int) -> None:
    for program in programs(seed, 20):
        (x,) = inputs_of([program], seed)
        check(program, x, Part(program)(x))


def test_every_kind_is_written() -> None:
    """None is forgotten."""
    text = "\n".join(map(str, (these := programs(4000, 120))))
    names = [name for name in vars(Part) if not name.startswith("_") and name != "forward"]
    assert [name for name in names if f"o.{name}(" not in text] == []
    assert {p.special for p in these} == set(SPECIAL)
    assert {p.dtype for p in these} == set(DTYPES)
    assert {n for p in these for n in p.shape[:-1]} == set(TOKENS)
    assert {len(p.shape) for p in these} == {2, 3, 4}
    assert len({str(p) for p in these}) == 120
    used = {spec for p in these for layer in p.layers for spec in [layer.scheme.spec]}
    assert [name for name, spec in PRESETS.items() if spec not in used] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_is_found(dtype: torch.dtype) -> None:
    """A result that is off by two percent, one row that is another's, and a NaN where none belongs."""
    program = Program(dtype, (5, 128), "usual")
    program.layers.append(layer_of("mxfp4", dtype, (128, 128, True), 0))
    program.lines, program.outputs, program.calls = ["v1 = o.relu(v0)", "v2 = o.linear(v1, 0)"], ["v2"], 1
    (x,) = inputs_of([program], 0)
    output, seen = Part(program)(x)
    check(program, x, [output, seen])
    for wrong in (output * 1.02, output.roll(1, 0), output.index_fill(0, torch.tensor([2]), torch.nan)):
        with pytest.raises(AssertionError, match="output 0"):
            check(program, x, [wrong, seen])
    with pytest.raises(AssertionError, match="the input of Linear 0"):
        check(program, x, [output, seen * 1.02])
