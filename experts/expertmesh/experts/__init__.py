"""Expert replicas: reader, grouped FFN, micro-batcher, ExpertService, Serve deployment."""
