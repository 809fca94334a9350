"""A small Kubernetes API server for tests: real kubectl applies to it.

It has discovery, strict validation by the schemas of a Kubernetes version and of CRDs, strategic
merge, merge, JSON and server-side apply patches, and a few of the API server's own checks. Objects
live in memory. It has no controllers, no admission (Pod Security), no CEL, no defaults of built-in
kinds, and speaks JSON only: `kubectl create namespace` sends protobuf and is refused.
"""
