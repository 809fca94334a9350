"""Manifests for Kubernetes, sized for a model."""
