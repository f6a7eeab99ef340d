"""Mixtures of experts: a layer's experts as Linears of their own, as checkpoints have them, and grouped.

Called eagerly each expert that was hit computes with its own Linears, as amd-quark runs it. Compiled, the rows of all
experts are sorted by expert, and one GEMM does for one projection of all of them. That is one op,
``quark_inductor::grouped_linear``: only an op can look at which experts have rows, and plain ops would
dequantize all of them.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from quark_inductor.schemes import memory, ops
from quark_inductor.schemes.base import (
    AT_LOAD,
    QuarkLinear,
    QuarkScheme,
    features_of_plan,
    linear,
    same_bytes,
    scheme_for,
    set_parameters,
)
from quark_inductor.schemes.errors import ShapeError, TrainingError
from quark_inductor.schemes.plan import Plan

# The Linears of an expert: those that read its input, in the order of their outputs, and the one behind its gate.
INTO, DOWN = ("gate_up_proj", "gate_proj", "up_proj"), "down_proj"
# Bytes that may be held twice while experts are grouped.
_AT_ONCE = 8 << 20


def grouped_linear(x: Tensor, offsets: Tensor, tensors: Sequence[Tensor], plan: str) -> Tensor:
    """A Linear of each of E experts: ``x [S, K]`` to ``[S, N]``, each expert that has rows by its own weight.

    Args:
        x: the rows of the first expert, then those of the second, and so on.
        offsets: int32 ``[E]``, where each expert's rows end. Rows from the last on are nobody's, and give zeros.
        tensors: those of a :class:`.base.QuarkLinear`, each with a first dimension of E.
        plan: how each expert computes, see :mod:`.plan`.
    """
    y = x.new_zeros(x.shape[0], features_of_plan(plan)[0])
    for expert, begin, end in ops.hit_experts(offsets):
        y[begin:end] = linear(x[begin:end], [t[expert] for t in tensors], plan)
    return y


def _fake_grouped_linear(x: Tensor, offsets: Tensor, tensors: Sequence[Tensor], plan: str) -> Tensor:
    return x.new_empty(x.shape[0], features_of_plan(plan)[0])


ops.register(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] tensors, str plan) -> Tensor",
    grouped_linear,
    _fake_grouped_linear,
)


@dataclass(frozen=True, slots=True)
class _Joined:
    """A tensor of Linears whose outputs follow each other.

    Attributes:
        shape: of the joined one.
        along: the dimension of the outputs; ``None``: it has none, and must be the same for all.
    """

    shape: tuple[int, ...]
    along: int | None

    def join(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        if self.along is not None:
            # What a Linear has one of is spread to its outputs.
            lengths = self.shape[self.along] // len(tensors)
            return torch.cat([t.expand(lengths) if t.ndim == 0 else t for t in tensors], self.along)
        if not all(same_bytes(tensors[0], t) for t in tensors):
            raise ShapeError(f"they have unlike {name}, and a GEMM has one")
        return tensors[0]


class GroupedLinear(nn.Module):
    """One projection of all experts: holds their tensors, each with a first dimension of E.

    Attributes:
        scheme: of each expert's Linear.
        plan: how each expert computes, see :mod:`.plan`.
        names: those of its tensors, in the order of the plan.
        in_features: K.
        out_features: N.
    """

    def __init__(self, experts: Sequence[Sequence[QuarkLinear]]) -> None:
        """Take the tensors of the experts' Linears, expert by expert; theirs become views of what is held here.

        Args:
            experts: of each expert the Linears whose outputs follow each other, as many and as wide.

        Raises:
            ShapeError: they differ in what they must share, or holding them together would change a number.
        """
        super().__init__()
        linears = [m for expert in experts for m in expert]
        kinds = {(m.in_features, m.out_features, m.scheme.spec, m.emulation, *sorted(_names(m))) for m in linears}
        if len(kinds) != 1:
            raise ShapeError(f"they are of {len(kinds)} kinds")
        plan, joined = _together(experts[0])
        if len(experts[0]) > 1:  # before the first is changed
            for expert in experts:
                for name, how in joined.items():
                    if how.along is None:
                        how.join(name, [getattr(m, name) for m in expert])
        self.in_features, self.out_features, self.plan = plan.in_features, plan.out_features, plan.text()
        self.names, self.scheme = plan.names, experts[0][0].scheme
        for name, how in joined.items():
            # Scales of experts that calibration did not reach are float32 whatever the others are.
            dtype = max((getattr(m, name).dtype for m in linears), key=lambda dtype: dtype.itemsize)
            device = getattr(linears[0], name).device
            self.register_buffer(name, _empty((len(experts), *how.shape), dtype, device), persistent=False)
        copied = 0
        for e, expert in enumerate(experts):
            for name, how in joined.items():
                whole = getattr(self, name)[e]
                whole.copy_(how.join(name, [getattr(m, name) for m in expert]))
                _share(name, whole, expert, how.along)
                copied += whole.nbytes
            if copied > _AT_ONCE:
                memory.return_freed()
                copied = 0

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """See :func:`grouped_linear`."""
        tensors = [getattr(self, name) for name in self.names]
        return torch.ops.quark_inductor.grouped_linear(x, offsets, tensors, self.plan)  # type: ignore[no-any-return]


def _names(linear: QuarkLinear) -> tuple[str, ...]:
    return tuple(name for name, _ in linear.named_parameters(recurse=False))


def _together(linears: Sequence[QuarkLinear]) -> tuple[Plan, dict[str, _Joined]]:
    """How one Linear computes that has the outputs of all, and what it holds."""
    first, names = linears[0], _names(linears[0])
    if len(linears) == 1:
        shapes = {name: tuple(getattr(first, name).shape) for name in names}
        return first.planned(), {name: _Joined(shape, 0 if shape else None) for name, shape in shapes.items()}
    widths = [m.out_features for m in linears]
    with torch.device("meta"):
        first.scheme.weight_tensors(widths, first.in_features, first.params_dtype)  # refuses blocks across two of them
    n = sum(widths)
    scheme, bias = _per_channel(first.scheme), first.bias is not None
    whole = QuarkLinear(first.in_features, n, scheme, bias=bias, dtype=first.params_dtype, device="meta")
    stored = None
    if first.packed is not None:
        layout, stored = first.packed[0], scheme.stored(whole)
        if not layout.rows or first.out_features % layout.rows:
            raise ShapeError(
                f"{first.out_features} output features are packed by {layout.rows}, which must divide them"
            )
    joined = {}
    for name in names:
        own = tuple(getattr(first, name).shape)
        if name in ("weight_packed", "bias") or (name == "weight" and first.emulation == AT_LOAD):
            joined[name] = _Joined((own[0] * len(linears), *own[1:]), 0)
            continue
        shape = tuple(getattr(whole, name).shape)
        along = next((d for d, size in enumerate(shape) if not own or size != own[d]), None)
        if along is not None and own and own[along] * len(linears) != shape[along]:
            raise ShapeError(f"their {name} of shape {own} do not fill one of shape {shape}")
        joined[name] = _Joined(shape, along)
    plan = replace(first.planned(), spec=scheme.spec, out_features=n, stored=stored)
    return plan, joined


def _per_channel(scheme: QuarkScheme) -> QuarkScheme:
    """The scheme of a weight whose outputs have scales of their own, where one has a scale: the same numbers."""
    weight = scheme.spec.weight
    if weight is None or weight.qscheme != "per_tensor" or weight.second is not None:
        return scheme
    return scheme_for(replace(scheme.spec, weight=replace(weight, qscheme="per_channel")))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return (
        memory.empty(*shape)
        if dtype == torch.uint8 and device.type == "cpu"
        else torch.empty(shape, dtype=dtype, device=device)
    )


def _share(name: str, whole: Tensor, linears: Sequence[QuarkLinear], along: int | None) -> None:
    """Let Linears hold parts of a tensor, so that no byte is held twice; numbers that they have one of stay theirs."""
    begin = 0
    for m in linears:
        own = getattr(m, name)
        if along is not None and own.ndim:
            part = whole.narrow(along, begin, own.shape[along])
            begin += own.shape[along]
            if part.dtype == own.dtype:
                set_parameters(m, **{name: part})


class Expert(nn.Module):
    """The Linears of one expert, under the names of a checkpoint. What runs them is :class:`QuarkExperts`."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in linears.items():
            self.add_module(name, module)

    @property
    def into(self) -> list[Any]:
        """What reads the input: one Linear, or a gate and what it is for."""
        return [self._modules[name] for name in INTO if name in self._modules]

    @property
    def down(self) -> Any:
        """What computes the output."""
        return self._modules[DOWN]


