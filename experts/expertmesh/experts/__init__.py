"""Expert replicas: checkpoint reader, grouped FFN, micro-batcher, ExpertService, heartbeat, Serve deployment."""
