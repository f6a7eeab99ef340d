"""A layer's experts: what they add up and in which order, and how their tensors are held in one piece."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.lowering import providers  # noqa: F401  their layouts
from quark_inductor.schemes.base import QuarkLinear, set_parameters
from quark_inductor.schemes.errors import ShapeError, TrainingError
from quark_inductor.schemes.experts import GroupedLinear, QuarkExperts, sorted_by_expert
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

E, H, I = 4, 128, 64  # noqa: E741
# Groups of 128 do not fit the 64 inputs of a down_proj.
NAMES = [name for name in PRESETS if "128" not in name]
# Gate and up of an expert have one global scale only where they were quantized together.
APART = ("nvfp4", "nvfp4_weight_only", "int4_fp8")
U32 = 2.0**-24
Linear = Callable[..., QuarkLinear]


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


class Gated(nn.Module):
    """What a model's module of experts has besides its weights."""

    has_gate = True

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up


class InTurn(nn.Module):
    """Gate and up are one Linear, whose outputs are theirs in turn."""

    has_gate = True

    def _apply_gate(self, y: Tensor) -> Tensor:
        return F.silu(y[..., ::2]) * (y[..., 1::2] + 1)


class NoGate(nn.Module):
    has_gate = False

    def act_fn(self, y: Tensor) -> Tensor:
        return y.relu()


SEPARATE = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


@pytest.fixture
def experts(linear: Linear) -> Callable[..., QuarkExperts]:
    """Random experts of a preset, not grouped, their weights packed as kernels of this machine read them."""

    def make(
        spec: str | LinearSpec,
        sizes: Mapping[str, tuple[int, int]] = SEPARATE,
        original: nn.Module | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        sums: torch.dtype | None = None,
        packed: bool = True,
        change: Callable[[int, str, QuarkLinear], None] = lambda expert, name, linear: None,
    ) -> QuarkExperts:
        made = []
        for e in range(E):
            linears = {}
            for i, (name, (n, k)) in enumerate(sizes.items()):
                linears[name] = linear(spec, n, k, seed=10 * e + i, size=0.5 * 1.5**e, dtype=dtype)
                change(e, name, linears[name])
                if packed:
                    linears[name].pack_()
            made.append(linears)
        return QuarkExperts(made, original or Gated(), sums)

    return make


def routed(tokens: int, k: int = 3, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    """Tokens, which experts each has, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :k]
    weights = torch.rand(tokens, k, generator=generator) + 0.25
    return torch.randn(tokens, H, generator=generator).to(dtype), index, weights.to(dtype)


def one_after_the_other(
    module: QuarkExperts,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    sums: torch.dtype | None = None,
    order: Sequence[int] = range(E),
) -> Tensor:
    """Expert by expert, the gate of :class:`Gated`: each result times its weight, rounded, and added up in a dtype."""
    y = torch.zeros(x.shape, dtype=sums or x.dtype)
    for e in order:
        # In the order of transformers' loop: on some CPUs a row's sum depends on where the row is in a product.
        slot, token = torch.where(index.t() == e)
        if len(token) == 0:
            continue
        gate, up, down = (module.get_submodule(f"{e}.{name}") for name in SEPARATE)
        rows = down(F.silu(gate(x[token])) * up(x[token])) * weights[token, slot].unsqueeze(-1)
        for at, row in zip(token.tolist(), rows.to(x.dtype), strict=True):
            y[at] += row.to(y.dtype)
    return y.to(x.dtype)


def at_once(module: nn.Module, *args: Tensor) -> Tensor:
    """What compiled code computes, without the second that tracing it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        result: Tensor = module(*args)
    return result


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(module: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: (t.dtype, tuple(t.shape), raw_bytes(t)) for name, t in module.state_dict().items()}


def held_bytes(module: nn.Module) -> int:
    """Memory of parameters and buffers, what several share counted once."""
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*module.parameters(), *module.buffers())]
    total = end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


