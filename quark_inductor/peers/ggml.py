"""llama.cpp: its ``MUL_MAT`` on its CPU backend, through the shared libraries of ``llama-cpp-python``.

A call computes one graph of as many products, as llama.cpp computes a model. Activations are float32 and quantized to 8
bits inside, which is all it can do. Weights lie in the kind of buffer that llama.cpp would choose for them: the first
extra one (repacked, AMX) whose device takes the product, else an ordinary one.
"""

import ctypes
import functools
import importlib.util
import os
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from quark_inductor.peers.base import Peer, Prepared, activations, check, weight
from quark_inductor.schemes.errors import QuarkInductorError

# Of ggml.h and ggml-backend.h.
_F32, _CPU, _WEIGHTS = 0, 0, 1
_BUFFER = 8  # offset of ggml_tensor.buffer


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_BASE: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_type_name": (c_char_p, c_int),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_get_default_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buffer_set_usage": (None, c_void_p, c_int),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}
_TOP: dict[str, tuple[Any, ...]] = {
    "ggml_backend_load_all": (None,),
    "ggml_backend_init_by_type": (c_void_p, c_int, c_char_p),
}


class _Ggml:
    """The functions of the shared libraries, and a CPU backend."""

    def __init__(self, folder: Path) -> None:
        os.environ["GGML_NO_BACKTRACE"] = "1"  # a failed assertion says what failed, and is not drowned
        for name, functions in (("libggml-base.so", _BASE), ("libggml.so", _TOP)):
            library = ctypes.CDLL(str(folder / name))
            for function, (result, *arguments) in functions.items():
                symbol = getattr(library, function)
                symbol.restype, symbol.argtypes = result, arguments
                setattr(self, function.removeprefix("ggml_"), symbol)
        self.backend_load_all()
        self.backend = self.backend_init_by_type(_CPU, None)
        self.device = self.backend_get_device(self.backend)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def extension(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function that only this backend has."""
        address = self.backend_reg_get_proc_address(self.backend_dev_backend_reg(self.device), name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def context(self, tensors: int, nodes: int = 0) -> int:
        """Room for the descriptions of so many tensors, and for a graph."""
        size = self.tensor_overhead() * (tensors + 1) + self.graph_overhead_custom(nodes, False)
        context: int = self.init(_InitParams(size, None, True))
        return context

    def buffer_type(self, kind: int, n: int, k: int) -> int:
        """What llama.cpp would put such a weight into, found as its loader finds it."""
        get = self.extension("ggml_backend_dev_get_extra_bufts", POINTER(c_void_p), c_void_p)
        extra = get(self.device) if get else None
        while extra and extra[0]:
            context = self.context(3)
            w = self.new_tensor_2d(context, kind, k, n)
            product = self.mul_mat(context, w, self.new_tensor_2d(context, _F32, k, 512))
            buffer = self.backend_buft_alloc_buffer(extra[0], 0)
            ctypes.c_void_p.from_address(w + _BUFFER).value = buffer
            takes = self.backend_dev_supports_op(self.device, product)
            self.backend_buffer_free(buffer)
            if takes:
                found: int = extra[0]
                return found
            extra = ctypes.cast(ctypes.addressof(extra.contents) + ctypes.sizeof(c_void_p), POINTER(c_void_p))
        default: int = self.backend_get_default_buffer_type(self.backend)
        return default


@functools.cache
def _ggml() -> _Ggml:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return _Ggml(Path(spec.submodule_search_locations[0]) / "lib")


class _LlamaCpp(Peer):
    package, module = "llama-cpp-python", "llama_cpp"
    get = "pip install llama-cpp-python (compiles llama.cpp for this CPU)"
    kind: int
    type_name: str
    _allocated: tuple[tuple[Any, int], ...] = ()

    def _free(self) -> None:
        for free, what in self._allocated:
            free(what)
        self._allocated = ()

    def prepare(self, m: int) -> Prepared:
        """A graph of products."""
        n, k, ggml = self.place.n, self.place.k, _ggml()
        if (found := (ggml.type_name(self.kind) or b"").decode()) != self.type_name:
            raise QuarkInductorError(f"this llama.cpp calls type {self.kind} {found!r}, expected {self.type_name!r}")
        size = ggml.row_size(self.kind, k) * n
        copies = self.place.copies(size, m)
        w = weight(n, k)
        codes = np.empty(size, dtype=np.uint8)
        ggml.quantize_chunk(self.kind, w.ctypes.data, codes.ctypes.data, 0, n, k, None)

        buffer_type = ggml.buffer_type(self.kind, n, k)
        self._free()
        held = ggml.context(copies)
        weights = [ggml.new_tensor_2d(held, self.kind, k, n) for _ in range(copies)]
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(held, buffer_type)
        ggml.backend_buffer_set_usage(buffer, _WEIGHTS)
        for tensor in weights:
            ggml.backend_tensor_set(tensor, codes.ctypes.data, 0, size)

        # Room for a node or a leaf each: a product, its weight, its input.
        context = ggml.context(2 * copies, 2 * copies)
        graph = ggml.new_graph_custom(context, 2 * copies, False)
        inputs = [ggml.new_tensor_2d(context, _F32, k, m) for _ in range(copies)]
        outputs = [ggml.mul_mat(context, *pair) for pair in zip(weights, inputs, strict=True)]
        for output in outputs:
            ggml.build_forward_expand(graph, output)
        rest = ggml.backend_alloc_ctx_tensors_from_buft(context, ggml.backend_get_default_buffer_type(ggml.backend))
        buffers, contexts = (buffer, rest), (held, context)
        self._allocated = (*((ggml.backend_buffer_free, b) for b in buffers), *((ggml.free, c) for c in contexts))
        numbers = activations(copies, m, k)
        for tensor, x in zip(inputs, numbers, strict=True):
            ggml.backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
        ggml.extension("ggml_backend_set_n_threads", None, c_void_p, c_int)(ggml.backend, self.place.threads)

        def call() -> None:
            if status := ggml.backend_graph_compute(ggml.backend, graph):
                raise QuarkInductorError(f"ggml_backend_graph_compute answers {status}")

        call()
        y = np.empty((m, n), dtype=np.float32)
        ggml.backend_tensor_get(outputs[-1], y.ctypes.data, 0, y.nbytes)
        check(y, numbers[-1], w)
        name = ggml.backend_buft_name(buffer_type).decode()
        return Prepared(call=call, linears=copies, weights=copies, weight_bytes=size, provider=f"ggml {name}")


class GgmlMxfp4(_LlamaCpp):
    """MXFP4 weights."""

    name, kind, type_name = "llama.cpp-mxfp4", 39, "mxfp4"


class GgmlNvfp4(_LlamaCpp):
    """NVFP4 weights."""

    name, kind, type_name = "llama.cpp-nvfp4", 40, "nvfp4"


class GgmlQ8(_LlamaCpp):
    """Q8_0 weights: INT8 in blocks of 32."""

    name, kind, type_name = "llama.cpp-q8_0", 8, "q8_0"
