"""What a scheme is, and the module that holds one.

A scheme knows the tensors of one family of :class:`LinearSpec` and computes a Linear from them in plain ops: the
emulation. It holds no tensor itself; those live on the :class:`QuarkLinear`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quark_inductor.schemes.errors import ConfigError, QuarkInductorError, ShapeError
from quark_inductor.schemes.ops import dtype_name
from quark_inductor.schemes.spec import LinearSpec


class QuarkScheme(ABC):
    """How a Linear of one kind of spec stores its tensors and computes.

    The four abstract methods are those of the schemes known from vLLM
    (``model_executor/layers/quantization/quark/schemes``), with the same meaning.

    Attributes:
        name: the scheme's registered name, that of its file.
        fused_op: bare name of the op that a rule makes of its emulation.
        spec: the spec it was made for.
    """

    name: ClassVar[str]
    fused_op: ClassVar[str]

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec

    @classmethod
    @abstractmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Why this scheme is not the one for ``spec``, or ``None`` if it is."""

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int:
        """CUDA compute capability times ten from which hardware kernels exist; below it the emulation runs."""

    @abstractmethod
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

    @abstractmethod
    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the loaded parameters into the form :meth:`apply_weights` reads. Called once, after loading."""

    @abstractmethod
    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The emulation: ``x [M, K] -> [M, N]`` in the dtype of ``x``, in plain ops."""

    @abstractmethod
    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The parameters of :meth:`create_weights` for a float ``weight [N, K]``, as amd-quark exports them."""


_SCHEMES: dict[str, type[QuarkScheme]] = {}


def register_scheme(cls: type[QuarkScheme]) -> type[QuarkScheme]:
    """Class decorator: make a scheme known. The first registered scheme that does not refuse a spec gets it."""
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
    refusals = []
    for name, cls in _SCHEMES.items():
        reason = cls.refuses(spec)
        if reason is None:
            return cls(spec)
        refusals.append(f"{name}: {reason}")
    raise ConfigError(f"no scheme for [{spec}]; asked in turn: {'; '.join(refusals)}")


class QuarkLinear(nn.Module):
    """A Linear whose weight is quantized: ``y = x @ dequantize(weight).T + bias``.

    If its spec says so, its input is quantized too. Its parameters are the checkpoint's tensors (``weight``,
    ``weight_scale``, ...) under the checkpoint's names.

    Attributes:
        in_features: K.
        out_features: N.
        scheme: what computes.
        params_dtype: dtype of bias, floating-point scales and result.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuarkScheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.params_dtype = dtype
        with torch.device(device or torch.get_default_device()):
            scheme.create_weights(
                self, output_partition_sizes=[out_features], input_size_per_partition=in_features, params_dtype=dtype
            )
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``[..., N]``, same dtype."""
        # Also makes K a constant of the graph when every size is symbolic.
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"the input's shape is {tuple(x.shape)}, this Linear takes {self.in_features} features")
        # 2-D first and a view last: then no view ever stands between a quantize and its GEMM.
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
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Sizes and spec, for ``print(model)``."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, {bias=}, {self.scheme.spec}"


def set_parameters(layer: nn.Module, **tensors: Tensor) -> None:
    """Register tensors on a layer as parameters that need no gradient (codes and scales have none)."""
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def replace_module(model: nn.Module, name: str, new: Any) -> None:
    """Put ``new`` where ``model.get_submodule(name)`` is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