# --- numbers


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_at_once_are_the_loop(experts: Callable[..., QuarkExperts], name: str) -> None:
    """Bit by bit, before and after grouping; compiled, the Linears of an expert get the same rows."""
    module, args = experts(name), routed(13)
    expected = one_after_the_other(module, *args)
    assert torch.equal(module(*args), expected)
    module.group_()
    assert module.grouped == (("gate_proj", "up_proj", "down_proj") if name in APART else ("gate_up_proj", "down_proj"))
    assert torch.equal(module(*args), expected)
    assert torch.equal(at_once(module, *args), expected)


@pytest.mark.parametrize("sums", [None, torch.float32], ids=str)
def test_order_and_dtype_of_the_sum(experts: Callable[..., QuarkExperts], sums: torch.dtype | None) -> None:
    """By expert, not by slot, and rounded after each or at the end: the other ways give other numbers."""
    module, args = experts("mxfp4", sums=sums), routed(40)
    expected = one_after_the_other(module, *args, sums=sums)
    other = torch.float32 if sums is None else None
    assert not torch.equal(one_after_the_other(module, *args, sums=other), expected)
    if sums is None:
        assert not torch.equal(one_after_the_other(module, *args, order=(3, 1, 0, 2)), expected)
    module.group_()
    for result in (module(*args), at_once(module, *args)):
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, expected)
    # The order in which a token's experts are listed is no order.
    x, index, weights = args
    turned = x, index.flip(1), weights.flip(1)
    assert torch.equal(module(*turned), expected)
    assert torch.equal(at_once(module, *turned), expected)


@pytest.mark.parametrize("name", ["mxfp4_weight_only", "int8_weight_only", "fp8_weight_only"])
def test_close_to_float64(experts: Callable[..., QuarkExperts], oracle: ModuleType, name: str) -> None:
    """Of the values that the codes stand for by ml_dtypes, within what float32 sums allow."""
    module, (x, index, weights) = experts(name, dtype=torch.float32), routed(13, dtype=torch.float32)
    module.group_()
    formats = {"mxfp4_weight_only": "mxfp4", "int8_weight_only": "int8", "fp8_weight_only": "fp8_e4m3"}
    expected, bound = torch.zeros(2, *x.shape, dtype=torch.float64)

    def product(layer: Any, a: Tensor, error: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        held = [getattr(layer, f"weight{suffix}", None) for suffix in ("", "_scale", "_scale_2", "_zero_point")]
        w = torch.from_numpy(oracle.weight_values(*held, formats[name], torch.float32).astype(np.float64))
        n = a.shape[1] + 2
        sums = (a.abs() + error) @ w.abs().t() + layer.bias.double().abs()
        of_input = error @ w.abs().t() if isinstance(error, Tensor) else 0.0
        return a @ w.t() + layer.bias.double(), of_input + n * U32 / (1 - n * U32) * sums

    for e in range(E):
        token, slot = torch.where(index == e)
        layers = [module.get_submodule(f"{e}.{name}") for name in SEPARATE]
        (gate, of_gate), (up, of_up) = (product(layer, x[token].double()) for layer in layers[:2])
        # |silu'| < 1.1; it and the product round a few times more, relative to their result (exp: below 4 ulp).
        error = 1.1 * of_gate * (up.abs() + of_up) + F.silu(gate).abs() * of_up
        result, error = product(layers[2], F.silu(gate) * up, error + 8 * U32 * (F.silu(gate) * up).abs())
        by = weights[token, slot].double().unsqueeze(-1)
        expected[token] += result * by
        bound[token] += (error + 5 * U32 * result.abs()) * by
    for y in (module(x, index, weights), at_once(module, x, index, weights)):
        assert ((y.double() - expected).abs() <= bound).all()
    assert bound.max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (1, 2), (1, E), (7, E), (7, 1)])
def test_any_number_of_tokens_and_experts(experts: Callable[..., QuarkExperts], tokens: int, k: int) -> None:
    module, args = experts("mxfp4"), routed(tokens, k)
    expected = one_after_the_other(module, *args)
    assert expected.shape == (tokens, H)
    assert torch.equal(module(*args), expected)
    module.group_()
    assert torch.equal(at_once(module, *args), expected)


