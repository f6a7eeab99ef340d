"""Kernels on a GPU: every pair of formats, every scheme, every way of compiling, and a whole model.

What is compared with is computed on CPU: by the oracle, or by float64 products of operands that the CPU's emulation
quantizes, which other tests compare with amd-quark's bit by bit. What the provider refuses for the GPU that is there is
left out because it says so, so that a kernel which should be there and is not is a failure.

``benchmarks/gpu_run.py`` runs these tests, and goes on after one whose kernel ruined the process.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

import quark_inductor as qi
from quark_inductor.lowering import registry  # noqa: F401
from quark_inductor.lowering.base import GemmProblem, select
from quark_inductor.lowering.target import current
from quark_inductor.patterns.pipeline import collect_results
from quark_inductor.patterns.selection import is_fused, problem_of
from quark_inductor.schemes.base import QuarkLinear, replace_module
from quark_inductor.schemes.spec import PRESETS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("usable", "fresh")]

DEVICE, PROVIDER = "cuda", "triton"
GPU_PROVIDERS = {"triton", "scaled_mm", "scaled_mm_blocks", "aiter"}
ROUNDS = {"emulate_precision_casts": True}
U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# What a process ends with whose GPU cannot be used any more; benchmarks/gpu_run.py starts another.
LOST = 86


def synchronize() -> None:
    """Wait for all kernels; where one failed, raise."""
    torch.cuda.synchronize()


@pytest.fixture
def usable() -> Iterator[None]:
    """A kernel that reads what is not there ruins its process: no test after it would say anything."""
    yield
    try:
        synchronize()
    except RuntimeError as e:
        pytest.exit(f"the GPU cannot be used by this process any more: {str(e).splitlines()[0]}", returncode=LOST)


def there(tree: Any) -> Any:
    """All tensors on the GPU, with their strides."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(DEVICE), tree)


