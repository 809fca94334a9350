"""Quantised expert weights back to floating point, bit for bit as transformers does it.

Shapes: N output and M input features of one matrix.
"""

import torch

from expertmesh.runtime.errors import UnsupportedCheckpoint

# the 16 values of a 4-bit float with 2 exponent bits and 1 of mantissa (OCP Microscaling, E2M1)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127


def dequantise_fp8(
    weight_NM: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] = (128, 128),
) -> torch.Tensor:
    """weight * scale of its block, multiplied in float32 (DeepSeek-V3; transformers Fp8Dequantize).

    Args:
        weight_NM: float8_e4m3fn.
        scale: one factor per block: [ceil(N / block[0]), ceil(M / block[1])], float32, bfloat16,
            float8_e8m0fnu, or uint8 holding an exponent.
        dtype: of the result.
        block: rows and columns that share a factor. When the grid of factors says otherwise (a
            whole number of other blocks), the grid wins, as in transformers.

    Raises:
        UnsupportedCheckpoint: the grid of factors fits no block size.
    """
    factors = torch.exp2(scale.float() - _EXPONENT_BIAS) if scale.dtype == torch.uint8 else scale
    row_block, column_block = (
        _block_size(size, blocks, wanted)
        for size, blocks, wanted in zip(weight_NM.shape, scale.shape, block, strict=True)
    )
    num_rows, num_columns = weight_NM.shape
    spread = factors.float().repeat_interleave(row_block, 0)[:num_rows]
    spread = spread.repeat_interleave(column_block, 1)[:, :num_columns]
    return (weight_NM.float() * spread).to(dtype)


def _block_size(size: int, num_blocks: int, wanted: int) -> int:
    if -(-size // wanted) == num_blocks:
        return wanted
    if size % num_blocks:
        raise UnsupportedCheckpoint(
            f"weight_scale_inv: expected {-(-size // wanted)} factors (blocks of {wanted}) for "
            f"{size} features, got {num_blocks}."
        )
    return size // num_blocks


def dequantise_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """4-bit values times a power of two per 32 of them (gpt-oss; transformers Mxfp4Dequantize).

    Args:
        blocks: uint8 [N, M / 32, 16]; the low half of a byte is the earlier value.
        scales: uint8 [N, M / 32], exponents offset by 127.
        dtype: of the result, [N, M].
    """
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype)
    pairs = torch.stack((values[(blocks & 0xF).int()], values[(blocks >> 4).int()]), dim=-1)
    exponents = (scales.int() - _EXPONENT_BIAS)[..., None, None]
    return torch.ldexp(pairs, exponents).to(dtype).flatten(-3)
