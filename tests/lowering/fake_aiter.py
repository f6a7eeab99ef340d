"""The GEMMs of an AITER that is not there, in plain torch: its signatures, and the results that its documents promise.

Written into a package ``aiter`` by ``test_aiter.py``. Independent of the package under test: elements are decoded by
tables and products summed in float64.
"""

import torch

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def fp4(packed):
    """``[..., K / 2]`` to values ``[..., K]``, the low nibble first."""
    return FP4[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


def e8m0(scales):
    return torch.exp2(scales.double() - 127).repeat_interleave(32, -1)


def mxfp4(x):
    """The values of a float ``x [M, K]`` in MXFP4, with scales by rule "even" and ties to even."""
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    rounded = ((amax.view(torch.int32) + 0x200000) & -0x800000).view(torch.float32)
    scale = torch.exp2((torch.log2(rounded) - 2).clamp(-127, 127)).double()
    magnitudes, even = FP4[:8], torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.float64)
    distance = ((blocks.double() / scale).abs().clamp(max=6).unsqueeze(-1) - magnitudes).abs()
    nearest = (distance + even * 1e-12).argmin(-1)
    return (magnitudes[nearest] * blocks.double().sign() * scale).flatten(-2)


def gemm_afp4wfp4(x, w, x_scales, w_scales, dtype=torch.bfloat16, y=None, config=None, skip_reduce=False):
    assert x.dtype == w.dtype == x_scales.dtype == w_scales.dtype == torch.uint8
    assert x.shape[1] == w.shape[1]
    return ((fp4(x) * e8m0(x_scales)) @ (fp4(w) * e8m0(w_scales)).T).to(dtype)


def gemm_a16wfp4(x, w, w_scales, atomic_add=False, dtype=torch.bfloat16, y=None, config=None):
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert not atomic_add
    return (mxfp4(x) @ (fp4(w) * e8m0(w_scales)).T).to(dtype)


def gemm_a8wfp4(x, w, y, x_scales, w_scales, dtype=torch.bfloat16, config=None):
    assert (x_scales.dtype, x_scales.shape) == (torch.float32, (x.shape[0], 1))
    assert w_scales.shape == (w.shape[0], x.shape[1] // 32)
    assert y.dtype == dtype
    y.copy_((x.double() * x_scales.double()) @ (fp4(w) * e8m0(w_scales)).T)


def gemm_a8w8(x, w, x_scale, w_scale, bias=None, dtype=torch.bfloat16, y=None, config=None, skip_reduce=False):
    assert (x_scale.dtype, x_scale.shape) == (torch.float32, (x.shape[0], 1))
    assert (w_scale.dtype, w_scale.shape) == (torch.float32, (1, w.shape[0]))
    assert x.dtype == w.dtype
    product = (x.double() * x_scale.double()) @ (w.double() * w_scale.double().T).T
    return product.to(dtype) if bias is None else product.to(bias.dtype).add(bias).to(dtype)


def gemm_a8w8_blockscale(x, w, x_scale, w_scale, dtype=torch.bfloat16, y=None, config=None, skip_reduce=False):
    (m, k), n = x.shape, w.shape[0]
    assert (x_scale.dtype, x_scale.shape) == (torch.float32, (m, k // 128))
    assert (w_scale.dtype, w_scale.shape) == (torch.float32, (-(-n // 128), k // 128))
    left = x.double() * x_scale.double().repeat_interleave(128, 1)
    right = w.double() * w_scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    return (left @ right.T).to(dtype)
