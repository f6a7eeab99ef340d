"""What a scheme is, and the module that holds one.

A scheme knows the tensors of one family of :class:`LinearSpec` and computes a Linear from them in plain ops: the
emulation. It holds no tensor itself; those live on the :class:`QuarkLinear`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from quark_inductor.schemes import ops
from quark_inductor.schemes.activations import activation_quantizer
from quark_inductor.schemes.errors import (
    CheckpointError,
    ConfigError,
    QuarkInductorError,
    ShapeError,
    TrainingError,
)
from quark_inductor.schemes.layout import Layout, Stored, layout_for
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.ops import dtype_name, dtype_of
from quark_inductor.schemes.plan import Plan, parse
from quark_inductor.schemes.spec import LinearSpec, TensorSpec

PER_CALL, AT_LOAD = "per_call", "at_load"


class QuarkScheme(ABC):
    """How a Linear of one kind of spec stores its tensors and computes.

    ``get_min_capability``, ``create_weights``, ``process_weights_after_loading`` and ``apply_weights`` are those of the
    schemes known from vLLM (``model_executor/layers/quantization/quark/schemes``), with the same meaning.

    Attributes:
        name: the scheme's registered name, that of its file.
        spec: the spec it was made for.
        input: how it quantizes its input, or ``None``.
        output: how it quantizes its output, or ``None``.
    """

    name: ClassVar[str]

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.input = None if spec.input is None else activation_quantizer(spec.input, "input")
        self.output = None if spec.output is None else activation_quantizer(spec.output, "output")

    @property
    def weight(self) -> TensorSpec:
        """How the weight is quantized, of a scheme that takes no spec without one."""
        assert self.spec.weight is not None
        return self.spec.weight

    @property
    def activation(self) -> str:
        """The format of the quantized input, as :mod:`.operands` names it; ``""``: it stays as it is."""
        return "" if self.spec.input is None else self.spec.input.block_format or self.spec.input.dtype

    @classmethod
    @abstractmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Why this scheme is not the one for ``spec``, or ``None`` if it is."""

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int:
        """CUDA compute capability times ten from which hardware kernels exist; below it the emulation runs."""

    @abstractmethod
    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The parameters a checkpoint holds for the weight, uninitialized, in the checkpoint's layout.

        Args:
            widths: output features of each fused shard (one entry: nothing is fused). A per-tensor scale has one entry
                a shard then, else no dimension.
            k: input features.
            params_dtype: the model's dtype, that of floating-point scales.

        Raises:
            ShapeError: the scheme cannot represent these sizes.
        """

    @abstractmethod
    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The weight's values ``[N, K]`` in ``dtype``, in plain ops."""

    @abstractmethod
    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The parameters of :meth:`weight_tensors` for a float ``weight [N, K]``, as amd-quark exports them."""

    def quantize_shared_weight(self, weight: Tensor, amax: Tensor) -> Mapping[str, Tensor]:
        """:meth:`quantize_weight` of one of several weights that read one activation.

        Args:
            weight: float ``[N, K]``.
            amax: ``[]``, the largest magnitude in all of them, for a format with a global scale.
        """
        return self.quantize_weight(weight)

    def stored(self, layer: Any) -> Stored | None:
        """How the parameters hold the weight's codes; ``None``: in a way that no layout packs.

        Groups of other than multiples of 8 columns are none: kernels decode 8 at a time.
        """
        return None

    def adapt_to(self, layer: Any, arch: str) -> None:
        """Bring the loaded parameters into the form a GPU architecture (``"gfx942"``) wants. Changes no value."""
        return None

    def merge_shards(self, layer: Any) -> None:
        """Turn one per-tensor weight scale a shard into one scale, after loading a layer of more than one shard."""
        return None

    def create_weights(
        self,
        layer: nn.Module,
        *,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
    ) -> None:
        """Register on ``layer`` the parameters a checkpoint holds, uninitialized, in the checkpoint's layout.

        Args:
            layer: the module that will hold them.
            output_partition_sizes: output features of each fused shard (one entry: nothing is fused).
            input_size_per_partition: input features K.
            params_dtype: the model's dtype, that of floating-point scales.

        Raises:
            ShapeError: the scheme cannot represent these sizes.
        """
        widths, k = output_partition_sizes, input_size_per_partition
        if self.input is not None and k % self.input.group_size:
            size = self.input.group_size
            raise ShapeError(f"K = {k} input features: the input needs a multiple of {size}; exclude this layer")
        set_parameters(layer, **self.weight_tensors(widths, k, params_dtype))
        for quantizer in (self.input, self.output):
            for name, tensor in (quantizer.tensors(params_dtype) if quantizer is not None else {}).items():
                set_parameters(layer, **{name: tensor.expand(per_shard(widths)).clone()})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the loaded numbers and bring them into the form the emulation reads. Called once, after loading.

        Raises:
            CheckpointError: a NaN, an infinity, or a scale that is not positive.
            ShapeError: shards whose outputs are quantized by unlike scales are fused.
        """
        for name, p in layer.named_parameters(recurse=False):
            if name != "bias":
                _check_numbers(name, p)
        if len(layer.logical_widths) > 1:
            if self.input is not None and (names := self.input.tensors(layer.params_dtype)):
                set_parameters(layer, **self.input.merged({name: getattr(layer, name).data for name in names}))
            for name in self.output.tensors(layer.params_dtype) if self.output is not None else ():
                shards = getattr(layer, name)
                if (shards != shards[0]).any():
                    raise ShapeError(f"{name} differs between shards ({shards.tolist()}): they cannot be fused")
                set_parameters(layer, **{name: shards[0].data.clone()})
            self.merge_shards(layer)

    def fake_quantize_input(self, layer: Any, x: Tensor) -> Tensor:
        """``x [M, K]`` quantized and dequantized as the spec says, in its dtype."""
        return x if self.input is None else self.input.fake_quantize(layer, x)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The emulation: ``x [M, K] -> [M, N]`` in the dtype of ``x``, in plain ops."""
        x = self.fake_quantize_input(layer, x)
        weight = layer.weight if layer.emulation == AT_LOAD else self.dequantize_weight(layer, x.dtype)
        y = F.linear(x, weight, bias)
        return y if self.output is None else self.output.fake_quantize(layer, y)


def per_shard(widths: list[int]) -> list[int]:
    """Shape of a number a tensor has one of: ``[shards]`` if shards are fused, else ``[]``."""
    return [len(widths)] if len(widths) > 1 else []


def _check_numbers(name: str, p: Tensor) -> None:
    codes_or_scales = p.dtype.itemsize == 1 and p.dtype.is_floating_point
    if codes_or_scales:
        bits = p.view(torch.uint8) & 0x7F
        # E4M3: only 0x7f and 0xff are NaN. E5M2 has infinities too, from 0x7c on. isfinite() does not take FP8.
        bad = bits >= 0x7C if p.dtype == torch.float8_e5m2 else bits == 0x7F
    elif p.is_floating_point():
        bad = ~p.isfinite()
    elif "scale" in name:  # a byte, E8M0 or E5M3: 255 is NaN in both
        bad = p == 255
    else:
        return
    if bad.any():
        raise CheckpointError(f"{name} holds a NaN or an infinity: the checkpoint is damaged; export it again")
    if "scale" in name and p.is_floating_point() and (p.float() < 0 if codes_or_scales else p <= 0).any():
        raise CheckpointError(f"{name} holds a scale that is not positive: the checkpoint is damaged; export it again")


_SCHEMES: dict[str, type[QuarkScheme]] = {}


def register_scheme(cls: type[QuarkScheme]) -> type[QuarkScheme]:
    """Class decorator: make a scheme known.

    The first registered scheme that does not refuse a spec gets it, unless a subclass of it does not refuse it either.
    """
    if _SCHEMES.setdefault(cls.name, cls) is not cls:
        raise QuarkInductorError(f"two schemes are named {cls.name!r}: {_SCHEMES[cls.name]} and {cls}; rename one")
    return cls


def registered_schemes() -> Mapping[str, type[QuarkScheme]]:
    """Every known scheme by name."""
    return dict(_SCHEMES)


def scheme_for(spec: LinearSpec) -> QuarkScheme:
    """The scheme of a spec.

    Raises:
        ConfigError: no scheme takes it; says why each refused.
    """
    refusals, best = [], None
    for name, cls in _SCHEMES.items():
        reason = cls.refuses(spec)
        if reason is not None:
            refusals.append(f"{name}: {reason}")
        elif best is None or issubclass(cls, best):
            best = cls
    if best is not None:
        return best(spec)
    raise ConfigError(f"no scheme for [{spec}]; asked in turn: {'; '.join(refusals)}")


class QuarkLinear(nn.Module):
    """A Linear whose weight is quantized: ``y = x @ dequantize(weight).T + bias``.

    If its spec says so, its input is quantized too. Its parameters are the checkpoint's tensors (``weight``,
    ``weight_scale``, ...) under the checkpoint's names; once packed (:meth:`pack_`), one ``weight_packed`` takes the
    place of the codes. Its state dict always is the checkpoint's.

    Attributes:
        in_features: K.
        out_features: N, the sum of ``logical_widths``.
        logical_widths: output features of each shard fused into this Linear (q, k, v; gate, up); one if none is.
        scheme: what computes.
        merged: with :meth:`merge_`, the Linear that computes it together with others, and where its part begins.
        emulation: when its weight is dequantized: ``"per_call"`` or, after :meth:`dequantize_`, ``"at_load"``.
        params_dtype: dtype of bias, floating-point scales and result.
        packed: the layout of its packed weight, and what was packed; ``None``: its parameters are the checkpoint's.
        plan: how it computes with a packed weight, see :mod:`.plan`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        scheme: QuarkScheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.logical_widths = [out_features] if isinstance(out_features, int) else list(out_features)
        self.in_features = in_features
        self.out_features = sum(self.logical_widths)
        self.scheme = scheme
        self.params_dtype = dtype
        self.emulation = PER_CALL
        self.merged: tuple[QuarkLinear, int] | None = None
        self.packed: tuple[Layout, Stored] | None = None
        self.plan: str | None = None
        with torch.device(device or torch.get_default_device()):
            scheme.create_weights(
                self,
                output_partition_sizes=self.logical_widths,
                input_size_per_partition=in_features,
                params_dtype=dtype,
            )
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def fuse(cls, linears: "Sequence[QuarkLinear]") -> "QuarkLinear":
        """One Linear that computes the outputs of several with the same input, one after the other.

        Args:
            linears: of one spec, K and dtype, freshly loaded or quantized; all with a bias, or none.

        Returns:
            A new Linear. Where the format has one scale a tensor, the shards get a common one, see the scheme.

        Raises:
            ShapeError: they differ in what they must share.
        """
        first = linears[0]
        alike = {(m.in_features, m.scheme.spec, m.params_dtype, m.bias is None, m.emulation) for m in linears}
        if len(alike) != 1 or first.emulation != PER_CALL:
            raise ShapeError(f"only Linears of one kind, dequantized per call, can be fused; these are {alike}")
        widths = [m.out_features for m in linears]
        fused = cls(
            first.in_features,
            widths,
            first.scheme,
            bias=first.bias is not None,
            dtype=first.params_dtype,
            device="meta",
        )
        for name, empty in list(fused.named_parameters(recurse=False)):
            parts = [getattr(m, name).data for m in linears]
            if parts[0].ndim == 0:
                whole = torch.stack(parts) if len(parts) > 1 else parts[0]
            else:
                along = next(d for d, size in enumerate(empty.shape) if size != parts[0].shape[d] or len(linears) == 1)
                whole = torch.cat(parts, along)
            if whole.shape != empty.shape:
                raise ShapeError(f"{name} cannot be joined for output features {widths}: {tuple(whole.shape)}")
            set_parameters(fused, **{name: whole})
        fused.scheme.process_weights_after_loading(fused)
        return fused

    @classmethod
    def merge_(cls, linears: "Sequence[QuarkLinear]") -> str | None:
        """Let Linears with the same input share one wider GEMM when they are compiled.

        Their parameters become views of the fused ones, no byte is held twice. Called eagerly each computes its own
        part, as before; compiled, each computes the wide one and takes its part, and the compiler does it once.

        Args:
            linears: as :meth:`fuse` takes them, of one input.

        Returns:
            ``None``, or why they stay as they are: nothing is merged that would change a number.
        """
        packed, widths = linears[0].packed, [m.out_features for m in linears]
        if packed is not None and not packed[0].rows:
            return f"they are packed as {packed[0].name}, of which no part is a weight"
        if packed is not None and any(width % packed[0].rows for width in widths[:-1]):
            return f"{widths} output features are packed by {packed[0].rows}, which must divide them"
        for m in linears:
            m.unpack_()
        reason = cls._merge(linears)
        for m in linears:
            m._share_packed() if packed is not None and reason is None else m.pack_()
        return reason

    @classmethod
    def _merge(cls, linears: "Sequence[QuarkLinear]") -> str | None:
        first = linears[0]
        kinds = {(m.in_features, m.scheme.spec, m.params_dtype, m.bias is None, m.emulation) for m in linears}
        if len(kinds) != 1 or first.emulation != PER_CALL:
            return f"they are of {len(kinds)} kinds, or dequantized at load"
        fused = cls.fuse(linears)
        own = [{name: p.data for name, p in m.named_parameters(recurse=False)} for m in linears]
        parts: list[dict[str, Tensor]] = [{} for _ in linears]
        begins = [sum(fused.logical_widths[:i]) for i in range(len(linears))]
        for name, whole in fused.named_parameters(recurse=False):
            for mine, part, begin, width in zip(own, parts, begins, fused.logical_widths, strict=True):
                if whole.ndim == 0 or mine[name].ndim == 0:
                    part[name] = whole.data
                else:
                    along = next(d for d, size in enumerate(whole.shape) if size != mine[name].shape[d])
                    entries = mine[name].shape[along]
                    part[name] = whole.data.narrow(along, begin * entries // width, entries)
                if part[name].shape != mine[name].shape or not same_bytes(part[name], mine[name]):
                    return f"{name} is not the same for all of them, and the scheme has one for a Linear"
        for m, part, begin in zip(linears, parts, begins, strict=True):
            set_parameters(m, **part)
            m.merged = fused, begin
        return None

    def pack_(self, choose: Callable[[str, Sequence[Tensor], Stored], Layout | None] = layout_for) -> None:
        """Pack the weight as kernels of its device read it, if there is a layout for it; same bytes, same numbers.

        Args:
            choose: which layout; one for weights that have no numbers cannot ask for them.
        """
        if self.packed is not None or self.merged is not None or self.emulation == AT_LOAD:
            return
        if self.scheme.spec.weight is None or (stored := self.scheme.stored(self)) is None:
            return
        tensors = [getattr(self, name).data for name in stored.names]
        layout = choose(tensors[0].device.type, tensors, stored)
        if layout is None:
            return
        self._set_packed(layout, stored, layout.pack(tensors, stored))

    def _set_packed(self, layout: Layout, stored: Stored, packed: Tensor) -> None:
        for name in stored.names:
            delattr(self, name)
        set_parameters(self, weight_packed=packed)
        self.packed = layout, stored
        self._replan()

    def _replan(self) -> None:
        """Write the plan anew: something that it is about has changed."""
        if self.__dict__.get("packed") is not None:
            self.plan = self.planned().text()

    def planned(self) -> Plan:
        """How it computes, but for its tensors."""
        layout, stored = self.packed or (None, None)
        return Plan(
            spec=self.scheme.spec,
            dtype=dtype_name(self.params_dtype),
            in_features=self.in_features,
            out_features=self.out_features,
            names=tuple(name for name, p in self._parameters.items() if p is not None),
            layout="" if layout is None else layout.name,
            stored=stored,
            emulation=self.emulation,
        )

    def _share_packed(self) -> None:
        """Of a merged Linear: its part of the packed weight of all."""
        assert self.merged is not None
        fused, begin = self.merged
        stored = self.scheme.stored(self)
        fused.pack_()
        if fused.packed is None or stored is None:
            return
        layout = fused.packed[0]
        part = fused.weight_packed.data.narrow(0, begin // layout.rows, -(-self.out_features // layout.rows))
        self._set_packed(layout, stored, part)

    def unpack_(self) -> None:
        """The inverse of :meth:`pack_`."""
        if self.packed is None:
            return
        tensors = self._unpacked()
        del self.weight_packed
        self.packed = self.plan = None
        set_parameters(self, **tensors)

    def _unpacked(self) -> dict[str, Tensor]:
        """What was packed, by name."""
        assert self.packed is not None
        return _unpack(self.weight_packed, self.packed[0].name, self.packed[1])

    def weight_names(self) -> list[str]:
        """Names of the parameters that hold the weight: codes, scales, zero points."""
        return [name for name, _ in self.named_parameters(recurse=False) if name.startswith("weight")]

    def dequantize_(self) -> None:
        """Replace the codes by the weight's values, in the model's dtype: faster emulation, 2x to 4x the memory.

        The results stay the same, bit by bit. There are no codes to save any more, nor for a kernel to read.
        """
        if self.emulation == AT_LOAD or self.scheme.spec.weight is None:
            return
        self.unpack_()
        weight = self.scheme.dequantize_weight(self, self.params_dtype)
        for name in self.weight_names():
            delattr(self, name)
        set_parameters(self, weight=weight)
        self.emulation = AT_LOAD

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``[..., N]``, same dtype.

        Raises:
            ShapeError: the input has not K features.
            TrainingError: the input is quantized and a gradient of it was asked for.
        """
        # Also makes K a constant of the graph when every size is symbolic.
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"the input's shape is {tuple(x.shape)}, this Linear takes {self.in_features} features")
        # In this order, so that nothing of the scheme is asked where no gradient is.
        if x.requires_grad and torch.is_grad_enabled() and self.scheme.input is not None:
            raise TrainingError(
                "a gradient was asked of the input of a Linear that quantizes it to codes, which have none. Quantized "
                "Linears are for inference: call the model under torch.no_grad() or torch.inference_mode(), or "
                "detach() what goes into them"
            )
        if self.merged is not None and torch.compiler.is_compiling():
            fused, begin = self.merged
            return fused(x).narrow(-1, begin, self.out_features)  # type: ignore[no-any-return]
        # 2-D first and a view last: then no view ever stands between a quantize and its GEMM.
        if self.plan is not None:
            tensors = [t for t in self._parameters.values() if t is not None]
            return torch.ops.quark_inductor.linear(x, tensors, self.plan)  # type: ignore[no-any-return]
        y = self.scheme.apply_weights(self, x.reshape(-1, self.in_features), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, p in self.named_parameters(recurse=False):
            # On an empty meta tensor: what would fn make of this dtype?
            wanted = fn(torch.empty(0, dtype=p.dtype)).dtype
            if wanted != p.dtype:
                raise QuarkInductorError(
                    f"cannot turn a quantized Linear's {name} from {dtype_name(p.dtype)} into {dtype_name(wanted)}: "
                    "its numbers are codes and scales of a fixed dtype. Pass dtype= to quark_inductor.load instead"
                )
        # What moves is a copy of its own; the fused one stays where it was.
        self.merged = None
        moves = fn(torch.empty(0, dtype=torch.uint8, device=self._device())).device.type != self._device().type
        if moves:
            self.unpack_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if moves:
            self.pack_()
        return self

    def __getattr__(self, name: str) -> Any:
        """A copy, in the checkpoint's layout, of a parameter that is packed."""
        packed = self.__dict__.get("packed")
        if packed is not None and name in packed[1].names:
            return self._unpacked()[name]
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses a parameter in the place of one that is packed: it would not be the one that computes.

        Raises:
            QuarkInductorError: call :meth:`unpack_` first.
        """
        packed = self.__dict__.get("packed")
        if packed is not None and name in packed[1].names:
            raise QuarkInductorError(f"{name} is packed as {packed[0].name}: call unpack_() before you set it")
        super().register_parameter(name, param)
        self._replan()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("scheme", "params_dtype", "bias"):
            self._replan()

    def _device(self) -> torch.device:
        return next(self.parameters(recurse=False)).device

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for name in self._parameters:  # of grouped experts some are columns of a wider one
            if (tensor := destination.get(f"{prefix}{name}")) is not None and not tensor.is_contiguous():
                destination[f"{prefix}{name}"] = tensor.contiguous()
        if self.packed is not None:
            del destination[f"{prefix}weight_packed"]
            # A clone has no padding behind it, which whoever saves storages would find.
            destination.update({f"{prefix}{name}": tensor.clone() for name, tensor in self._unpacked().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        packed = self.packed is not None
        self.unpack_()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        if packed:
            self.pack_()

    def extra_repr(self) -> str:
        """Sizes and spec, for ``print(model)``."""
        bias = self.bias is not None
        emulation = ", dequantized at load" if self.emulation == AT_LOAD else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {bias=}, {self.scheme.spec}{emulation}"
        )


def _unpack(packed: Tensor, layout: str, stored: Stored) -> dict[str, Tensor]:
    unpack = torch.ops.quark_inductor.unpack_weight
    tensors = unpack(packed, layout, stored.format, stored.shape, stored.transposed)
    return dict(zip(stored.names, tensors, strict=True))


class _Planned:
    """What a scheme reads of a Linear that has a plan: its tensors as the checkpoint has them."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor]) -> None:
        named = dict(zip(plan.names, tensors, strict=True))
        self.params_dtype, self.emulation = dtype_of(plan.dtype), plan.emulation
        self.bias = named.get("bias")
        if plan.stored is not None:
            named |= _unpack(named["weight_packed"], plan.layout, plan.stored)
        self.is_fnuz = named["weight"].dtype == fp8.FNUZ
        vars(self).update(named)


@functools.cache
def _planned(text: str) -> tuple[Plan, QuarkScheme]:
    plan = parse(text)
    return plan, scheme_for(plan.spec)


def features_of_plan(plan: str) -> tuple[int, int]:
    """``(N, K)`` of a Linear by its plan."""
    found, _ = _planned(plan)
    return found.out_features, found.in_features


def linear(x: Tensor, tensors: Sequence[Tensor], plan: str) -> Tensor:
    """A Linear by its plan: ``x [..., K]`` to ``[..., N]``, in plain ops and those of :mod:`.ops`; see :mod:`.plan`."""
    found, scheme = _planned(plan)
    layer = _Planned(found, tensors)
    # 2-D first and a view last: then no view ever stands between a quantize and its GEMM.
    y = scheme.apply_weights(layer, x.reshape(-1, found.in_features), layer.bias)
    return y.view(*x.shape[:-1], found.out_features)


# Composite: whoever traces it sees what it is made of.
ops.lib.define("linear(Tensor x, Tensor[] tensors, str plan) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
ops.lib.impl("linear", linear, "CompositeImplicitAutograd")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, bit by bit; two without memory do."""
    if a.dtype != b.dtype or a.is_meta or is_fake(a):
        return a.dtype == b.dtype
    return torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))


def set_parameters(layer: nn.Module, **tensors: Tensor) -> None:
    """Register tensors on a layer as parameters that need no gradient (codes and scales have none)."""
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def replace_module(model: nn.Module, name: str, new: Any) -> None:
    """Put ``new`` where ``model.get_submodule(name)`` is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