def test_one_compiled_function_for_any_number_of_tokens(experts: Callable[..., QuarkExperts]) -> None:
    module = experts("mxfp4")
    module.group_()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    compiled(*routed(5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (2, 33, 7):
            args = routed(tokens, seed=tokens)
            assert torch.equal(compiled(*args), one_after_the_other(module, *args))


@pytest.mark.parametrize(("name", "packed"), [("fp8_weight_only", True), ("ptpc_fp8", False), ("mxfp4", False)])
def test_an_expert_that_no_token_hits_is_not_read(
    experts: Callable[..., QuarkExperts], name: str, packed: bool
) -> None:
    def damage(expert: int, projection: str, layer: QuarkLinear) -> None:
        if expert == 1 and name == "mxfp4":
            layer.weight_scale.fill_(255)
        elif expert == 1:
            layer.weight.view(torch.uint8).fill_(0x7F)
            layer.weight_scale.fill_(torch.nan)

    good, bad = experts(name, packed=packed), experts(name, packed=packed, change=damage)
    bad.group_()
    assert bad.grouped
    x, index, weights = routed(13, 2)
    hit = torch.tensor([0, 2, 3])[index % 3]
    expected = one_after_the_other(good, x, hit, weights)
    assert torch.equal(bad(x, hit, weights), expected)
    assert torch.equal(at_once(bad, x, hit, weights), expected)
    hit[4, 0] = 1  # and one is
    for y in (bad(x, hit, weights), at_once(bad, x, hit, weights)):
        assert y.isnan().all(-1).nonzero().flatten().tolist() == [4]


def test_a_weight_that_is_nan_is_of_its_token_only(experts: Callable[..., QuarkExperts]) -> None:
    module, (x, index, weights) = experts("mxfp4"), routed(9)
    module.group_()
    expected = one_after_the_other(module, x, index, weights)
    weights[2, 1] = weights[7, 0] = torch.nan
    others = [t for t in range(9) if t not in (2, 7)]
    for y in (module(x, index, weights), at_once(module, x, index, weights)):
        assert y[[2, 7]].isnan().all()
        assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("beyond", [E, E + 3])
@pytest.mark.parametrize("sums", [None, torch.float32], ids=str)
def test_ids_beyond_the_experts_are_of_none(
    experts: Callable[..., QuarkExperts], beyond: int, sums: torch.dtype | None
) -> None:
    module, (x, index, weights) = experts("mxfp4", sums=sums), routed(9)
    module.group_()
    index[1, 0] = index[4, 2] = beyond
    index[6] = beyond  # this token has none at all
    expected = one_after_the_other(module, x, index, weights, sums)
    assert not expected[6].any()
    assert torch.equal(module(x, index, weights), expected)
    assert torch.equal(at_once(module, x, index, weights), expected)
    everyone = torch.full_like(index, beyond)
    assert not at_once(module, x, everyone, weights).any()
    assert not module(x, everyone, weights).any()


def test_rows_that_are_not_finite_stay_rows(experts: Callable[..., QuarkExperts]) -> None:
    module, (x, index, weights) = experts("mxfp4"), routed(9)
    module.group_()
    expected = one_after_the_other(module, x, index, weights)
    x[3, 5], x[8, 0] = torch.nan, torch.inf
    others = [t for t in range(9) if t not in (3, 8)]
    for y in (module(x, index, weights), at_once(module, x, index, weights)):
        assert not y[[3, 8]].isfinite().any()
        assert torch.equal(y[others], expected[others])


def test_experts_whose_gate_and_up_are_one_linear(experts: Callable[..., QuarkExperts]) -> None:
    module = experts("mxfp4", {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}, InTurn(), sums=torch.float32)
    x, index, weights = routed(9)
    y = torch.zeros(9, H)
    for e, (token, slot) in enumerate(torch.where(index == e) for e in range(E)):
        both = module.get_submodule(f"{e}.gate_up_proj")(x[token])
        down = module.get_submodule(f"{e}.down_proj")(F.silu(both[:, ::2]) * (both[:, 1::2] + 1))
        y[token] += (down * weights[token, slot, None]).float()
    module.group_()
    assert module.grouped == ("gate_up_proj", "down_proj")
    assert torch.equal(module(x, index, weights), y.bfloat16())
    assert torch.equal(at_once(module, x, index, weights), y.bfloat16())


def test_experts_without_a_gate(experts: Callable[..., QuarkExperts]) -> None:
    module = experts("mxfp4", {"up_proj": (I, H), "down_proj": (H, I)}, NoGate())
    x, index, weights = routed(9, 1)
    y = torch.zeros(9, H, dtype=torch.bfloat16)
    for e, (token, _) in enumerate(torch.where(index == e) for e in range(E)):
        up = module.get_submodule(f"{e}.up_proj")(x[token])
        y[token] = module.get_submodule(f"{e}.down_proj")(up.relu()) * weights[token]
    module.group_()
    assert module.grouped == ("up_proj", "down_proj")
    assert torch.equal(module(x, index, weights), y)
    assert torch.equal(at_once(module, x, index, weights), y)


def test_rows_by_expert() -> None:
    """Against a list that Python sorts; entries of one expert stay in their order, slot by slot."""
    index = torch.randint(0, 7, (11, 3), generator=torch.Generator().manual_seed(2))
    order, offsets = sorted_by_expert(index, 5)
    flat = [(index[t, s].item(), s * 11 + t) for s in range(3) for t in range(11)]
    assert order.tolist() == [at for _, at in sorted(flat)]
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(e <= last for e, _ in flat) for last in range(5)]


# --- one piece


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "as stored"])
@pytest.mark.parametrize("name", NAMES)
def test_no_byte_is_held_twice(experts: Callable[..., QuarkExperts], name: str, packed: bool) -> None:
    module = experts(name, packed=packed)
    before, names, size = contents(module), list(module.state_dict()), held_bytes(module)
    assert size == sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    module.group_()
    assert module.refusal == ""
    assert list(module.state_dict()) == names
    assert contents(module) == before
    # A scale that an expert has one of is there twice, once for each output: all but nothing.
    scalars = sum(p.numel() == 1 for p in module.parameters())
    assert held_bytes(module) <= size + scalars * I * 4 + 64 * len(module.grouped)
    if not scalars:
        assert held_bytes(module) == size
    for projection in module.grouped:
        whole = module.get_submodule(projection)
        names_of_parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        for tensor in whole.buffers():
            begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            inside = [
                p
                for e, part in itertools.product(range(E), names_of_parts)
                for p in module.get_submodule(f"{e}.{part}").parameters()
                if begin <= p.data_ptr() < end
            ]
            assert not inside or sum(p.nbytes for p in inside) == tensor.nbytes
    module.ungroup_()
    assert module.grouped == ()
    assert contents(module) == before
    assert held_bytes(module) == size


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "ptpc_int8", "int4_wo_32", "nvfp4"])
def test_what_is_loaded_into_grouped_experts_computes(experts: Callable[..., QuarkExperts], name: str) -> None:
    def halve(expert: int, projection: str, layer: QuarkLinear) -> None:
        set_parameters(layer, bias=layer.bias.data / 2)
        if layer.weight_scale.is_floating_point() and layer.weight_scale.dtype.itemsize > 1:
            set_parameters(layer, weight_scale=layer.weight_scale.data * (0.5 + expert))

    module, other, args = experts(name), experts(name, change=halve), routed(9)
    module.group_()
    before, expected = at_once(module, *args), one_after_the_other(other, *args)
    assert not torch.equal(before, expected)
    module.load_state_dict(other.state_dict())
    assert module.grouped
    assert contents(module) == contents(other)
    assert torch.equal(module(*args), expected)
    assert torch.equal(at_once(module, *args), expected)
    # As a part of a model, too.
    parent, states = nn.ModuleDict({"mlp": module}), nn.ModuleDict({"mlp": experts(name)}).state_dict()
    parent.load_state_dict(states)
    assert torch.equal(at_once(module, *args), before)