def here(tree: Any) -> Any:
    """All tensors on CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), tree)


def mostly(*first: Any, slow: tuple[Any, ...]) -> list[Any]:
    """These in every run, the others only where tests marked ``slow`` are: a minute of a GPU is dear."""
    return [*first, *(pytest.param(*(it if isinstance(it, tuple) else (it,)), marks=pytest.mark.slow) for it in slow)]


# --- every pair of formats


@pytest.fixture(scope="module")
def pairs(gemms: ModuleType) -> Any:
    """Tiles share their scales."""
    return gemms.Pairs(gemms.Columns(weight=64, weight_block=32, activation=64), lambda weight, x: False)


@pytest.fixture(scope="module")
def model(gemms: ModuleType, oracle: ModuleType, pairs: Any) -> Any:
    """A GEMM of each."""
    return gemms.Gemms(list(pairs), oracle, step=32)


def test_every_format_occurs(pairs: Any) -> None:
    pairs.check_all_occur()


def taken(model: Any, m: int, rounds: bool) -> tuple[Any, list[GemmProblem]]:
    """The GEMMs which the provider takes of ``m`` tokens, and their problems."""
    with config.patch(emulate_precision_casts=rounds):
        traced = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(model.inputs(m))
        problems = [problem_of(node) for node in traced.graph.nodes if is_fused(node)]
    assert len(problems) == len(model.pairs)
    refused = {
        i: s.refusals for i, p in enumerate(problems) if (s := select(current(DEVICE), p, PROVIDER)).provider is None
    }
    # Those of which the tokens are too many for one kernel, and whatever needs FP8 on a chip without it.
    known = ("tokens in the GEMM", "FP8", "compute capability")
    others = {i: reasons for i, reasons in refused.items() if not any(k in " ".join(reasons) for k in known)}
    assert len(others) <= 2, others
    chosen = [i for i in range(len(problems)) if i not in refused]
    assert chosen, refused
    return model.only(chosen), [problems[i] for i in chosen]


def results(model: Any, inputs: Any, **options: Any) -> list[Tensor]:
    """What a GPU computes; where all cannot be compiled together, the message says which cannot alone."""
    options["quark.provider"] = PROVIDER

    def run(some: Any, of_some: Any) -> list[Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(some.on(DEVICE), backend="quark", fullgraph=True, dynamic=False, options=options)
        outputs = compiled(there(of_some))
        synchronize()
        return list(here(outputs))

    try:
        return run(model, inputs)
    except Exception:
        wrong = []
        for i, (weight, x) in enumerate(model.pairs):
            synchronize()  # if it cannot, none of the others can
            try:
                run(model.only([i]), [inputs[i]])
            except Exception as e:
                wrong.append(f"{x} by {weight} {model.sizes[i]} {model.dtype(i)}: {str(e).splitlines()[:2]}")
        if not wrong:
            raise
    pytest.fail("\n".join(wrong))


@pytest.mark.parametrize("m", [1, 5, 70])
def test_every_pair_with_the_roundings_of_the_emulation(model: Any, m: int) -> None:
    some, _ = taken(model, m, rounds=True)
    inputs = some.inputs(m)
    some.check(inputs, results(some, inputs, **ROUNDS))


@pytest.mark.parametrize("m", [1, 5, 70])
def test_every_pair(model: Any, m: int) -> None:
    some, problems = taken(model, m, rounds=False)
    inputs = some.inputs(m)
    some.check_either(inputs, results(some, inputs), lambda i: slack(problems[i]))


def slack(problem: GemmProblem) -> float:
    """What an FP8 instruction may lose, relative to the sum of magnitudes.

    Up to Hopper it aligns 32 products to the largest one and keeps 13 bits after the point (DeepSeek-V3, arXiv
    2412.19437, section 3.5.2): 2^-13 of the largest each, which is a tenth of their sum or more in random data.
    """
    from quark_inductor.lowering.triton.chips import CHIPS
    from quark_inductor.lowering.triton.forms import form_of

    chip = CHIPS.get(current(DEVICE).arch)
    few_bits = chip is not None and chip.name in ("sm_89", "sm_90") and form_of(chip, problem).kind == "fp8"
    return 2.0**-9 if few_bits else 0.0


def test_every_product_is_rounded_as_the_emulation_rounds_it(gemms: ModuleType, oracle: ModuleType, pairs: Any) -> None:
    """Bit by bit, where each result is one product: a sum of many in bfloat16 would hide how operands are rounded."""
    # In this order no weight of a single channel keeps a zero.
    ones = gemms.Gemms(list(pairs)[::-1], oracle, step=32)
    ones.keep_one_of_each_channel()
    for m in (9, 70):
        some, _ = taken(ones, m, rounds=True)
        inputs = some.inputs(m)
        some.check(inputs, results(some, inputs, **ROUNDS), exactly=True)


# --- every scheme, in sizes with more than one tile


@dataclass(frozen=True)
class Twins:
    """A quantized module on the GPU, and the same one on CPU."""

    there: Any
    here: Any


def twins(module: nn.Module, scheme: str, k: int, dtype: torch.dtype = torch.bfloat16, exclude: Any = ()) -> Twins:
    """A float module, quantized on CPU, twice; what goes into it is calibrated with random tokens."""
    quantized = qi.quantize_(module.to(dtype), scheme, calibration=[tokens(64, k, dtype)], exclude=exclude)
    return Twins(copy.deepcopy(quantized).to(DEVICE), quantized)


def tokens(*sizes: Any, seed: int = 0) -> Tensor:
    """Random numbers on CPU, in the dtype at the end of ``sizes``, bfloat16 by default."""
    dtype = sizes[-1] if isinstance(sizes[-1], torch.dtype) else torch.bfloat16
    shape = [size for size in sizes if isinstance(size, int)]
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def assert_near(layer: QuarkLinear, x: Tensor, y: Tensor) -> None:
    """A Linear's result on the GPU, by what went into it: sums of K products in float32, and one rounding.

    ``layer`` is the one on CPU, which rounds the operands as eager code does.
    """
    x, y = x.cpu(), y.cpu()
    operand = layer.scheme.fake_quantize_input(layer, x.reshape(-1, layer.in_features)).double()
    weight = layer.scheme.dequantize_weight(layer, x.dtype).double()
    bias = torch.zeros(1).double() if layer.bias is None else layer.bias.double()
    exact, n = operand @ weight.T + bias, layer.in_features + 2
    sums = n * 2.0**-24 / (1 - n * 2.0**-24) * (operand.abs() @ weight.T.abs() + bias.abs())
    bound = sums + U[y.dtype] * (exact.abs() + sums)
    error = (y.double().reshape(exact.shape) - exact).abs()
    assert y.shape == (*x.shape[:-1], layer.out_features)
    assert y.dtype is x.dtype
    # As `>` it would let a NaN pass.
    assert (error <= bound).all(), f"{layer.scheme.spec}: {error.max()}, {(error / bound).max()} of the bound"


class Linears(nn.Module):
    """One Linear of each of some schemes, of one size, each with its own input."""

    def __init__(self, made: dict[str, Any]) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(made)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [linear(x) for linear, x in zip(self.linears.values(), inputs, strict=True)]


@pytest.mark.parametrize("m", mostly(1, 300, slow=(16, 64)))
def test_every_scheme(m: int) -> None:
    """Many tiles and many steps along K, which few tokens split."""
    k, n = 1024, 768
    torch.manual_seed(0)
    both = {name: twins(nn.Sequential(nn.Linear(k, n, bias=i % 2 == 0)), name, k) for i, name in enumerate(PRESETS)}
    model = Linears({name: pair.there[0] for name, pair in both.items()})
    inputs = [tokens(m, k, seed=i) for i in range(len(both))]
    compiled = torch.compile(model, backend="quark", fullgraph=True, dynamic=False, options=ROUNDS)
    with collect_results() as found:
        outputs = compiled(there(inputs))
    wrong = []
    for pair, x, y in zip(both.values(), inputs, outputs, strict=True):
        try:
            assert_near(pair.here[0], x, y)
        except AssertionError as e:
            wrong.append(str(e).splitlines()[0])
    assert not wrong, "\n".join(wrong)
    assert_fused(found, len(PRESETS))


def assert_fused(found: list[Any], count: int) -> None:
    """All Linears of one graph, by a provider for GPUs."""
    (result,) = found
    emulated = {linear.layer: linear.refusals for linear in result.linears if not linear.fused}
    assert emulated == {}
    assert len(result.linears) == count
    assert {linear.provider for linear in result.linears} <= GPU_PROVIDERS
    kernels = {key: n for key, n in counters["inductor"].items() if key.startswith("quark.")}
    assert sum(kernels.values()) == count
    assert {key.rpartition(".")[2] for key in kernels} <= GPU_PROVIDERS


@pytest.mark.parametrize(
    ("provider", "scheme", "m"),
    [
        *(("scaled_mm", scheme, m) for scheme in ("fp8", "ptpc_fp8") for m in (64, 200)),
        *(("scaled_mm_blocks", scheme, 1024) for scheme in ("mxfp4", "mxfp8", "nvfp4")),
    ],
)
def test_scaled_mm(provider: str, scheme: str, m: int) -> None:
    """A library's GEMM, which does not round operands: products of the codes, scaled afterwards."""
    k, n = 512, 256
    pair = twins(nn.Sequential(nn.Linear(k, n)), scheme, k)
    x = tokens(m, k)
    options = {"quark.provider": provider}
    report = qi.explain(pair.there, there(x), options=options)
    if not report.linears[0].fused:
        pytest.skip(f"{provider}: {report.linears[0].refusals}")
    y = torch.compile(pair.there, backend="quark", fullgraph=True, dynamic=False, options=options)(there(x))
    layer = pair.here[0]
    # In float32 no operand is rounded to bfloat16. Sums may have as few bits as those of slack().
    exact = F.linear(
        layer.scheme.fake_quantize_input(layer, x).double(),
        layer.scheme.dequantize_weight(layer, torch.float32).double(),
        layer.bias.double(),
    )
    operand = layer.scheme.fake_quantize_input(layer, x).double().abs()
    magnitude = operand @ layer.scheme.dequantize_weight(layer, torch.float32).double().abs().T
    # The activation as eager code has it is rounded to bfloat16 once more than its codes.
    bound = (2.0**-9 + 2.0**-8) * magnitude + 2.0**-8 * exact.abs()
    assert ((y.cpu().double() - exact).abs() <= bound).all()


