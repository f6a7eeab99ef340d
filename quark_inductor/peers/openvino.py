"""OpenVINO's CPU plugin: a model of MatMuls whose constant weights it keeps compressed."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quark_inductor.peers.base import Peer, Prepared, activations, check, weight


class _OpenVino(Peer):
    package = module = "openvino"
    get = "pip install openvino"
    hints: ClassVar[dict[str, Any]]
    bits_per_weight: float

    def constants(self, w: NDArray[np.float32]) -> tuple[Any, Any]:
        """Codes and scales of a weight ``[N, K]``, each ``[N, groups, size of a group]`` or a 1 for the last two."""
        raise NotImplementedError

    def prepare(self, m: int) -> Prepared:
        """One model of as many MatMuls, each with an input of its own."""
        import openvino as ov
        from openvino import opset13 as ops

        n, k = self.place.n, self.place.k
        w = weight(n, k)
        size = int(n * k * self.bits_per_weight / 8)
        copies = self.place.copies(size, m)
        inputs, outputs = [], []
        for i in range(copies):
            codes, scales = self.constants(np.roll(w, i, 0))
            values = ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.convert(ops.constant(scales), "f32"))
            flat = ops.reshape(values, np.array([n, k], dtype=np.int64), special_zero=False)
            inputs.append(ops.parameter([m, k], np.float32))
            outputs.append(ops.result(ops.matmul(inputs[-1], flat, False, True)))
        hints = {"INFERENCE_NUM_THREADS": self.place.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        compiled = ov.Core().compile_model(ov.Model(outputs, inputs), "CPU", {**hints, **self.hints})
        request = compiled.create_infer_request()
        numbers = activations(copies, m, k)
        for i, x in enumerate(numbers):
            request.get_input_tensor(i).data[:] = x

        def call() -> None:
            request.infer()

        call()
        check(request.get_output_tensor(0).data, numbers[0], w)
        return Prepared(call=call, linears=copies, weights=copies, weight_bytes=size)


class OpenVinoMxfp4(_OpenVino):
    """MXFP4 weights, products in bfloat16 where the CPU has it."""

    name = "openvino-mxfp4"
    hints: ClassVar[dict[str, Any]] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    bits_per_weight = 4.25

    def constants(self, w: NDArray[np.float32]) -> tuple[Any, Any]:
        """E2M1 codes in blocks of 32 and E8M0 scales."""
        import openvino as ov

        blocks = w.reshape(len(w), -1, 32)
        exponents = np.floor(np.log2(np.abs(blocks).max(2, keepdims=True))) - 2
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
        magnitudes = np.abs(blocks) * np.exp2(-exponents).astype(np.float32)
        nearest = np.searchsorted((values[1:] + values[:-1]) / 2, magnitudes).astype(np.uint8)
        codes = nearest | (np.signbit(blocks).astype(np.uint8) << 3)
        packed = codes[..., ::2] | (codes[..., 1::2] << 4)
        scales = (exponents + 127).astype(np.uint8)
        tensors = ov.Tensor(ov.Type.f4e2m1, ov.Shape(blocks.shape)), ov.Tensor(ov.Type.f8e8m0, ov.Shape(scales.shape))
        # Copied: one made from an array does not keep the array alive.
        for tensor, array in zip(tensors, (packed, scales), strict=True):
            tensor.data.view(np.uint8).reshape(-1)[:] = array.reshape(-1)
        return tensors


class OpenVinoInt8(_OpenVino):
    """INT8 weights, one scale a channel, activations quantized to INT8 inside."""

    name = "openvino-int8"
    hints: ClassVar[dict[str, Any]] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 2**32 - 1}
    bits_per_weight = 8

    def constants(self, w: NDArray[np.float32]) -> tuple[Any, Any]:
        """INT8 codes and float16 scales."""
        rows = w[:, None, :]
        scales = np.abs(rows).max(2, keepdims=True) / 127
        return np.round(rows / scales).astype(np.int8), scales.astype(np.float16)