def test_what_does_not_load_leaves_them_grouped(experts: Callable[..., QuarkExperts]) -> None:
    module, args = experts("mxfp4"), routed(9)
    module.group_()
    state = module.state_dict()
    del state["2.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"2\.down_proj\.weight"):
        module.load_state_dict(state)
    assert torch.equal(at_once(module, *args), one_after_the_other(module, *args))


@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_a_copy_is_its_own(experts: Callable[..., QuarkExperts], name: str) -> None:
    module, other, args = experts(name), experts(name, sizes=dict(reversed(SEPARATE.items()))), routed(9)
    module.group_()
    expected, before = one_after_the_other(module, *args), contents(module)
    copied = copy.deepcopy(module)
    assert copied.grouped == module.grouped
    assert torch.equal(copied(*args), expected)
    assert torch.equal(at_once(copied, *args), expected)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(at_once(copied, *args), one_after_the_other(other, *args))
    assert contents(module) == before
    assert torch.equal(at_once(module, *args), expected)


@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_pickled_and_saved(experts: Callable[..., QuarkExperts], name: str) -> None:
    module, args = experts(name), routed(9)
    module.group_()
    expected = one_after_the_other(module, *args)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert held_bytes(saved) == held_bytes(module)
    for back in (pickle.loads(pickle.dumps(module)), saved):
        assert contents(back) == contents(module)
        assert back.grouped == module.grouped
        assert torch.equal(back(*args), expected)
        assert torch.equal(at_once(back, *args), expected)


@pytest.mark.parametrize("name", ["mxfp4", "ptpc_fp8", "fp8", "nvfp4", "int8"])
def test_moved(experts: Callable[..., QuarkExperts], name: str) -> None:
    """To where it is, and to a device without memory."""
    module, args = experts(name), routed(9)
    module.group_()
    expected, state = one_after_the_other(module, *args), module.state_dict()
    size = held_bytes(module)
    module.to("cpu")
    assert held_bytes(module) == size
    assert torch.equal(at_once(module, *args), expected)
    module.to("meta")
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    assert {n: (t.shape, t.dtype) for n, t in module.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    assert module.grouped


# --- gate and up in one GEMM or two


@pytest.mark.parametrize("name", ["fp8", "fp8_weight_only", "int8", "uint8"])
def test_scales_of_one_number_are_joined_exactly(experts: Callable[..., QuarkExperts], name: str) -> None:
    """One of gate and one of up become those of their outputs; zero points likewise."""
    spec: Any = name
    if name == "uint8":
        unsigned = TensorSpec(dtype="uint8", qscheme="per_tensor", symmetric=False)
        spec = LinearSpec(weight=unsigned, input=TensorSpec(dtype="uint8", qscheme="per_tensor", symmetric=False))

    def change(expert: int, projection: str, layer: QuarkLinear) -> None:
        by = {"gate_proj": 1.0, "up_proj": 1.7, "down_proj": 0.3}[projection] + expert
        set_parameters(layer, weight_scale=(layer.weight_scale.data * by).to(layer.weight_scale.dtype))

    module, args = experts(spec, change=change), routed(13)
    scales = {module.get_submodule(f"1.{projection}").weight_scale.item() for projection in ("gate_proj", "up_proj")}
    assert len(scales) == 2
    expected = one_after_the_other(module, *args)
    module.group_()
    assert module.grouped == ("gate_up_proj", "down_proj")
    assert module.get_submodule("gate_up_proj").weight_scale.shape == (E, 2 * I)
    assert torch.equal(module(*args), expected)
    assert torch.equal(at_once(module, *args), expected)


@pytest.mark.parametrize("alike", [True, False])
def test_global_scales_of_nvfp4(experts: Callable[..., QuarkExperts], alike: bool) -> None:
    """Gate and up are one GEMM where they have one, else two: there is none for each output."""

    def change(expert: int, projection: str, layer: QuarkLinear) -> None:
        by = 1.0 if alike or projection != "up_proj" else 1.25
        set_parameters(layer, weight_scale_2=torch.tensor(2.0**-9 * by * (1 + expert)))

    module, args = experts("nvfp4", change=change), routed(13)
    expected = one_after_the_other(module, *args)
    module.group_()
    assert module.grouped == (("gate_up_proj", "down_proj") if alike else ("gate_proj", "up_proj", "down_proj"))
    assert torch.equal(at_once(module, *args), expected)


def test_one_expert_with_unlike_scales_is_enough(experts: Callable[..., QuarkExperts]) -> None:
    """The last of them: nothing of the others was changed when it is found."""

    def change(expert: int, projection: str, layer: QuarkLinear) -> None:
        by = 1.25 if (expert, projection) == (E - 1, "up_proj") else 1.0
        set_parameters(layer, input_scale=(layer.input_scale.data * by).to(layer.input_scale.dtype))

    module, args = experts("fp8", change=change), routed(13)
    before, expected = contents(module), one_after_the_other(module, *args)
    module.group_()
    assert module.grouped == ("gate_proj", "up_proj", "down_proj")
    assert contents(module) == before
    assert torch.equal(at_once(module, *args), expected)


@pytest.mark.parametrize("name", ["mxfp4", "ptpc_fp8", "int8_weight_only"])
@pytest.mark.parametrize("width", [32, 96, 160])
def test_widths_between_panels_stay_two(experts: Callable[..., QuarkExperts], name: str, width: int) -> None:
    module = experts(name, {"gate_proj": (width, H), "up_proj": (width, H), "down_proj": (H, width)})
    args = routed(13)
    expected = one_after_the_other(module, *args)
    module.group_()
    assert module.grouped == ("gate_proj", "up_proj", "down_proj")
    assert torch.equal(module(*args), expected)
    assert torch.equal(at_once(module, *args), expected)


def test_input_scales_of_two_dtypes(experts: Callable[..., QuarkExperts]) -> None:
    """An expert that calibration did not reach has float32 ones among bfloat16 ones."""

    def change(expert: int, projection: str, layer: QuarkLinear) -> None:
        if expert == 2:
            set_parameters(layer, input_scale=torch.tensor(0.0123))  # no number of bfloat16

    module, args = experts("fp8", change=change), routed(13)
    before, expected = contents(module), one_after_the_other(module, *args)
    assert before["2.up_proj.input_scale"][0] == torch.float32
    module.group_()
    assert module.grouped == ("gate_up_proj", "down_proj")
    assert contents(module) == before
    assert torch.equal(module(*args), expected)
    assert torch.equal(at_once(module, *args), expected)
    module.ungroup_()
    assert contents(module) == before


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "as stored"])
@pytest.mark.parametrize("n", [64, 100, 128, 192, 224, 256])
def test_blocks_of_fp8_do_not_cross_from_gate_to_up(linear: Linear, n: int, packed: bool) -> None:
    """Blocks have 128 rows: joined, the second's would begin elsewhere."""
    experts = [[linear("fp8_block128", n, H, seed=2 * e + i, size=2.0**i) for i in range(2)] for e in range(2)]
    for m in itertools.chain(*experts):
        if packed:
            m.pack_()
    x, offsets = routed(6)[0].float(), torch.tensor([2, 6], dtype=torch.int32)
    expected = torch.cat(
        [torch.cat([m(rows) for m in e], -1) for e, rows in zip(experts, x.split([2, 4]), strict=True)]
    )
    if n % 128:
        with pytest.raises(ShapeError):
            GroupedLinear(experts)
        return
    assert torch.equal(GroupedLinear(experts)(x, offsets), expected)


