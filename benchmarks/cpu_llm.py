"""A whole model on CPU, one token at a time: quantized and compiled, against the ways a user has today.

    python benchmarks/cpu_llm.py [--model smollm2 | llama-1b] [--scheme mxfp4] [--exclude lm_head] [--way NAME ...]

Ways: ``bf16`` (eager), ``bf16 compiled`` (stock Inductor), the scheme ``emulated`` (eager) and ``compiled`` by this
package, and, where amd-quark is installed, the same checkpoint by ``amd-quark`` in transformers. Each runs in a process
of its own, one after the other: ``generate`` with a static cache, greedily; the median time between two tokens. Memory
is the peak of the process while it loads, less what it had before. ``smollm2`` is the demo's SmolLM2-135M-Instruct,
``llama-1b`` a Llama of 1.1 billion random weights.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

WAYS = ("bf16", "bf16 compiled", "emulated", "compiled", "amd-quark")
PROMPT, TOKENS, SLOW_TOKENS = 16, 64, 6
# TinyLlama's sizes.
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


class _Clock:
    """A streamer that only notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def float_checkpoint(model: str, directory: Path) -> None:
    """Write the float model."""
    if model == "smollm2":
        from quark_inductor.demo import fetch_model, load_float
        from quark_inductor.machine import cache_folder

        _, float_model = load_float(fetch_model(cache_folder()))
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        float_model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16)
    float_model.save_pretrained(directory)


def _memory(name: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(way: str, checkpoint: Path) -> Any:
    """The model of a way."""
    if way in ("emulated", "compiled"):
        import quark_inductor as qi

        return qi.load(checkpoint)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()


def one_token_compiled(model: Any, backend: str) -> None:
    """Compile the forward pass for one token; that of the prompt stays eager."""
    eager = model.forward
    # A decoding loop changes no module: what Dynamo would ask of each before every token is left out.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False, options=options)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (eager if kwargs["input_ids"].shape[1] > 1 else compiled)(*args, **kwargs)

    model.forward = forward


@torch.inference_mode()
def measure(way: str, checkpoint: Path) -> dict[str, float]:
    """One way, in this process."""
    from transformers import StaticCache

    for module in ("transformers", "quark_inductor.loading"):
        importlib.import_module(module)
    before, start = _memory("VmRSS"), time.perf_counter()
    model = load(way, checkpoint)
    found = {"load_s": time.perf_counter() - start}
    for parameter in model.parameters():
        parameter.view(torch.uint8).max()  # what is mapped from a file is in memory once it was read
    found["peak_mb"] = (_memory("VmHWM") - before) / 1e6
    found["weights_mb"] = sum(p.nbytes for p in model.parameters()) / 1e6
    config = model.config
    cache = StaticCache(config=config, max_cache_len=PROMPT + TOKENS + 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, head, model.dtype, model.device)
    prompt = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def generate(tokens: int) -> list[float]:
        cache.reset()
        clock = _Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            streamer=clock,
            disable_compile=True,
        )
        # The first two times are those of the prompt and of the token that its forward pass gave.
        return [b - a for a, b in itertools.pairwise(clock.times[1:])]

    compiles = way.endswith("compiled")
    if compiles:
        one_token_compiled(model, "inductor" if way.startswith("bf16") else "quark")
    (first,) = generate(2)
    if compiles:
        found["compile_s"] = first  # not the prompt's pass, which is eager
    times = generate(TOKENS if compiles or way == "bf16" else SLOW_TOKENS)
    quarters = statistics.quantiles(times, n=4)
    found |= {"tok_s": 1 / statistics.median(times), "spread": (quarters[2] - quarters[0]) / quarters[1]}
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Decoding speed of a whole model on CPU.")
    parser.add_argument("--model", choices=("smollm2", "llama-1b"), default="smollm2")
    parser.add_argument("--scheme", default="mxfp4")
    parser.add_argument("--exclude", default="lm_head", help="Linears that stay float; '' for none (default: lm_head)")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "CHECKPOINT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    import quark_inductor as qi

    print(f"{arguments.model}, {arguments.scheme}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| way | tok/s | spread | compile, cold / warm, s | load, s | peak, MB | weights, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="quark-inductor-llm-") as name:
        directory = Path(name)
        float_checkpoint(arguments.model, directory / "float")
        exclude = [arguments.exclude] if arguments.exclude else []
        qi.save(qi.load(directory / "float", scheme=arguments.scheme, exclude=exclude), directory / "quantized")
        for way in arguments.way or WAYS:
            if way == "amd-quark" and importlib.util.find_spec("quark") is None:
                print("| amd-quark | not installed: pip install amd-quark | | | | | |")
                continue
            checkpoint = directory / ("float" if way.startswith("bf16") else "quantized")
            command = [sys.executable, __file__, "--measure", way, str(checkpoint)]
            cache = directory / way.replace(" ", "-")
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
            runs = []
            for _ in range(2 if way.endswith("compiled") else 1):
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            last = runs[-1]
            compiling = " / ".join(f"{run['compile_s']:.1f}" for run in runs if "compile_s" in run)
            print(
                f"| {way} | {last['tok_s']:.2f} | {last['spread']:.0%} | {compiling} | {last['load_s']:.1f} "
                f"| {last['peak_mb']:.0f} | {last['weights_mb']:.0f} |",
                flush=True,
            )
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
