"""Checkpoints to damage, small models, and the float model that amd-quark quantized for the fixtures."""

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.schemes.base import QuarkLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Copy:
    """A copy of a fixture's checkpoint, to be changed."""

    def __init__(self, name: str, path: Path) -> None:
        self.path = path
        path.mkdir()
        for file in (FIXTURES / name).iterdir():
            if file.name != "reference.safetensors":
                shutil.copyfile(file, path / file.name)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def json(self, name: str = "config.json") -> Iterator[dict[str, Any]]:
        """The content of a JSON file, written back after the ``with``."""
        content = json.loads((self.path / name).read_text())
        yield content
        (self.path / name).write_text(json.dumps(content))

    @contextlib.contextmanager
    def tensors(self, name: str = "model.safetensors") -> Iterator[dict[str, Tensor]]:
        """The tensors of a file, written back after the ``with``."""
        tensors = {n: t.clone() for n, t in load_file(self.path / name).items()}
        yield tensors
        save_file(tensors, self.path / name, metadata={"format": "pt"})


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Copy]:
    """Of a fixture's name."""
    return lambda name: Copy(name, tmp_path / name)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """What amd-quark computes with the checkpoint of this name."""

    def load(name: str) -> dict[str, Tensor]:
        path = FIXTURES / name.removesuffix("_sharded") / "reference.safetensors"
        # clone(): a matmul takes another path for a tensor whose place in the file happens not to be aligned.
        return {n: t.clone() for n, t in load_file(path).items()}

    return load


@pytest.fixture(scope="session")
def adds_up_alike(reference: Callable[[str], dict[str, Tensor]]) -> bool:
    """Whether this CPU adds up a float GEMM as the one of the fixtures did.

    Every output of a Linear that amd-quark wrote down says, computed by torch from the operands that it wrote down:
    in some shapes and dtypes CPUs differ.
    """
    for path in sorted(FIXTURES.glob("*/reference.safetensors")):
        numbers, model = reference(path.parent.name), qi.load(path.parent)
        for key, expected in numbers.items():
            module = key.removesuffix(".output")
            layer = model.get_submodule(module) if key.endswith(".output") else None
            if not isinstance(layer, QuarkLinear) or layer.scheme.spec.output is not None:
                continue
            x = numbers.get(f"{module}.{'input' if layer.scheme.spec.input is None else 'input_qdq'}")
            if x is None:
                continue
            weight = layer.scheme.dequantize_weight(layer, x.dtype)
            if not torch.equal(torch.nn.functional.linear(x, weight, layer.bias), expected):
                return False
    return True


def to_numpy(x: Tensor) -> np.ndarray:
    """bfloat16 and FP8 as ml_dtypes has them."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if x.dtype == torch.float8_e4m3fn:
        return x.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return x.contiguous().numpy()


def from_numpy(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float32 numbers, rounded to ``dtype`` by ml_dtypes if it is bfloat16."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(x.astype(ml_dtypes.bfloat16).view(np.int16)).view(dtype)
    return torch.from_numpy(x.astype(np.float32))


def numpy_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight dequantized in numpy."""
    if codes.dtype == torch.uint8:
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).numpy()
        values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        multiplier = np.repeat(scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, axis=-1)
    else:
        values, multiplier = to_numpy(codes).astype(np.float32), to_numpy(scale).astype(np.float32)
        multiplier = multiplier[:, None] if multiplier.ndim else multiplier
    return from_numpy(values * multiplier, dtype)


