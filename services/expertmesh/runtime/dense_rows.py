"""llama4's float32 bits: transformers multiplies all T tokens by every expert, the mesh only the
chosen ones, and matrix libraries compute few rows with other kernels than many.

Shapes: T tokens, R rows, D hidden size.
"""

import torch

_MANY_ROWS = 16
"""From here on products no longer depend on the number of rows (measured; docs/exactness.md)."""


def pad_to_dense(
    rows_RD: torch.Tensor, experts_R: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, then rows of zeros, so that every expert used gets as many as decide its kernel.

    An expert maps zeros to zeros, which the caller drops: outputs of the first R rows are the
    answer. Other dtypes than float32 need no padding and pass through.

    Args:
        rows_RD: one row per chosen (token, expert).
        experts_R: int64 expert of each row.
        num_tokens: T, the rows transformers would multiply with every expert.
    """
    if rows_RD.dtype != torch.float32:
        return rows_RD, experts_R
    least = num_tokens if num_tokens < 4 else _MANY_ROWS  # kernels of 1, 2 and 3 rows differ
    used, counts = torch.unique(experts_R, return_counts=True)
    extra = torch.repeat_interleave(used, (least - counts).clamp(min=0))
    zeros = rows_RD.new_zeros(len(extra), rows_RD.shape[1])
    return torch.cat((rows_RD, zeros)), torch.cat((experts_R, extra))
