"""How every gRPC connection of the mesh is made."""

import grpc

DEFAULT_MAX_MESSAGE_BYTES = 256 << 20
GREATEST_MAX_MESSAGE_BYTES = (1 << 31) - 1025  # gRPC's limits are 32-bit, and it adds a little
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 2_000
_FRAME_BYTES = 1 << 20
_ANSWER_HEADER_BYTES = 1 << 10
"""An answer says more than its request (load, times): what fits on the way there fits back."""

Options = list[tuple[str, int]]


def _sizes(max_receive_bytes: int, max_send_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.http2.max_frame_size", _FRAME_BYTES),
        ("grpc.http2.write_buffer_size", _FRAME_BYTES),
    ]


def channel_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> Options:
    """Options of a client channel. A dead peer is noticed after 12 s even if its host vanished."""
    return [
        *_sizes(max_message_bytes + _ANSWER_HEADER_BYTES, max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # a new channel connects at once, instead of sharing an older one's growing back-off
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> Options:
    """Options of a server. Without so_reuseport=0 two servers could share a port silently."""
    return [
        *_sizes(max_message_bytes, max_message_bytes + _ANSWER_HEADER_BYTES),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def connect(address: str, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A plaintext channel to "host:port". It connects when first used and reconnects by itself."""
    return grpc.aio.insecure_channel(address, options=channel_options(max_message_bytes))
