"""How every gRPC connection of the mesh is made."""

import json
from collections.abc import Sequence

import grpc

from expertmesh.runtime.security.access import PLAIN, Access

DEFAULT_MAX_MESSAGE_BYTES = 256 << 20
GREATEST_MAX_MESSAGE_BYTES = (1 << 31) - 1025  # gRPC's limits are 32-bit, and it adds a little
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 2_000
_FRAME_BYTES = 1 << 20
ANSWER_HEADER_BYTES = 1 << 10
"""An answer says more than its request (load, times): what fits on the way there fits back."""

Options = list[tuple[str, int | str]]

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": "expertmesh.v1.RouterService"},
                {"service": "expertmesh.v1.GenerateService"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
"""All addresses of a target in turn, and what a server did not begin to answer is asked again
(https://github.com/grpc/grpc/blob/master/doc/service_config.md). Calls of both services change
nothing, so they may be repeated. A server that need not be asked again says so (`NO_RETRY`)."""
NO_RETRY = ("grpc-retry-pushback-ms", "-1")
"""Trailing metadata of an UNAVAILABLE that another server would answer as well."""


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
        *_sizes(max_message_bytes + ANSWER_HEADER_BYTES, max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        # else what is longer than 256 KiB would not be sent again
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        # a new channel connects at once, instead of sharing an older one's growing back-off
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, max_request_bytes: int | None = None
) -> Options:
    """Options of a server. Without so_reuseport=0 two servers could share a port silently."""
    request_bytes = min(max_message_bytes, max_request_bytes or max_message_bytes)
    return [
        *_sizes(request_bytes, max_message_bytes + ANSWER_HEADER_BYTES),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def connect(
    address: str,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    access: Access = PLAIN,
    more_options: Sequence[tuple[str, int]] = (),
) -> grpc.aio.Channel:
    """A channel to "host:port". It connects when first used and reconnects by itself.

    Raises:
        ConfigError: a file of `access` cannot be used.
    """
    credentials = access.credentials(address)
    options = [*channel_options(max_message_bytes), *access.options(), *more_options]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def connect_blocking(address: str, access: Access = PLAIN) -> grpc.Channel:
    """As `connect`, for code without an event loop."""
    credentials = access.credentials(address)
    options = [*channel_options(), *access.options()]
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)
