"""Quark checkpoints through ``AutoModelForCausalLM.from_pretrained``, without amd-quark."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from quark_inductor import checkpoint, files
from quark_inductor.experts import Grouping, finish_experts, split_for_, with_todays_names
from quark_inductor.loading import Accounting, account, assign, fill_zero_points, finish, insert_linears
from quark_inductor.schemes.base import PER_CALL, QuarkLinear
from quark_inductor.schemes.errors import CheckpointError, ConfigError
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.ops import dtype_of


class QuarkInductorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` as the checkpoint has it, checked."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = QuantizationMethod.QUARK
        self.raw = config
        self.parsed = checkpoint.parse(config)

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint has: ``save_pretrained`` writes it back."""
        return copy.deepcopy(self.raw)


class QuarkInductorHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts quantized Linears into the model before transformers loads it, with every tensor accounted for."""

    requires_calibration = True
    quantization_config: QuarkInductorConfig

    def __init__(self, quantization_config: QuarkInductorConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._accounting: Accounting | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a Quark checkpoint is loaded from its safetensors files; none were given")
        stored: dict[str, files.StoredTensor] = {}
        for file in checkpoint_files:
            stored |= files.header(Path(file))
        if files.canonical_names(stored).keys() != stored.keys():
            raise CheckpointError(
                "the checkpoint has the tensor names of amd-quark 0.11; load it with quark_inductor.load instead"
            )
        if with_todays_names(model, stored).keys() != stored.keys():
            raise CheckpointError(
                "the checkpoint has the names that experts had before transformers 5; load it with quark_inductor.load"
            )
        stored = split_for_(model, stored, lambda name: False)
        insert_linears(model, self.quantization_config.parsed, stored, dynamic_fallback=False)
        self._accounting = account(model, stored, _stored_dtype(Path(checkpoint_files[0]).parent), strict=True)
        # Or transformers reports as missing what is 0.
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        model._keys_to_ignore_on_load_missing = [*ignored, *map(re.escape, self._accounting.zero_points)]
        # transformers casts a floating-point tensor to the dtype of what it replaces.
        for name, target in self._accounting.targets.items():
            if model.get_parameter_or_buffer(name).dtype != target.dtype:
                assign(model, name, target)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._accounting is not None
        fill_zero_points(model, self._accounting)
        grouping = Grouping(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuarkLinear):
                with grouping.finishing(module):
                    finish(name, module, PER_CALL)
        finish_experts(model)
        return model.requires_grad_(False)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts that are Linears in the model, too, are not made one parameter."""
        if not any(isinstance(m, QuarkExperts) for m in model.modules()):
            return weight_conversions
        return [c for c in weight_conversions if not any(".experts." in target for target in c.target_patterns)]

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what ``from_pretrained`` reads."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """One graph, without breaks: ``generate`` may compile the model where it has a static cache."""
        return True


def _stored_dtype(directory: Path) -> torch.dtype:
    config = files.read_json(directory / files.CONFIG)
    name = (config.get("dtype") or config.get("torch_dtype") or "float32") if isinstance(config, dict) else None
    try:
        return dtype_of(str(name))
    except ValueError as e:
        raise ConfigError(f"{directory / files.CONFIG}: dtype: {e}") from e


def register_hf() -> None:
    """From now on transformers' ``from_pretrained`` loads Quark checkpoints with this package's Linears.

    amd-quark need not be installed. It replaces transformers' own entry for the method "quark" in this process, whether
    amd-quark is there or not; calling it again changes nothing. Where :func:`quark_inductor.load` raises an error for a
    checkpoint, so does ``from_pretrained``.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quark"] = QuarkInductorConfig
    auto.AUTO_QUANTIZER_MAPPING["quark"] = QuarkInductorHfQuantizer
