"""Generated protobuf messages and services of expertmesh, version 1."""
