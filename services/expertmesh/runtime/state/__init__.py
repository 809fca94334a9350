"""Live state of the mesh in Redis: replicas publish heartbeats with a lease, routers watch them.

Redis is never on the hot path, and its absence is never an error: both sides keep trying.
Only commands that Redis 6.2 and Valkey 9 share: SET PX, DEL, SCAN, MGET, PUBLISH, SUBSCRIBE, and
EVAL for the controller's lease.
"""

from expertmesh.runtime.security.redis_secrets import RedisSecrets
from expertmesh.runtime.state.lease import Lease
from expertmesh.runtime.state.publisher import ReplicaPublisher
from expertmesh.runtime.state.record import (
    channel_name,
    check_mesh_name,
    is_tombstone,
    parse_record,
    replica_key,
)
from expertmesh.runtime.state.watcher import MeshWatcher

__all__ = [
    "Lease",
    "MeshWatcher",
    "RedisSecrets",
    "ReplicaPublisher",
    "channel_name",
    "check_mesh_name",
    "is_tombstone",
    "parse_record",
    "replica_key",
]