class QuarkExperts(nn.Module):
    """The experts of one layer, each of its own Linears, in the place of a model's module of experts.

    Its state dict is a checkpoint's: ``0.gate_proj.weight``, ``0.gate_proj.weight_scale``, ... The gate between the
    Linears and all routing stay the model's. Source of the order in which results are added up: amd-quark 0.13
    (``module_replacement/quark_experts.py: QuarkExperts, QuarkGptOssExperts``).

    Attributes:
        count: E.
        original: the model's module, without its weights: it has the gate.
        sums: dtype in which the experts' outputs are added up; ``None``: that of the input.
        grouped: names of the projections that are held in one piece; none before :meth:`group_`.
        refusal: why there are none; ``""``: there are.
    """

    def __init__(
        self, experts: Sequence[Mapping[str, nn.Module]], original: nn.Module, sums: torch.dtype | None = None
    ) -> None:
        """Make the module of experts.

        Args:
            experts: of each expert its Linears, float or quantized, by name.
            original: the model's module. Its ``_apply_gate`` is what is between the projections,
                ``[S, 2 I] -> [S, I]``, and so is its ``act_fn`` where the experts have no gate.
            sums: see the class.
        """
        super().__init__()
        self.count = len(experts)
        for e, linears in enumerate(experts):
            self.add_module(str(e), Expert(linears))
        self.original, self.sums = original, sums
        self.grouped: tuple[str, ...] = ()
        self.refusal = "group_() was not called"
        self._register_load_state_dict_pre_hook(self._before_loading)
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def experts(self) -> list[Expert]:
        """All of them."""
        return [self._modules[str(e)] for e in range(self.count)]  # type: ignore[misc]

    def group_(self) -> None:
        """Hold each projection of all experts in one piece, which compiled code reads; same bytes, same numbers."""
        if self.grouped:
            return
        into, down = [e.into for e in self.experts], [[e.down] for e in self.experts]
        if not all(isinstance(m, QuarkLinear) for expert in (*into, *down) for m in expert):
            self.refusal = "some of their Linears are not quantized"
            return
        linears = [m for expert in (*into, *down) for m in expert]
        # As the checkpoint has them if their layout is not for experts, or one of them could not be packed.
        packed = [m for m in linears if m.packed is not None]
        alone = packed if len(packed) < len(linears) else [m for m in packed if not m.packed[0].experts]  # type: ignore[index]
        for m in alone:
            m.unpack_()
        try:
            named = {**self._grouped_into(into), DOWN: GroupedLinear(down)}
        except ShapeError as e:
            self.refusal = f"their Linears cannot be grouped: {e}"
            for m in alone:
                m.pack_()
            return
        for name, module in named.items():
            self.add_module(name, module)
        self.grouped, self.refusal = tuple(named), ""

    def _grouped_into(self, into: list[list[QuarkLinear]]) -> dict[str, GroupedLinear]:
        """Gate and up as one projection where that changes no number, else as two."""
        names = [name for name in INTO if name in self.experts[0]._modules]
        if len(names) > 1:
            with contextlib.suppress(ShapeError):
                return {INTO[0]: GroupedLinear(into)}
        return {name: GroupedLinear([[expert[i]] for expert in into]) for i, name in enumerate(names)}

    def ungroup_(self) -> None:
        """The inverse of :meth:`group_`."""
        for name in self.grouped:
            del self._modules[name]
        if self.grouped:
            for m in (m for e in self.experts for m in e.modules() if isinstance(m, QuarkLinear)):
                set_parameters(m, **{name: p.data.clone() for name, p in m.named_parameters(recurse=False)})
        self.grouped, self.refusal = (), "ungroup_() was called"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]``: of each token the sum of its experts' outputs, each times its weight.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, k]``, integers; E and above: no expert.
            top_k_weights: ``[T, k]``, applied to outputs. A NaN makes its token's result NaN.

        Raises:
            TrainingError: a gradient of the input was asked for.
        """
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise TrainingError(
                "a gradient was asked of the input of quantized experts, which are for inference: call the model under "
                "torch.no_grad() or torch.inference_mode(), or detach() what goes into them"
            )
        if self.grouped and torch.compiler.is_compiling():
            return self._all_at_once(hidden_states, top_k_index, top_k_weights)
        return self._one_by_one(hidden_states, top_k_index, top_k_weights)

    def _one_by_one(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        order, offsets = sorted_by_expert(index, self.count)
        y = x.new_zeros(x.shape, dtype=self.sums)
        experts = self.experts
        for e, begin, end in ops.hit_experts(offsets):
            slot, token = order[begin:end] // len(x), order[begin:end] % len(x)
            rows = x[token]
            into = [linear(rows) for linear in experts[e].into]
            result = experts[e].down(self._gate(into)) * weights[token, slot, None]
            y.index_add_(0, token, result.to(x.dtype).to(y.dtype))
        return y.to(x.dtype)

    def _all_at_once(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, k = index.shape
        order, offsets = sorted_by_expert(index, self.count)
        rows = x[order % tokens]
        into = [self._modules[name](rows, offsets) for name in self.grouped[:-1]]  # type: ignore[misc]
        down = self._modules[DOWN](self._gate(into), offsets)  # type: ignore[misc]
        results = (down * weights.t().reshape(-1)[order].unsqueeze(-1)).to(x.dtype)
        # Where the k results of each token are, in the order of their experts.
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        places = places.view(k, tokens).sort(0).values
        y = x.new_zeros(x.shape, dtype=self.sums)
        for j in range(k):
            y = y + results[places[j]].to(y.dtype)
        return y.to(x.dtype)

    def _gate(self, into: list[Tensor]) -> Tensor:
        y = into[0] if len(into) == 1 else torch.cat(into, -1)
        original: Any = self.original
        gated: Tensor = original._apply_gate(y) if original.has_gate else original.act_fn(y)
        return gated

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = next(self.experts[0].down.parameters()).device
        moves = fn(torch.empty(0, dtype=torch.uint8, device=device)).device != device
        grouped = bool(self.grouped)
        if moves:
            self.ungroup_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if moves and grouped:
            self.group_()
        return self

    def _before_loading(self, *args: Any) -> None:
        self._groups_again = bool(self.grouped)
        self.ungroup_()


def _after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, QuarkExperts)
    if module._groups_again:
        module.group_()


def sorted_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Which rows are each expert's.

    Args:
        index: ``[T, k]``, the experts of each token.
        experts: E.

    Returns:
        ``[k T]``: entries of ``index.t()``, flat, sorted by expert, those of one expert in their order; and int32
        ``[E]``, where each expert's end.
    """
    found, order = index.t().reshape(-1).sort(stable=True)
    ends = torch.arange(experts, dtype=found.dtype, device=found.device)
    return order, torch.searchsorted(found, ends, right=True, out_int32=True)
