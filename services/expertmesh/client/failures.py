"""From a failed gRPC call to the typed error it stands for."""

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from expertmesh.runtime.error_status import from_status
from expertmesh.runtime.errors import ExpertMeshError


def error_of(failure: grpc.RpcError) -> ExpertMeshError:
    """The error the server raised; gRPC's own failures become the nearest class by code."""
    status = rpc_status.from_call(failure)
    if status is None:
        code, details = failure.code(), failure.details() or ""
        status = status_pb2.Status(code=code.value[0], message=details or code.name)
    return from_status(status)
