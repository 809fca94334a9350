"""One trace from a client through the router to the batches of its replicas."""

import asyncio
from collections.abc import Iterable

import pytest
from chaos.collector import Collector, collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.mesh import MakeCheckpoint, Mesh
from tests.packing import random_hidden
from tests.router_caller import random_routing

from expertmesh.client import RouterClient
from expertmesh.runtime.errors import UnknownExpert
from expertmesh.runtime.telemetry import configure

ROUTING = random_routing(5, 4)
"""Rows for both replicas."""


async def traced_calls(redis_url: str, checkpoint: MakeCheckpoint, collector_url: str) -> None:
    """Forward, Dispatch and a Forward that fails, each in a span of a client that traces; returns
    when everything is exported."""
    path = checkpoint("mixtral")
    client = configure("client", collector_url)
    hidden_TD = random_hidden(5)
    async with Mesh(redis_url, "traced") as mesh:
        await mesh.replicas(path, 2, otlp_endpoint=collector_url)
        router = await mesh.router(path, otlp_endpoint=collector_url)
        with RouterClient(router.target) as caller:
            with client.span("client.forward"):
                await asyncio.to_thread(caller.forward, 0, hidden_TD)
            with client.span("client.dispatch"):
                await asyncio.to_thread(
                    caller.dispatch, 1, hidden_TD, ROUTING.experts_TK, ROUTING.weights_TK
                )
            with pytest.raises(UnknownExpert), client.span("client.wrong"):
                await asyncio.to_thread(caller.forward, 9, hidden_TD)
            await asyncio.to_thread(caller.forward, 0, hidden_TD)
    client.shutdown()


def children(collector: Collector, parent: Span) -> dict[str, list[Span]]:
    """The spans right below one, by name."""
    found: dict[str, list[Span]] = {}
    for span in collector.all_spans:
        if span.parent_span_id == parent.span_id:
            found.setdefault(span.name, []).append(span)
    return found


def attributes(span: Span) -> dict[str, object]:
    return {
        a.key.removeprefix("expertmesh."): a.value.string_value or a.value.int_value
        for a in span.attributes
    }


def check_within(parent: Span, spans: Iterable[Span]) -> None:
    for span in spans:
        assert span.trace_id == parent.trace_id
        assert parent.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= parent.end_time_unix_nano


def check_dispatch(collector: Collector, dispatch: Span, layer: int, num_rows: int) -> None:
    """From router.dispatch down: a send for each replica, its compute, its batch."""
    assert attributes(dispatch) == {"layer": layer}
    below = children(collector, dispatch)
    assert below.keys() == {"router.send"}
    sends = below["router.send"]
    assert {attributes(send)["replica"] for send in sends} == {"g0#1", "g1#1"}
    check_within(dispatch, sends)
    rows = []
    for send in sends:
        assert send.kind == Span.SPAN_KIND_CLIENT
        [compute] = children(collector, send)["expert.compute"]
        assert compute.kind == Span.SPAN_KIND_SERVER
        assert attributes(compute)["layer"] == layer
        assert attributes(compute)["rows"] == attributes(send)["rows"]
        rows.append(attributes(compute)["rows"])
        stages = children(collector, compute)
        assert stages.keys() == {"expert.queue", "expert.batch"}
        [batch] = stages["expert.batch"]
        assert attributes(batch) == {"batch_rows": attributes(send)["rows"]}
        check_within(send, [compute])
        check_within(compute, [batch])
    assert sum(int(str(count)) for count in rows) == num_rows


async def test_one_trace_from_the_client_to_the_batch(
    redis_url: str, checkpoint: MakeCheckpoint, one_thread: None, restored_logging: None
) -> None:
    with collecting() as (collector, url):
        await traced_calls(redis_url, checkpoint, url)
    spans = collector.spans

    [forward] = children(collector, spans["client.forward"])["router.Forward"]
    check_within(spans["client.forward"], [forward])
    assert forward.kind == Span.SPAN_KIND_SERVER
    below = children(collector, forward)
    assert below.keys() == {"router.gate", "router.dispatch"}
    [gate], [dispatch] = below["router.gate"], below["router.dispatch"]
    check_within(forward, [gate, dispatch])
    check_dispatch(collector, dispatch, layer=0, num_rows=10)

    [dispatched] = children(collector, spans["client.dispatch"])["router.Dispatch"]
    [dispatch] = children(collector, dispatched)["router.dispatch"]
    check_dispatch(collector, dispatch, layer=1, num_rows=20)

    [wrong] = children(collector, spans["client.wrong"])["router.Forward"]
    assert wrong.status.code == Status.STATUS_CODE_ERROR
    assert not children(collector, wrong), "it never reached a replica"
    assert len({spans[f"client.{name}"].trace_id for name in ("forward", "dispatch", "wrong")}) == 3

    untraced = collector.named("router.Forward")[-1]
    assert not untraced.parent_span_id, "a client that does not trace starts none"
    assert len({span.span_id for span in collector.all_spans}) == len(collector.all_spans)
    services = {name.split(".")[0]: service for name, service in collector.service_of.items()}
    assert services == {stage: f"expertmesh.{stage}" for stage in ("client", "router", "expert")}


async def test_the_stages_are_measured(
    redis_url: str, checkpoint: MakeCheckpoint, one_thread: None, restored_logging: None
) -> None:
    with collecting() as (collector, url):
        await traced_calls(redis_url, checkpoint, url)
    counted = {"calls", "tokens", "rows"}
    measured = {"queue_wait", "batch_rows", "compute_time", "transport_time"}
    assert collector.metrics.keys() >= {f"expertmesh.{name}" for name in counted | measured}
    transport = collector.metrics["expertmesh.transport_time"].histogram.data_points
    groups = {point.attributes[0].value.string_value: point.count for point in transport}
    assert groups == {"g0": 3, "g1": 3}
