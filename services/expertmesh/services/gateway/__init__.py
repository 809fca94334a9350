"""The gateway: the dense part of a model, text generation over it, and its gRPC service."""
