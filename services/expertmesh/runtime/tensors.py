"""torch tensors to and from the wire: raw little-endian bytes with an explicit dtype and shape."""

import math
import warnings
from collections.abc import Sequence

import torch

from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.wire import Buffer
from expertmesh.v1 import tensor_pb2 as pb

# torch tells once per process that a buffer is read-only: here, where nobody hears it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

_ALIGNMENT_BYTES = 64  # what torch allocates at
MAX_DIMS = 8

TORCH_DTYPES: dict[int, torch.dtype] = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_INT32: torch.int32,
    pb.DTYPE_INT64: torch.int64,
}
WIRE_DTYPES: dict[torch.dtype, pb.DType.ValueType] = {
    dtype: pb.DType.ValueType(number) for number, dtype in TORCH_DTYPES.items()
}


def wire_dtype(dtype: torch.dtype, field: str = "dtype") -> pb.DType.ValueType:
    """The wire's name of a torch dtype, or InvalidInput naming `field`."""
    if dtype not in WIRE_DTYPES:
        names = ", ".join(dtype_name(known) for known in WIRE_DTYPES)
        raise InvalidInput.of(field, expected=f"one of {names}", got=dtype_name(dtype))
    return WIRE_DTYPES[dtype]


def torch_dtype(number: int, field: str = "dtype") -> torch.dtype:
    """The torch dtype of a wire number, or InvalidInput naming `field`."""
    if number not in TORCH_DTYPES:
        names = ", ".join(dtype_name(known) for known in WIRE_DTYPES)
        raise InvalidInput.of(field, expected=f"one of {names}", got=f"DType {number}")
    return TORCH_DTYPES[number]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in C order: a view if it is contiguous and on the CPU, else of a copy."""
    if tensor.requires_grad or not tensor.is_cpu:
        tensor = tensor.detach().cpu()
    return bytes_of(tensor.contiguous())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU: whoever writes there changes the tensor."""
    if not tensor.numel():
        return memoryview(b"")
    if not tensor.dim():
        tensor = tensor.view(1)
    if tensor.dtype is not torch.float32:  # numpy has no bfloat16, and views cost 1 us
        tensor = tensor.view(torch.uint8)
    return tensor.numpy().data.cast("B")


def from_bytes(
    data: Buffer, dtype: torch.dtype, shape: Sequence[int], field: str = "data"
) -> torch.Tensor:
    """A tensor over `data` without a copy; read-only, as it shares memory with a message.

    Raises:
        InvalidInput: the length of `data` is not what dtype and shape say, or no tensor has it.
    """
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(data) != expected_bytes:
        what = f"{expected_bytes} bytes for {dtype_name(dtype)}{list(shape)}"
        raise InvalidInput.of(field, expected=what, got=f"{len(data)} bytes")
    if not expected_bytes:
        try:
            return torch.empty(tuple(shape), dtype=dtype)
        except RuntimeError as error:  # next to the 0 another size overflows
            raise InvalidInput.of(field, expected="a possible shape", got=list(shape)) from error
    return torch.frombuffer(data, dtype=dtype).view(tuple(shape))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address that is a multiple of 64 bytes, copied only if it is elsewhere.

    A payload starts anywhere inside a received message, and the bits of MKL's fp32 products of two
    rows depend on the address modulo 16.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT_BYTES == 0 else tensor.clone()


def to_proto(tensor: torch.Tensor) -> pb.Tensor:
    """The tensor as a `Tensor` message (protobuf copies the bytes; the packed paths use `wire`)."""
    return pb.Tensor(
        dtype=wire_dtype(tensor.dtype), shape=tensor.shape, data=bytes(to_bytes(tensor))
    )


def from_proto(message: pb.Tensor, field: str) -> torch.Tensor:
    """The tensor of a `Tensor` message, sharing its bytes.

    Raises:
        InvalidInput: unknown dtype, a length that does not fit the shape, or more than MAX_DIMS
            sizes; names `field`.
    """
    if len(message.shape) > MAX_DIMS:  # the product of a million sizes takes minutes
        got = f"{len(message.shape)} sizes"
        raise InvalidInput.of(f"{field}.shape", expected=f"at most {MAX_DIMS} sizes", got=got)
    dtype = torch_dtype(message.dtype, f"{field}.dtype")
    return from_bytes(message.data, dtype, message.shape, f"{field}.data")
