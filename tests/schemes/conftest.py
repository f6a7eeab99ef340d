"""The checkpoints that amd-quark exported, without this project's loader."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.spec import PRESETS

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Exported:
    """A checkpoint and the numbers that amd-quark's own reload of it gives."""

    def __init__(self, name: str) -> None:
        # clone(): a matmul takes another path for a tensor whose place in the file happens not to be aligned.
        self.tensors = {n: t.clone() for n, t in load_file(FIXTURES / name / "model.safetensors").items()}
        self.reference = {n: t.clone() for n, t in load_file(FIXTURES / name / "reference.safetensors").items()}
        self.preset = name.removesuffix("_fp32")
        self.dtype = self.reference["logits"].dtype
        self.linears = [n.removesuffix(".weight_sha256") for n in self.reference if n.endswith(".weight_sha256")]
        self.recorded = [n.removesuffix(".output") for n in self.reference if n.endswith(".output")]

    def parameters(self, linear: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{linear}."): t for n, t in self.tensors.items() if n.startswith(f"{linear}.")}

    def layer(self, linear: str) -> QuarkLinear:
        parameters = self.parameters(linear)
        n, k = parameters["weight"].shape
        if self.preset == "mxfp4":
            k *= 2
        scheme = scheme_for(PRESETS[self.preset])
        layer = QuarkLinear(k, n, scheme, bias="bias" in parameters, dtype=self.dtype)
        assert sorted(layer.state_dict()) == sorted(parameters)
        set_parameters(layer, **parameters)
        scheme.process_weights_after_loading(layer)
        return layer

    def weight_is_amd_quarks(self, linear: str, weight: Tensor) -> bool:
        """By its digest, and by its numbers where the file has them. Both zeros count the same, as in the files."""
        digest = hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).digest()
        stored = self.reference.get(f"{linear}.weight_dequantized", weight)
        return list(digest) == self.reference[f"{linear}.weight_sha256"].tolist() and torch.equal(weight, stored)

    def output(self, linear: str, weight: Tensor) -> Tensor:
        """What this machine's matmul makes of amd-quark's quantized input and ``weight``."""
        return F.linear(self.reference[f"{linear}.input_qdq"], weight, self.tensors.get(f"{linear}.bias"))

    def check_outputs(self, weight: Callable[[dict[str, Tensor], torch.dtype], Tensor]) -> None:
        """Every recorded output, bit by bit: that of this machine's matmul, and amd-quark's if it adds up likewise.

        Args:
            weight: a dequantized weight from stored parameters, by a source that is not this project.
        """
        assert len(self.recorded) >= 2
        elsewhere = []
        for linear in self.recorded:
            y, stored = self.layer(linear)(self.reference[f"{linear}.input"]), self.reference[f"{linear}.output"]
            here = self.output(linear, weight(self.parameters(linear), self.dtype))
            assert y.dtype == stored.dtype
            assert torch.equal(y, here), linear
            if not torch.equal(here, stored):
                elsewhere.append(linear)
        if elsewhere:
            pytest.skip(f"{elsewhere}: the matmul of this CPU adds up in another order than the one of the fixtures")


@pytest.fixture(scope="session")
def exported() -> Callable[[str], Exported]:
    """Of a fixture's name."""
    return functools.cache(Exported)