def numpy_activation(x: Tensor, scheme: str, static_scale: Tensor | None) -> Tensor:
    """A finite activation quantized and dequantized in numpy."""
    values = to_numpy(x).astype(np.float32)
    if scheme == "mxfp4":
        blocks = values.astype(np.float64).reshape(*values.shape[:-1], -1, 32)
        amax = np.abs(blocks).max(-1, keepdims=True)
        exponent = np.frexp(amax)[1] - 1
        exponent = np.frexp(amax + np.ldexp(1.0, exponent - 2))[1] - 3
        scale = np.ldexp(1.0, np.clip(exponent, -127, None))
        elements = (blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
        return from_numpy((elements * scale).reshape(values.shape).astype(np.float32), x.dtype)
    number = to_numpy(x).dtype
    if static_scale is None:
        scale = (np.abs(values).max(-1, keepdims=True) / np.float32(448)).astype(number).astype(np.float32)
    else:
        scale = to_numpy(static_scale).astype(np.float32)
    quotient = (values / scale).astype(number).astype(np.float32)
    codes = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return from_numpy(codes.astype(np.float32) * scale, x.dtype)


@pytest.fixture(scope="session")
def numpy_logits(reference: Callable[[str], dict[str, Tensor]]) -> Callable[[str], Tensor]:
    """What transformers' own model computes on this machine from a fixture, every quantization done in numpy."""

    @functools.cache
    @torch.no_grad()
    def compute(name: str) -> Tensor:
        from transformers import AutoConfig, AutoModelForCausalLM

        directory, dtype = FIXTURES / name, reference(name)["logits"].dtype
        tensors = {n: t.clone() for n, t in load_file(directory / "model.safetensors").items()}
        config = AutoConfig.from_pretrained(directory)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for linear in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
            scale, static_scale = tensors.pop(f"{linear}.weight_scale"), tensors.pop(f"{linear}.input_scale", None)
            tensors[f"{linear}.weight"] = numpy_weight(tensors[f"{linear}.weight"], scale, dtype)

            def quantize(module: nn.Module, args: tuple[Tensor], static_scale: Tensor | None = static_scale) -> Tensor:
                return numpy_activation(args[0], name.removesuffix("_fp32"), static_scale)

            model.get_submodule(linear).register_forward_pre_hook(quantize)
        model.load_state_dict(tensors)
        return model(reference(name)["ids"]).logits

    return compute


@pytest.fixture(scope="session")
def llama() -> Callable[..., nn.Module]:
    """A random Llama of two layers, in float; its Linears have biases, and some zeros, to be seen in a result."""

    def make(dtype: torch.dtype = torch.bfloat16, **config: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 80,
            "max_position_embeddings": 64,
            "attention_bias": True,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | config)), dtype=dtype).eval()
        for name, p in model.named_parameters():
            p.data = torch.randn(p.shape).mul(0.12).add("norm" in name).to(dtype)
        model.tie_weights()
        return model

    return make


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Tokens for a ``llama``."""
    return torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(12))


@pytest.fixture(scope="session")
def float_base() -> Callable[..., Any]:
    """What amd-quark quantized for the smaller fixtures: ``base/``, or ``base_wide/`` with hidden size 256."""

    def make(dtype: torch.dtype = torch.bfloat16, name: str = "base", tied: bool = False) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(FIXTURES / name, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        state = {n: t.clone().to(dtype) for n, t in load_file(FIXTURES / name / "model.safetensors").items()}
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return model

    return make


@pytest.fixture
def fixtures_float_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], nn.Module]:
    """What amd-quark was given to make the fixtures, from the script that made them.

    Its random numbers follow those that transformers draws to initialize a model: other releases may draw others, and
    then there is nothing to compare.
    """
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the script sets some, for amd-quark
    monkeypatch.syspath_prepend(FIXTURES)  # where a script finds its neighbours
    for name in (
        "quark",
        "quark.torch",
        "quark.torch.quantization",
        "quark.torch.quantization.config",
        "quark.torch.quantization.config.config",
        "quark.torch.quantization.tensor_quantize",
    ):
        monkeypatch.setitem(sys.modules, name, unittest.mock.MagicMock())
    spec = importlib.util.spec_from_file_location("make_fixtures", FIXTURES / "make_fixtures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_fixtures", script)  # its dataclass asks for it
    spec.loader.exec_module(script)

    def make(dtype: torch.dtype) -> nn.Module:
        model = script.float_model(script.FIRST, dtype)
        name = "mxfp4" if dtype == torch.bfloat16 else "mxfp4_fp32"
        stored = load_file(FIXTURES / name / "model.safetensors")
        drawn = model.state_dict()
        if not all(torch.equal(drawn[n], t) for n, t in stored.items() if "_proj.weight" not in n):
            pytest.skip("this release of transformers draws other random numbers than the one of the fixtures")
        return model

    return make


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """What a Python of its own prints: code, and arguments for it."""

    def run(code: str, *args: str | Path) -> str:
        command = [sys.executable, "-c", code, *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
