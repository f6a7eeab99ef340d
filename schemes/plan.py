"""How a packed Linear computes, as one string: all that Dynamo has to compare before each call of compiled code.

Of a module whose code it traces Dynamo guards every attribute that the code reads, 20 us a Linear: more than the
kernels of a small model take. What a packed Linear reads does not change, so it hands its tensors and a string to one
op, ``quark_inductor::linear``, which is plain ops again as soon as the graph is traced.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.spec import LinearSpec, TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a Linear computes, but for its tensors.

    Attributes:
        spec: how it is quantized.
        dtype: bare name of its ``params_dtype``.
        in_features: K.
        out_features: N.
        names: those of its tensors, in the order in which the op gets them.
        layout: name of the layout of ``weight_packed``; ``""``: the weight is not packed.
        stored: what is packed in it.
        emulation: when the weight is dequantized, as :class:`.base.QuarkLinear` says it.
    """

    spec: LinearSpec
    dtype: str
    in_features: int
    out_features: int
    names: tuple[str, ...]
    layout: str = ""
    stored: Stored | None = None
    emulation: str = "per_call"

    def text(self) -> str:
        """As JSON, the same for equal plans."""
        return json.dumps(asdict(self), sort_keys=True)


def parse(text: str) -> Plan:
    """The inverse of :meth:`Plan.text`."""
    raw = json.loads(text)
    tensors = {name: _tensor(raw["spec"][name]) for name in ("weight", "input", "output")}
    spec = LinearSpec(**{**raw["spec"], **tensors})
    stored = raw["stored"] and Stored(**{**raw["stored"], "shape": tuple(raw["stored"]["shape"])})
    return Plan(**{**raw, "spec": spec, "names": tuple(raw["names"]), "stored": stored})


def _tensor(raw: Mapping[str, Any] | None) -> TensorSpec | None:
    if raw is None:
        return None
    block_size = raw["block_size"] and tuple(raw["block_size"])
    return TensorSpec(**{**raw, "second": _tensor(raw["second"]), "block_size": block_size})
