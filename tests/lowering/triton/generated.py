"""What Inductor generates for a GPU that is not there: its Triton kernels, and the module that calls them, on CPU.

Kernels run wherever a caller says: in Triton's interpreter, for one. So what is tested is what a GPU would get: the
template, its epilogue, and the kernels around it.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.hints import AutotuneHint, DeviceProperties, ReductionHint, TileHint
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
_DECORATOR = re.compile(r"^@triton_heuristics\.(\w+)\(\n(.*?)^\)\n@triton\.jit\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One Triton kernel.

    Attributes:
        name: its function.
        source: a module with it, without Inductor's decorator.
        kind: ``"template"``, ``"pointwise"``, ...
        signature: Triton types of its arguments, by name in order; ``"constexpr"`` for what is known when compiling.
        divisible: names of arguments that are multiples of 16.
        warps: warps a program; ``None``: Inductor tries several.
        stages: the same of tiles in flight.
        constants: values of a template's names, such as ``BLOCK_M``.
    """

    name: str
    source: str
    kind: str
    signature: dict[str, str]
    divisible: tuple[str, ...]
    warps: int | None
    stages: int | None
    constants: dict[str, Any]

    @property
    def interpreted(self) -> str:
        """The source without PTX, which the interpreter does not know: ``test_decode.py`` tests that it is the same."""
        return self.source.replace("PTX: tl.constexpr = True", "PTX: tl.constexpr = False")


def kernels(code: str) -> list[Kernel]:
    """The kernels of a module that Inductor generated, in its order."""
    found = []
    for name, text in _KERNEL.findall(code):
        decorator = _DECORATOR.search(text)
        assert decorator is not None
        kinds = AutotuneHint, DeviceProperties, ReductionHint, TileHint
        names: dict[str, Any] = {kind.__name__: kind for kind in kinds}
        names["__file__"] = name
        options = eval(f"dict({decorator[2]})", names)
        meta = options["triton_meta"]
        arguments = list(meta["signature"])
        divisible = [arguments[place] for (place,), facts in meta["configs"][0].items() if facts]
        found.append(
            Kernel(
                name=name,
                source=text.replace(decorator[0], "@triton.jit\n").replace("triton_helpers.set_driver_to_gpu()\n", ""),
                kind=decorator[1],
                signature=meta["signature"],
                divisible=tuple(divisible),
                warps=options.get("num_warps"),
                stages=options.get("num_stages"),
                constants=options["inductor_meta"].get("config_args", {}),
            )
        )
    assert len(found) == code.count("async_compile.triton(")
    return found


# Runs a kernel, on tensors and numbers by argument, with a grid; writes what it writes.
Run = Callable[[Kernel, dict[str, Any], tuple[int, ...]], None]
_BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 4096}


@dataclass(frozen=True, slots=True)
class _Launcher:
    kernel: Kernel
    run_kernel: Run

    def run(self, *values: Any, stream: int) -> None:
        names = [name for name in self.kernel.signature if name not in _BLOCKS]
        arguments = dict(zip(names, values, strict=False))
        arguments |= {name: size for name, size in _BLOCKS.items() if name in self.kernel.signature}
        grid = tuple(values[len(names) :])
        if self.kernel.kind != "template":
            sizes = ((f"{axis}numel", f"{axis.upper()}BLOCK") for axis in "xyz" if f"{axis}numel" in arguments)
            grid = tuple(-(-arguments[size] // arguments.get(block, 1)) for size, block in sizes)
        self.run_kernel(self.kernel, arguments, grid)


def call(code: str, inputs: Sequence[Tensor], run_kernel: Run) -> list[Tensor]:
    """The results of a generated module, for inputs on CPU."""
    by_name = {kernel.name: kernel for kernel in kernels(code)}
    guard = SimpleNamespace(_DeviceGuard=lambda index: contextlib.nullcontext(), set_device=lambda index: None)
    names: dict[str, Any] = {
        "async_compile": SimpleNamespace(
            triton=lambda name, *args, **kwargs: _Launcher(by_name[name], run_kernel), wait=lambda names: None
        ),
        "torch": SimpleNamespace(cuda=guard, ops=torch.ops, **_dtypes()),
        "aten": torch.ops.aten,
        "assert_size_stride": lambda *args: None,
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "reinterpret_tensor": torch.as_strided,
        "get_raw_stream": lambda index: 0,
    }
    body = code[code.index("async_compile = AsyncCompile()") :].split("\nrunner = Runner")[0]
    body = re.sub(r"^(async_compile|empty_strided_p2p) = .*$|^del async_compile$", "", body, flags=re.MULTILINE)
    exec(body, names)
    results: list[Tensor] = list(names["Runner"]([]).call(list(inputs)))
    return results


def _dtypes() -> dict[str, torch.dtype]:
    return {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """A function as the graph that Inductor lowers."""
    return make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)
