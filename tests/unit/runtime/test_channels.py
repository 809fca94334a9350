"""Both ends of a connection agree on sizes and keepalive."""

import json
from typing import Any

from expertmesh.runtime.channels import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Options,
    channel_options,
    server_options,
)
from expertmesh.v1 import generate_pb2, router_pb2

RECEIVE, SEND = "grpc.max_receive_message_length", "grpc.max_send_message_length"


def as_dict(options: Options) -> dict[str, Any]:
    """The options by name, each once."""
    found = dict(options)
    assert len(found) == len(options), "an option given twice"
    return found


def test_each_end_accepts_what_the_other_may_send() -> None:
    client, server = as_dict(channel_options(12345)), as_dict(server_options(12345))
    assert client[SEND] == server[RECEIVE] == 12345
    assert client[RECEIVE] == server[SEND] >= 12345
    assert as_dict(channel_options())[SEND] == DEFAULT_MAX_MESSAGE_BYTES == 256 << 20
    assert as_dict(server_options())[RECEIVE] == DEFAULT_MAX_MESSAGE_BYTES


def test_servers_allow_the_pings_that_clients_send() -> None:
    client, server = as_dict(channel_options()), as_dict(server_options())
    least_ms = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert least_ms < client["grpc.keepalive_time_ms"], "else servers close idle connections"
    assert client["grpc.keepalive_permit_without_calls"] == 1
    assert server["grpc.keepalive_permit_without_calls"] == 1
    assert client["grpc.keepalive_time_ms"] + client["grpc.keepalive_timeout_ms"] == 12_000


def test_two_servers_never_share_a_port() -> None:
    assert as_dict(server_options())["grpc.so_reuseport"] == 0


def test_clients_share_their_calls_out_and_repeat_what_was_not_answered() -> None:
    config = json.loads(as_dict(channel_options())["grpc.service_config"])
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    [method] = config["methodConfig"]
    services = {
        module.DESCRIPTOR.services_by_name[name].full_name
        for module, name in ((router_pb2, "RouterService"), (generate_pb2, "GenerateService"))
    }
    assert {name["service"] for name in method["name"]} == services
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
