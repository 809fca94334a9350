"""Do the bits of a row's product depend on how many other rows are multiplied with it?

Matrix libraries pick other kernels for few rows, so merging callers changes bits. MKL_CBWR in
the environment of every process ("AVX512,STRICT") turns that off for float32 where MKL honours it:
on Intel, not on AMD. So it is tried, not assumed.

Shapes: M rows, I and O inputs and outputs of a product.
"""

from collections.abc import Iterable

import torch

_MOST_ROWS = 64
_TRIED_ROWS = (*range(1, 34), 48)  # kernels change at 1, 2, 3, 4, 8, 16 and their remainders
_LARGE = (2048, 1024)  # libraries block large products differently from small ones


def ignores_row_count(
    dtype: torch.dtype, device: torch.device, shapes: Iterable[tuple[int, int]]
) -> bool:
    """Whether every tried product gives a row the same bits alone and among others.

    Args:
        shapes: (I, O) of the products that will be computed.
    """
    random = torch.Generator().manual_seed(0)
    for num_in, num_out in {*shapes, _LARGE}:
        rows_MI = torch.randn(_MOST_ROWS, num_in, generator=random).to(device, dtype)
        weights_OI = torch.randn(num_out, num_in, generator=random).to(device, dtype)
        for weights_IO in (weights_OI.t(), weights_OI.t().contiguous()):
            all_MO = rows_MI @ weights_IO
            if any(not torch.equal(rows_MI[:m] @ weights_IO, all_MO[:m]) for m in _TRIED_ROWS):
                return False
    return True
