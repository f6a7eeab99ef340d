"""How much memory loading takes, measured in processes of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure a process"),
]

# Arguments: the directory, hidden size, intermediate size, layers, and a scheme to save it in (or "").
MAKE = """
import sys, torch, quark_inductor as qi
from transformers import AutoModelForCausalLM, LlamaConfig
hidden, intermediate, layers = map(int, sys.argv[2:5])
config = LlamaConfig(
    hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=16,
    num_key_value_heads=16, vocab_size=1024, tie_word_embeddings=False, dtype=torch.bfloat16,
)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
for p in model.parameters():
    p.data.fill_(0.5)
    p.data.view(-1)[::7] = -1.0
if sys.argv[5]:
    qi.save(qi.quantize_(model, sys.argv[5]), sys.argv[1])
else:
    model.save_pretrained(sys.argv[1])
"""

# Arguments: the directory, layers, and a scheme to save it in.
MAKE_EXPERTS = """
import sys, torch, quark_inductor as qi
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
config = Qwen3MoeConfig(
    hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=int(sys.argv[2]), num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, vocab_size=1024, num_experts=32, num_experts_per_tok=4,
    tie_word_embeddings=False, dtype=torch.bfloat16,
)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
for p in model.parameters():
    p.data.fill_(0.5)
    p.data.view(-1)[::7] = -1.0
qi.save(qi.quantize_(model, sys.argv[3]), sys.argv[1])
"""

# Arguments: a small model to warm up with, the model, and a scheme to quantize both to while they load (or "").
LOAD = """
import json, sys
import quark_inductor as qi
def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
qi.load(sys.argv[1], scheme=sys.argv[3] or None)  # imports what it needs
before = kilobytes("VmRSS")
model = qi.load(sys.argv[2], scheme=sys.argv[3] or None)
sizes = [p.nbytes for p in model.parameters()]
print(json.dumps([1024 * (kilobytes("VmHWM") - before), sum(sizes), max(sizes)]))
"""


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_peak_memory_is_the_files_and_little_more(tmp_path: Path, python: Callable[..., str]) -> None:
    """The files, the largest tensor, and room for the allocator: 30 % and 32 MiB.

    A float model is twice as large as its files, which are almost all FP8: neither it nor two copies would fit.
    """
    python(MAKE, tmp_path / "model", "2048", "6144", "3", "ptpc_fp8")
    size = bytes_of(tmp_path / "model")
    assert 150e6 < size < 250e6
    peak, _, largest = json.loads(python(LOAD, FIXTURES / "mxfp4", tmp_path / "model", ""))
    assert peak > 0.9 * size  # it was measured
    assert peak < 1.3 * size + largest + 2**25


def test_the_float_model_is_never_in_memory(tmp_path: Path, python: Callable[..., str]) -> None:
    """The quantized model, and one weight at a time with what quantizing it takes: far less than the float model.

    That is 6 float32 copies of the largest weight at most (1.3 and 2.7 are measured).
    """
    python(MAKE, tmp_path / "model", "1024", "2048", "20", "")
    size = bytes_of(tmp_path / "model")
    assert 400e6 < size < 500e6
    largest = 4 * 1024 * 2048
    for scheme in ("ptpc_fp8", "mxfp4"):
        peak, quantized, _ = json.loads(python(LOAD, FIXTURES / "base", tmp_path / "model", scheme))
        assert peak > 0.9 * quantized  # it was measured
        assert peak < 1.1 * quantized + 6 * largest < size


def test_packing_takes_little_beside_the_packed_weights(tmp_path: Path, python: Callable[..., str]) -> None:
    """The packed model, 3 times its largest weight, and 10 % for huge pages that are not full."""
    python(MAKE, tmp_path / "model", "2048", "5632", "2", "mxfp4")
    peak, packed, largest = json.loads(python(LOAD, FIXTURES / "mxfp4", tmp_path / "model", ""))
    assert packed > 50e6
    assert peak > 0.9 * packed  # it was measured
    assert peak < 1.1 * packed + 3 * largest


@pytest.mark.parametrize("scheme", ["mxfp4", pytest.param("ptpc_fp8", marks=pytest.mark.fuzz)])
def test_experts_are_never_held_twice(scheme: str, tmp_path: Path, python: Callable[..., str]) -> None:
    """The files and a fifth: experts of a layer are grouped one by one, each freed where it was before."""
    python(MAKE_EXPERTS, tmp_path / "model", "4", scheme)
    size = bytes_of(tmp_path / "model")
    assert size > 100e6
    peak, _, _ = json.loads(python(LOAD, FIXTURES / "moe_qwen3_mxfp4", tmp_path / "model", ""))
    assert peak > 0.9 * size  # it was measured
    assert peak < 1.2 * size