# --- ways of compiling

K, HIDDEN = 128, 256
FAMILIES = ("mxfp4", "ptpc_fp8", "fp8", "ptpc_int8", "nvfp4", "mxfp4_fp8", "fp8_block128", "int4_wo_128")


class Mlp(nn.Module):
    """What is around a Linear in a decoder layer; returns what goes into each Linear, and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.gate, self.up = nn.Linear(K, HIDDEN, bias=False), nn.Linear(K, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, K)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        gate, up = self.gate(h), self.up(h)
        act = F.silu(gate) * up
        down = self.down(act)
        return x + down, h, gate, up, act, down


@pytest.fixture
def mlp(rounding: None) -> Callable[..., Twins]:
    """``mlp(scheme)``: a random quantized one, compiled with the roundings of eager code."""

    def made(scheme: str, dtype: torch.dtype = torch.bfloat16) -> Twins:
        torch.manual_seed(0)
        return twins(Mlp(), scheme, K, dtype)

    return made


@pytest.fixture
def rounding() -> Iterator[None]:
    """Where ``torch.compile`` gets a mode, it takes no options."""
    with config.patch(ROUNDS):
        yield


def compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, backend="quark", fullgraph=True, **options)


def assert_right(mlp: Mlp, x: Tensor, got: tuple[Tensor, ...]) -> None:
    """Each step, by what the one before it gave; ``mlp`` is the one on CPU."""
    y, h, gate, up, act, down = here(got)
    x, u = x.cpu(), 2 * U[x.dtype]
    torch.testing.assert_close(h, mlp.norm(x), rtol=u + 2.0**-18, atol=0.0)
    torch.testing.assert_close(act, F.silu(gate) * up, rtol=2 * u + 2.0**-18, atol=2.0**-24)
    torch.testing.assert_close(y, x + down, rtol=0.0, atol=0.0)
    for layer, of, result in ((mlp.gate, h, gate), (mlp.up, h, up), (mlp.down, act, down)):
        assert isinstance(layer, QuarkLinear)
        assert_near(layer, of, result)


@pytest.mark.parametrize("scheme", FAMILIES)
def test_one_graph_for_any_number_of_tokens(mlp: Callable[..., Twins], scheme: str) -> None:
    pair = mlp(scheme)
    run = compiled(pair.there, dynamic=True)
    with collect_results() as found:
        assert_right(pair.here, tokens(5, K), run(there(tokens(5, K))))
    assert_fused(found, 3)
    assert {linear.problem.m for linear in found[0].linears} == {None}
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (2, 3, 16, 17, 64, 65, 300):
            assert_right(pair.here, tokens(m, K), run(there(tokens(m, K))))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("scheme", mostly("mxfp4", "ptpc_fp8", slow=("ptpc_int8", "int4_wo_128")))
def test_no_tokens(mlp: Callable[..., Twins], scheme: str) -> None:
    pair = mlp(scheme)
    got = compiled(pair.there, dynamic=False)(there(tokens(0, K)))
    assert [(*tensor.shape,) for tensor in got] == [(0, K), (0, K), (0, HIDDEN), (0, HIDDEN), (0, HIDDEN), (0, K)]
    assert {tensor.device.type for tensor in got} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", mostly("mxfp4", "ptpc_fp8", "int4_wo_128", slow=("fp8", "nvfp4", "fp8_block128")))
def test_other_dtypes(mlp: Callable[..., Twins], scheme: str, dtype: torch.dtype) -> None:
    pair, x = mlp(scheme, dtype), tokens(20, K, dtype)
    with collect_results() as found:
        assert_right(pair.here, x, compiled(pair.there, dynamic=False)(there(x)))
    assert_fused(found, 3)


@pytest.mark.parametrize("scheme", mostly("mxfp4", "ptpc_int8", slow=("ptpc_fp8", "nvfp4", "int4_wo_128")))
def test_strides(rounding: None, scheme: str) -> None:
    """Columns with gaps, a transposed tensor, one that begins elsewhere, a row for all, and a batch of sequences."""
    torch.manual_seed(0)
    pair = twins(nn.Sequential(nn.Linear(K, 48)), scheme, K)
    wide = there(tokens(12, 2 * K))
    inputs = {
        "columns": wide[:, ::2],
        "transposed": there(tokens(K, 12)).t(),
        "offset": wide[1:, 16 : 16 + K],
        "expanded": there(tokens(1, K)).expand(12, K),
        "batch": there(tokens(4, 3, K)).transpose(0, 1),
    }
    for name, x in inputs.items():
        torch._dynamo.reset()
        assert not x.is_contiguous(), name
        assert_near(pair.here[0], x, compiled(pair.there, dynamic=False)(x))


@pytest.mark.parametrize(
    ("scheme", "m"),
    mostly(
        ("mxfp4", 5), ("mxfp4", 80), ("ptpc_fp8", 80), slow=(("ptpc_fp8", 5), ("ptpc_int8", 80), ("int4_wo_128", 5))
    ),
)
def test_cuda_graphs(mlp: Callable[..., Twins], scheme: str, m: int) -> None:
    """Recorded, and replayed with other inputs: bit by bit what the same kernels give without."""
    pair = mlp(scheme)
    inputs = [tokens(m, K, seed=seed) for seed in range(6)]
    with collect_results() as found:
        recorded = compiled(pair.there, mode="reduce-overhead", dynamic=False)
        replayed = []
        for x in inputs:
            torch.compiler.cudagraph_mark_step_begin()
            replayed.append([tensor.clone() for tensor in recorded(there(x))])
    assert_fused(found, 3)
    assert_recorded()
    torch._dynamo.reset()
    plain = compiled(pair.there, dynamic=False)
    for x, got in zip(inputs, replayed, strict=True):
        assert_right(pair.here, x, tuple(got))
        assert all(torch.equal(a, b) for a, b in zip(got, plain(there(x)), strict=True))


def assert_recorded() -> None:
    """CUDA graphs, of everything that was compiled."""
    from torch._inductor.cudagraph_trees import get_manager

    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    assert any(manager.roots.values())


@pytest.mark.parametrize(
    ("scheme", "mode"),
    mostly(
        ("mxfp4", "max-autotune"),
        ("ptpc_fp8", "max-autotune-no-cudagraphs"),
        slow=(("fp8_block128", "max-autotune"), ("int4_wo_128", "max-autotune-no-cudagraphs")),
    ),
)
def test_max_autotune(mlp: Callable[..., Twins], tried: list[list[float]], scheme: str, mode: str) -> None:
    """Several tiles are measured; one that does not fit is left out, not an error."""
    pair = mlp(scheme)
    for m in (5, 80):
        torch._dynamo.reset()
        counters.clear()
        run = compiled(pair.there, mode=mode, dynamic=False)
        for seed in range(3):
            x = tokens(m, K, seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            assert_right(pair.here, x, run(there(x)))
        if mode == "max-autotune":
            assert_recorded()
    assert tried
    assert all(sum(ms < float("inf") for ms in of_one) > 1 for of_one in tried), tried


@pytest.fixture
def tried() -> Iterator[list[list[float]]]:
    """Milliseconds of each tile that Inductor measures, by GEMM; nothing that it measured before is used."""
    from torch._inductor.select_algorithm import add_feedback_saver, clear_feedback_savers
    from torch._inductor.utils import fresh_cache

    found: list[list[float]] = []
    add_feedback_saver(lambda timings, *rest: found.append([*timings.values()]))
    with fresh_cache():
        yield found
    clear_feedback_savers()


@pytest.mark.parametrize("processes", [1, 4])
def test_compiled_in_other_processes(
    mlp: Callable[..., Twins], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Where Inductor compiles kernels by default, and where it does so itself."""
    from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels
    from torch._inductor.utils import fresh_cache

    pair, x = mlp("mxfp4"), tokens(7, K)
    CompiledTritonKernels.cache_clear()
    sent = []
    with fresh_cache(), config.patch(compile_threads=processes, worker_start_method="subprocess"):
        if processes > 1:
            AsyncCompile.wait_pool_ready()
            pool = AsyncCompile.process_pool()
            submit = pool.submit
            monkeypatch.setattr(pool, "submit", lambda task, *rest: sent.append(task) or submit(task, *rest))
        assert_right(pair.here, x, compiled(pair.there, dynamic=False)(there(x)))
    assert bool([task for task in sent if task.__name__ == "_worker_compile_triton"]) is (processes > 1)