# --- what is refused


def test_why_they_are_not_grouped(experts: Callable[..., QuarkExperts], linear: Linear) -> None:
    module, args = experts("mxfp4"), routed(5)
    assert module.refusal == "group_() was not called"
    module.group_()
    assert module.refusal == ""
    module.ungroup_()
    assert module.refusal == "ungroup_() was called"
    expected = module(*args)
    before = contents(module)
    # One of another kind.
    module.get_submodule("2").down_proj = linear("mxfp4_weight_only", H, I, dtype=torch.bfloat16)
    module.group_()
    assert (module.grouped, module.refusal) == ((), "their Linears cannot be grouped: they are of 2 kinds")
    assert {n: t for n, t in contents(module).items() if not n.startswith("2.")} == {
        n: t for n, t in before.items() if not n.startswith("2.")
    }
    module.get_submodule("2").down_proj = nn.Linear(I, H)
    module.group_()
    assert (module.grouped, module.refusal) == ((), "some of their Linears are not quantized")
    assert expected.shape == (5, H)


def test_why_gate_and_up_are_not_one(linear: Linear) -> None:
    def refused(*linears: QuarkLinear, packed: bool = True) -> str:
        for m in linears:
            if packed:
                m.pack_()
        with pytest.raises(ShapeError) as caught:
            GroupedLinear([linears])
        return str(caught.value)

    assert refused(linear("mxfp4"), linear("ptpc_fp8")) == "they are of 2 kinds"
    assert refused(linear("mxfp4", 64), linear("mxfp4", 128)) == "they are of 2 kinds"
    assert refused(linear("mxfp4", 96), linear("mxfp4", 96)) == (
        "96 output features are packed by 64, which must divide them"
    )
    other = linear("fp8", 64)
    set_parameters(other, input_scale=other.input_scale.data * 2)
    assert refused(linear("fp8", 64), other) == "they have unlike input_scale, and a GEMM has one"


