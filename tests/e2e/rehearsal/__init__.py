"""A rehearsal of `kubectl apply`: Pods of the manifests as network namespaces on one machine.

Nothing is configured for it: images' variables come from the Dockerfile, everything else from what
kubectl applies to the small API server of `tests/k8s/miniapi`. Stand-ins for the controllers of
Kubernetes (`controllers.py`), for KubeRay (`operator.py`, `raypods.py`), the kubelet (`pods.py`,
`containers.py`, `probes.py`) and cluster DNS (`dns.py`) do what those would do, as far as it
concerns these manifests. Ray, its autoscaler, Redis, kubectl and everything of ours are real.

Everything runs in namespaces of one process (`outside.py`): with it, processes, networks and
mounts are gone, however it ends.
"""