@pytest.mark.parametrize("scheme", mostly("mxfp4", slow=("ptpc_int8",)))
def test_a_second_process_compiles_nothing(tmp_path: Path, scheme: str) -> None:
    """Everything comes from the caches: no pass runs, and the kernels are counted."""

    def run() -> dict[str, Any]:
        plan = json.dumps({"jobs": [[scheme, {}]], "device": DEVICE})
        worker = Path(__file__).with_name("cache_worker.py")
        # -P: beside the script are folders named like the package.
        done = subprocess.run(
            [sys.executable, "-P", worker, plan],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        (said,) = json.loads(done.stdout)["jobs"]
        assert said["ratio"] == pytest.approx(1.0, rel=1e-5)
        # Of float32 sums in other orders, relative to the largest result.
        assert said["error"] < 1e-5
        return dict(said)

    first, second = run(), run()
    assert (first["aot"]["miss"], first["fx"]["miss"]) == (1, 1)
    assert first["passes"]
    assert second["aot"]["hit"] == 1
    assert not (second["aot"] | second["fx"]).keys() & {"miss", "bypass"}
    assert second["passes"] == []
    assert first["kernels"] == second["kernels"]
    assert set(first["kernels"]) <= GPU_PROVIDERS


@pytest.mark.parametrize("scheme", mostly("mxfp4", slow=("ptpc_fp8", "int4_wo_128")))
def test_ahead_of_time(mlp: Callable[..., Twins], scheme: str, tmp_path: Path) -> None:
    """``torch.export`` and AOTInductor: one package for any number of tokens."""
    if (missing := missing_headers()) is not None:
        pytest.skip(missing)
    pair = mlp(scheme)
    example = there(tokens(5, K))
    exported = torch.export.export(pair.there, (example,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    with collect_results() as found:
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "mlp.pt2"), inductor_configs=qi.aoti_configs()
        )
    assert_fused(found, 3)
    loaded = torch._inductor.aoti_load_package(path)
    for m in (2, 5, 37, 300):
        assert_right(pair.here, tokens(m, K), loaded(there(tokens(m, K))))


def missing_headers() -> str | None:
    """``None`` where a package can be built: what is compiled for it includes the toolkit's headers."""
    from torch.utils.cpp_extension import include_paths

    if torch.version.hip is not None:
        return None
    try:
        folders = [Path(folder) for folder in include_paths("cuda")]
    except OSError:  # it finds no toolkit
        folders = []
    if any((folder / "cuda.h").is_file() for folder in folders):
        return None
    return "AOTInductor compiles C++ that includes cuda.h, which is not there: install the CUDA toolkit"


# --- a whole model


class Transparent(nn.Module):
    """A model that also returns the input and the output of each of its quantized Linears."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.names = [name for name, m in model.named_modules() if isinstance(m, QuarkLinear)]
        for name in self.names:
            replace_module(model, name, Seen(model.get_submodule(name), self.seen))

    def forward(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        logits, seen = self.model(ids, use_cache=False).logits, list(self.seen)
        self.seen.clear()  # as it was found: it is part of what a compiled graph is guarded by
        return logits, seen


class Seen(nn.Module):
    """A Linear that notes what goes into it, and what comes out."""

    def __init__(self, linear: Any, seen: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.linear, self.seen = linear, seen

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.seen.append((x, y))
        return y


def tiny_llama() -> Any:
    """Two layers with random weights, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Logits of a random model with the default, 0.02, hardly depend on its layers.
        initializer_range=0.1,
    )
    return LlamaForCausalLM(sizes).bfloat16().eval()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(
    ("scheme", "length"),
    mostly(
        *((scheme, 24) for scheme in ("mxfp4", "ptpc_fp8", "ptpc_int8", "nvfp4")),
        slow=tuple((scheme, length) for scheme in ("mxfp4", "ptpc_fp8") for length in (1, 200)),
    ),
)
def test_a_whole_model(scheme: str, length: int) -> None:
    """Every Linear's result is right, by what went into it, and the logits are as near to the float model's.

    They are not compared one by one: an addition in another order moves a last bit, which a quantize amplifies.
    """
    floating = tiny_llama()
    ids = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(1))
    on_gpu = copy.deepcopy(floating).to(DEVICE)
    qi.quantize_(on_gpu, scheme, calibration=[there(ids)])
    report = qi.explain(on_gpu, there(ids), options=ROUNDS)
    assert len(report.linears) == 14
    assert {linear.name: linear.refusals for linear in report.linears if not linear.fused} == {}
    assert {linear.provider for linear in report.linears} <= GPU_PROVIDERS
    emulated = copy.deepcopy(on_gpu).cpu()
    eager = on_gpu(there(ids), use_cache=False).logits
    transparent = Transparent(on_gpu)
    logits, seen = compiled(transparent, dynamic=False, options=ROUNDS)(there(ids))
    for name, (x, y) in zip(transparent.names, seen, strict=True):
        assert_near(emulated.get_submodule(name), x, y)
    reference = floating.float()(ids, use_cache=False).logits
    assert relative_error(logits, reference) < 1.25 * relative_error(eager, reference) + 2.0**-8
    assert relative_error(logits, eager) < relative_error(eager, reference) + 2.0**-8


def relative_error(got: Tensor, reference: Tensor) -> float:
    got, reference = got.cpu().double(), reference.cpu().double()
    return float((got - reference).norm() / reference.norm())