def test_a_gradient_is_refused(experts: Callable[..., QuarkExperts]) -> None:
    module, (x, index, weights) = experts("mxfp4_weight_only"), routed(5)
    x.requires_grad_()
    assert module(x, index, weights).shape == (5, H)  # the fixture has switched gradients off
    with torch.enable_grad(), pytest.raises(TrainingError, match=r"input of quantized experts.*no_grad.*detach"):
        module(x, index, weights)
    with torch.enable_grad():
        assert module(x.detach(), index, weights).shape == (5, H)


# --- the op


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "as stored"])
@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int8"])
def test_opcheck(experts: Callable[..., QuarkExperts], name: str, packed: bool) -> None:
    module = experts(name, packed=packed)
    module.group_()
    down: Any = module.get_submodule("down_proj")
    tensors = [getattr(down, n) for n in down.names]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if all(t.dtype.itemsize > 1 or not t.is_floating_point() for t in tensors):
        checks.append("test_schema")  # torch compares no FP8 tensors
    x = torch.randn(9, I, generator=torch.Generator().manual_seed(4)).bfloat16()
    for ends in ([2, 2, 7, 9], [0, 0, 0, 0], [1, 3, 4, 5]):
        args = x, torch.tensor(ends, dtype=torch.int32), tensors, down.plan
        torch.library.opcheck(torch.ops.quark_inductor.grouped_linear, args, test_utils=checks)


