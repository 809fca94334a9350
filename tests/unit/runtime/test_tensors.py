"""Tensors on the wire: raw little-endian bytes that both sides share instead of copying."""

import struct

import pytest
import torch

from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.tensors import (
    TORCH_DTYPES,
    aligned,
    dtype_name,
    from_bytes,
    from_proto,
    to_bytes,
    to_proto,
    torch_dtype,
    wire_dtype,
)
from expertmesh.v1 import tensor_pb2 as pb

SHAPES = [(), (1,), (3, 5), (2, 3, 4), (0,), (0, 7), (7, 0, 2)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Different values, negative ones too."""
    return (torch.arange(torch.Size(shape).numel()) - 3).view(shape).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=dtype_name)
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = numbers(shape, dtype)
    message = pb.Tensor.FromString(to_proto(tensor).SerializeToString())
    assert tuple(message.shape) == shape
    back = from_proto(message, "hidden")
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_nan_and_signed_zero_keep_their_bits(dtype: torch.dtype) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-8], dtype=dtype)
    back = from_bytes(bytes(to_bytes(tensor)), dtype, (4,))
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_bytes_are_little_endian_in_c_order() -> None:
    transposed = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).t()
    assert bytes(to_bytes(transposed)) == struct.pack("<4f", 1, 2, 3, 4)
    assert torch.equal(
        from_bytes(struct.pack("<2q", -1, 2**40), torch.int64, (2,)), torch.tensor([-1, 2**40])
    )


def test_bytes_of_a_tensor_with_gradient() -> None:
    assert bytes(to_bytes(torch.ones(1, requires_grad=True))) == struct.pack("<f", 1)


def test_neither_way_copies() -> None:
    tensor = torch.zeros(4)
    view = to_bytes(tensor)
    tensor[1] = 1.0
    assert bytes(view) == struct.pack("<4f", 0, 1, 0, 0)
    received = bytearray(16)
    rows = from_bytes(received, torch.float32, (2, 2))
    received[:4] = struct.pack("<f", 5)
    assert rows[0, 0] == 5


def test_only_a_tensor_elsewhere_is_moved_to_an_aligned_address() -> None:
    memory = torch.arange(64, dtype=torch.float32)
    start = -memory.data_ptr() % 64 // 4
    there, beside = memory[start : start + 8], memory[start + 1 : start + 9]
    assert aligned(there).data_ptr() == there.data_ptr()
    moved = aligned(beside)
    assert moved.data_ptr() % 64 == 0
    assert torch.equal(moved, beside)


def test_a_dtype_the_wire_does_not_know_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"weights.dtype: expected one of float32, .*float64"):
        wire_dtype(torch.float64, "weights.dtype")
    for number in (pb.DTYPE_UNSPECIFIED, 77):
        with pytest.raises(InvalidInput, match=f"hidden.dtype: .* got DType {number}"):
            torch_dtype(number, "hidden.dtype")


def test_every_dtype_of_the_proto_has_a_torch_dtype() -> None:
    assert set(pb.DType.values()) - {pb.DTYPE_UNSPECIFIED} == set(TORCH_DTYPES)


@pytest.mark.parametrize("num_bytes", [0, 23, 25])
def test_a_length_that_does_not_fit_the_shape_says_both(num_bytes: int) -> None:
    message = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 3], data=bytes(num_bytes))
    with pytest.raises(InvalidInput) as caught:
        from_proto(message, "hidden")
    assert caught.value.message == (
        f"hidden.data: expected 24 bytes for float32[2, 3], got {num_bytes} bytes."
    )
    assert caught.value.fields["field"] == "hidden.data"


@pytest.mark.parametrize("shape", [[2**32 - 1] * 3, [0, 2**32 - 1, 2**32 - 1, 2**32 - 1]])
def test_an_impossible_shape_is_the_callers_fault(shape: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"hidden.data: expected"):
        from_proto(pb.Tensor(dtype=pb.DTYPE_INT64, shape=shape), "hidden")


def test_an_unset_tensor_is_refused_by_its_dtype() -> None:
    with pytest.raises(InvalidInput, match=r"mask.dtype: .* got DType 0"):
        from_proto(pb.Tensor(), "mask")
