"""The GEMMs of an AITER that is not there, in plain torch: its signatures, and the results that its documents promise.

Written into a package ``aiter`` by ``test_aiter.py``. Independent of the package under test: elements are decoded by
tables and products summed in float64.
"""

import numpy as np
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


# --- packed weights, read byte by byte


def tiled_weight(shuffled, n, columns):
    """``[n, columns]``: each 16 rows, of 32 bytes the first 16 of every row, then the other 16."""
    flat, plain = shuffled.flatten().numpy(), np.empty((n, columns), np.uint8)
    assert flat.size == plain.size
    for row in range(n):
        for b in range(columns):
            tile = row // 16 * (columns // 32) + b // 32
            plain[row, b] = flat[tile * 512 + b % 32 // 16 * 256 + row % 16 * 16 + b % 16]
    return torch.from_numpy(plain)


def tiled_scales(shuffled, rows, blocks):
    """``[rows, blocks]``: each 32 rows and 8 blocks, rows r and r + 16 and blocks b and b + 4 side by side."""
    flat, plain = shuffled.flatten().numpy(), np.empty((rows, blocks), np.uint8)
    assert flat.size >= plain.size
    for row in range(rows):
        for b in range(blocks):
            tile = row // 32 * (blocks // 8) + b // 8
            plain[row, b] = flat[tile * 256 + b % 4 * 64 + row % 16 * 4 + b % 8 // 4 * 2 + row % 32 // 16]
    return torch.from_numpy(plain)


def gemm_a4w4(
    A,
    B,
    A_scale,
    B_scale,
    bias=None,
    dtype=torch.bfloat16,
    alpha=1.0,
    beta=0.0,
    bpreshuffle=True,
    apreshuffle=False,
    global_A_scale=None,
    global_B_scale=None,
):
    (m, columns), n = A.shape, B.shape[0]
    assert A.dtype == B.dtype == torch.float4_e2m1fn_x2
    assert A_scale.dtype == B_scale.dtype == torch.float8_e8m0fnu
    assert A_scale.shape == (-(-m // 256) * 256, columns // 16)
    assert B_scale.shape == (-(-n // 256) * 256, columns // 16)
    assert all(t.is_contiguous() for t in (A, B, A_scale, B_scale))
    assert (B.shape[1], n % 128, columns % 128) == (columns, 0, 0)
    assert (dtype, bias, alpha, beta, bpreshuffle, apreshuffle) == (torch.bfloat16, None, 1, 0, True, False)
    a, b, a_scale, b_scale = (t.view(torch.uint8) for t in (A, B, A_scale, B_scale))
    left = fp4(a) * e8m0(tiled_scales(a_scale, m, columns // 16))
    right = fp4(tiled_weight(b, n, columns)) * e8m0(tiled_scales(b_scale, n, columns // 16))
    # What lies behind the last row is written too.
    out = torch.full((-(-m // 32) * 32, n), torch.nan, dtype=dtype)
    out[:m] = left @ right.T
    return out[:m]


def preshuffled(w, w_scales):
    """The values ``[N, K]`` of a weight ``[N / 16, 16 K / 2]`` with scales ``[N / 32, K]``."""
    assert w.dtype == w_scales.dtype == torch.uint8
    n, columns = w.shape[0] * 16, w.shape[1] // 16
    assert (n % 32, columns % 128, w_scales.shape) == (0, 0, (n // 32, 2 * columns))
    return fp4(tiled_weight(w, n, columns)) * e8m0(tiled_scales(w_scales, n, columns // 16))


def gemm_afp4wfp4_preshuffle(
    x_fp4, w_preshuf, x_scales, w_scales, dtype=torch.bfloat16, y=None, config=None, skip_reduce=False
):
    m, columns = x_fp4.shape
    assert x_fp4.dtype == x_scales.dtype == torch.uint8
    if m < 32:
        assert x_scales.shape == (m, columns // 16)
    else:
        assert x_scales.shape == (-(-m // 256) * 8, 2 * columns)
        x_scales = tiled_scales(x_scales, m, columns // 16)
    return ((fp4(x_fp4) * e8m0(x_scales)) @ preshuffled(w_preshuf, w_scales).T).to(dtype)


def gemm_a16wfp4_preshuffle(
    x, w, w_scales, prequant=True, dtype=torch.bfloat16, y=None, config=None, skip_reduce=False
):
    assert prequant
    assert x.dtype in (torch.bfloat16, torch.float16)
    return (mxfp4(x) @ preshuffled(w, w_scales).T).to(dtype)


# --- experts


def get_optimal_moe_config_func(
    dtype, use_int8_w8a16=False, use_int8_w8a8=False, use_fp8_w8a8=False, use_int4_w4a16=False, use_mxfp4=False
):
    """Tiles by the number of tokens, out of a table that is read once and handed out as it is."""
    assert [use_int8_w8a16, use_int8_w8a8, use_fp8_w8a8, use_int4_w4a16, use_mxfp4].count(True) == 1
    table = FP8_TILES if use_fp8_w8a8 else MXFP4_TILES
    return lambda M: table["small_M" if M < 256 else "medium_M" if M < 1024 else "large_M"]


def _tiles(m, k):
    named = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": 2}
    return {**named, "num_warps": 4, "num_stages": 2, "waves_per_eu": 0, "matrix_instr_nonkdim": 16, "kpack": 1}


MXFP4_TILES = {"small_M": _tiles(16, 128), "medium_M": _tiles(64, 128), "large_M": _tiles(128, 128)}
FP8_TILES = {"small_M": _tiles(16, 256), "medium_M": _tiles(64, 64), "large_M": _tiles(128, 128)}
KEYS = set(_tiles(1, 1))


def _moe(
    A,
    B,
    C,
    product,
    of_padding,
    topk_weights,
    topk_ids,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    mul_routed_weight,
    top_k,
    config,
    compute_type,
):
    """What the kernels of both functions do: ``product`` of a row of A and an expert, for each row in each block.

    Not written by any block: NaN. ``of_padding``: what is read of a row that only fills a block.
    """
    import triton.language as tl

    assert {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}[compute_type] is C.dtype
    assert set(config) == KEYS
    (m, _), (experts, n, _), valid = A.shape, B.shape, topk_ids.numel()
    assert m > 0  # what it does without rows is not documented
    assert C.shape == (m, top_k, n)
    assert valid == m * top_k
    assert topk_weights.shape == topk_ids.shape == (m, top_k)
    assert topk_weights.stride(1) == sorted_token_ids.stride(0) == 1
    # A buffer's beginning and some strides are all that the kernel gets.
    assert (A.stride(), B.stride(2), C.stride()[1:]) == ((A.shape[1], 1), 1, (n, 1))
    assert expert_ids.is_contiguous()
    assert expert_ids.dtype == num_tokens_post_padded.dtype == torch.int32
    assert num_tokens_post_padded.shape == (1,)
    block = config["BLOCK_SIZE_M"]
    longest = len(sorted_token_ids) if m >= block else min(len(sorted_token_ids), m * top_k * block)
    launched, counted = -(-longest // block), num_tokens_post_padded.item()
    assert counted % block == 0
    assert counted // block <= min(launched, len(expert_ids))
    assert counted <= len(sorted_token_ids)
    C.fill_(torch.nan)
    out, seen = C.view(-1, n), set()
    for pid, expert in enumerate(expert_ids[: counted // block].tolist()):
        for token in sorted_token_ids[pid * block : (pid + 1) * block].tolist():
            assert token >= 0
            if token >= valid:
                of_padding(token // top_k)
                continue
            assert token not in seen
            seen.add(token)
            assert -1 <= expert < experts
            row = product(token // top_k, expert) if expert >= 0 else torch.zeros(n, dtype=torch.float64)
            out[token] = row * topk_weights.flatten()[token].double() if mul_routed_weight else row


def fused_moe_mxfp4(
    A,
    B,
    C,
    A_scale,
    B_scale,
    A_mx_scale,
    B_mx_scale,
    topk_weights,
    topk_ids,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    mul_routed_weight,
    top_k,
    swizzle_mx_a,
    swizzle_mx_b,
    config,
    compute_type,
):
    assert A.dtype == B.dtype == A_mx_scale.dtype == B_mx_scale.dtype == torch.uint8
    (_, columns), (experts, n, _) = A.shape, B.shape
    assert B.shape[2] == columns
    assert (A_scale.dtype, A_scale.shape, B_scale.dtype, B_scale.shape) == (
        torch.float32,
        (1,),
        torch.float32,
        (experts,),
    )
    assert B_mx_scale.shape == (experts, n, columns // 16)
    assert A_mx_scale.shape[1] == columns // 16
    assert (swizzle_mx_a, swizzle_mx_b) == (False, False)  # documented, and not there
    assert A_mx_scale.is_contiguous()
    weights = fp4(B) * e8m0(B_mx_scale)

    def product(row, expert):
        values = fp4(A[row]) * e8m0(A_mx_scale[row])
        return weights[expert] @ values * A_scale.double() * B_scale[expert].double()

    def of_padding(row):
        assert row < len(A_mx_scale)  # scales are loaded without a mask

    _moe(
        A,
        B,
        C,
        product,
        of_padding,
        topk_weights,
        topk_ids,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        mul_routed_weight,
        top_k,
        config,
        compute_type,
    )


def fused_moe(
    A,
    B,
    C,
    A_scale,
    B_scale,
    B_zp,
    topk_weights,
    topk_ids,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    mul_routed_weight,
    top_k,
    compute_type,
    use_fp8_w8a8,
    use_int8_w8a16,
    use_int4_w4a16,
    block_shape=None,
    config=None,
):
    (m, k), (experts, n, _) = A.shape, B.shape
    # Without blocks, or in other formats, it quantizes A itself, or not at all.
    assert (use_fp8_w8a8, use_int8_w8a16, use_int4_w4a16, B_zp, block_shape) == (True, False, False, None, [128, 128])
    assert A.dtype == B.dtype
    assert (A_scale.dtype, A_scale.shape) == (torch.float32, (m, k // 128))
    assert (B_scale.dtype, B_scale.shape) == (torch.float32, (experts, -(-n // 128), k // 128))
    assert 128 % config["BLOCK_SIZE_K"] == 0  # a step of the kernel's reads one scale
    right = B_scale.double().repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2) * B.double()

    def product(row, expert):
        return right[expert] @ (A[row].double() * A_scale[row].double().repeat_interleave(128))

    _moe(
        A,
        B,
        C,
        product,
        lambda row: None,  # scales are loaded with the mask of rows
        topk_weights,
        topk_ids,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        mul_routed_weight,
        top_k,
        config,
        compute_type,
    )