@pytest.mark.parametrize("ends", [[2, 2, 7, 9], [0, 0, 0, 0], [1, 3, 4, 5], [0, 9, 9, 9]])
def test_each_expert_has_its_rows(experts: Callable[..., QuarkExperts], ends: list[int]) -> None:
    """What its own Linear gives, and zeros, not biases, behind the last row."""
    module = experts("mxfp4")
    linears = [module.get_submodule(f"{e}.down_proj") for e in range(E)]
    x = torch.randn(9, I, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = torch.zeros(9, H, dtype=torch.bfloat16)
    for m, begin, end in zip(linears, [0, *ends], ends, strict=False):
        if end > begin:
            expected[begin:end] = m(x[begin:end])
    module.group_()
    assert torch.equal(module.get_submodule("down_proj")(x, torch.tensor(ends, dtype=torch.int32)), expected)


def test_one_expert_that_cannot_be_packed_has_the_others_unpacked(experts: Callable[..., QuarkExperts]) -> None:
    """Block scales of 2^64 and more are in no panel: then no expert is in one, and all are one piece still."""

    def change(expert: int, name: str, linear: QuarkLinear) -> None:
        if (expert, name) == (1, "down_proj"):
            linear.weight_scale.data[0, 0] = 200

    module = experts("mxfp4", change=change)
    x, index, weights = routed(7)
    before = module(x, index, weights)
    module.group_()
    assert module.refusal == ""
    assert {m.packed is None for e in module.experts for m in (*e.into, e.down)} == {True}
    assert torch.equal(module(x, index, weights), before)
