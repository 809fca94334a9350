"""The Pods of a RayCluster, with all that KubeRay 1.7 puts into them.

After ray-operator/controllers/ray/common/pod.go: `ray start` from rayStartParams and limits,
variables, probes, the init container that waits for the head, the autoscaler beside it.
"""

import copy
from typing import Any

from tests.k8s.kuberay import AGENT_PORT, METRICS_PORT, SERVE_HTTP_PORT

Manifest = dict[str, Any]
GCS_PORT = 6379
_PASSWORD = "$REDIS_PASSWORD"
_POWERS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9}
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def quantity(text: str | int) -> float:
    """ "512Mi" -> 536870912."""
    digits = str(text).rstrip("abcdefghijklmnopqrstuvwxyzKMGT")
    return float(digits) * _POWERS[str(text)[len(digits) :]]


def head_service(cluster: Manifest) -> str:
    """The full name."""
    metadata = cluster["metadata"]
    return f"{metadata['name']}-head-svc.{metadata['namespace']}.svc.cluster.local"


def head(cluster: Manifest, suffix: str, node: str) -> Manifest:
    """The head's Pod.

    Args:
        node: where the API server listens, for the autoscaler.
    """
    spec = cluster["spec"]
    group = spec["headGroupSpec"]
    pod = _pod(cluster, group, "head", "headgroup", suffix)
    [container] = pod["spec"]["containers"]
    params = {"dashboard-host": "0.0.0.0"} | group.get("rayStartParams", {})
    env = {"RAY_ADDRESS": f"127.0.0.1:{GCS_PORT}"}
    store = spec.get("gcsFaultToleranceOptions")
    if store:
        env |= {"RAY_REDIS_ADDRESS": store["redisAddress"]}
        env |= {"RAY_external_storage_namespace": cluster["metadata"]["uid"]}
        params["redis-password"] = _PASSWORD
        container.setdefault("env", []).append({"name": "REDIS_PASSWORD"} | store["redisPassword"])
    if spec.get("enableInTreeAutoscaling"):
        params["no-monitor"] = "true"
        pod["spec"]["containers"].append(_autoscaler(cluster, pod, node))
        _mount(pod, container, "ray-logs", "/tmp/ray")
        _mount(pod, container, "kube-api-access", _ACCOUNT, secret="serviceaccount-token")
        pod["spec"]["restartPolicy"] = "Never"
    _finish(cluster, pod, params, "ray start --head", env)
    container |= {"livenessProbe": _LIVENESS, "readinessProbe": _HEAD_READINESS} | container
    return pod


def worker(cluster: Manifest, group: Manifest, suffix: str) -> Manifest:
    """One Pod of a worker group."""
    pod = _pod(cluster, group, "worker", group["groupName"], suffix)
    container = pod["spec"]["containers"][0]
    address = f"{head_service(cluster)}:{GCS_PORT}"
    params = {"address": address} | group.get("rayStartParams", {})
    env = {
        "FQ_RAY_IP": head_service(cluster),
        "RAY_IP": head_service(cluster).partition(".")[0],
        "RAY_ADDRESS": address,
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    }
    if cluster["spec"].get("enableInTreeAutoscaling"):
        pod["spec"]["restartPolicy"] = "Never"
    _finish(cluster, pod, params, "ray start", env)
    container |= {"livenessProbe": _LIVENESS, "readinessProbe": _worker_readiness(container)}
    wait = {key: container[key] for key in ("image", "securityContext", "env") if key in container}
    wait |= {"name": "wait-gcs-ready", "command": ["/bin/bash", "-c", "--"]}
    script = f"until ray health-check --address {address} >/dev/null 2>&1; do sleep 5; done"
    pod["spec"].setdefault("initContainers", []).append(wait | {"args": [script]})
    return pod


def _pod(cluster: Manifest, group: Manifest, kind: str, name: str, suffix: str) -> Manifest:
    template = copy.deepcopy(group["template"])
    metadata = cluster["metadata"]
    labels = template.get("metadata", {}).get("labels", {}) | {
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": kind,
        "ray.io/group": name,
        "ray.io/cluster": metadata["name"],
    }
    own = f"{metadata['name']}-head-{suffix}"
    if kind == "worker":
        own = f"{metadata['name']}-{name}-worker-{suffix}"
    own_metadata = {"name": own, "namespace": metadata["namespace"], "labels": labels}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": own_metadata, "spec": template["spec"]}
    _mount(pod, pod["spec"]["containers"][0], "shared-mem", "/dev/shm")
    return pod


def _mount(pod: Manifest, container: Manifest, name: str, path: str, secret: str = "") -> None:
    volumes = pod["spec"].setdefault("volumes", [])
    if name not in [own["name"] for own in volumes]:
        source: dict[str, Any] = {"secret": {"secretName": secret}} if secret else {"emptyDir": {}}
        volumes.append({"name": name} | source)
    container.setdefault("volumeMounts", []).append({"name": name, "mountPath": path})


def _finish(
    cluster: Manifest, pod: Manifest, params: dict[str, str], start: str, env: dict[str, str]
) -> None:
    """The command and the variables of the Ray container."""
    container = pod["spec"]["containers"][0]
    limits = container.get("resources", {}).get("limits", {})
    params = {"metrics-export-port": str(METRICS_PORT), "block": "true"} | params
    params |= {"dashboard-agent-listen-port": str(AGENT_PORT)}
    if "cpu" in limits:
        params = {"num-cpus": str(-int(-quantity(limits["cpu"]) // 1))} | params
    if "memory" in limits:
        params = {"memory": str(int(quantity(limits["memory"])))} | params
    for name in sorted(limits):
        if name.endswith("gpu"):
            params = {"num-gpus": str(int(quantity(limits[name])))} | params
    flags = [
        f"--{name}" if value == "true" else f"--{name}={value}"
        for name, value in sorted(params.items())
        if value != "false"
    ]
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n 65536; {start} {' '.join(flags)}"]
    container.setdefault("env", []).extend(_env(cluster, pod, env))


def _env(cluster: Manifest, pod: Manifest, more: dict[str, str]) -> list[dict[str, Any]]:
    metadata = cluster["metadata"]
    values = more | {
        "RAY_CLUSTER_NAME": metadata["name"],
        "RAY_CLUSTER_NAMESPACE": metadata["namespace"],
        "RAY_PORT": str(GCS_PORT),
        "RAY_CLOUD_INSTANCE_ID": pod["metadata"]["name"],
        "RAY_NODE_TYPE_NAME": pod["metadata"]["labels"]["ray.io/group"],
        "RAY_timeout_ms_task_wait_for_death_info": "0",
        "RAY_gcs_server_request_timeout_seconds": "5",
        "RAY_SERVE_KV_TIMEOUT_S": "5",
        "RAY_enable_autoscaler_v2": "1",
    }
    return [{"name": name, "value": value} for name, value in values.items()] + _token(cluster)


def _token(cluster: Manifest) -> list[dict[str, Any]]:
    """What authOptions put into every container of Ray."""
    if cluster["spec"].get("authOptions", {}).get("mode") != "token":
        return []
    reference = {"name": cluster["metadata"]["name"], "key": "auth_token"}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}},
    ]


def _autoscaler(cluster: Manifest, head: Manifest, node: str) -> Manifest:
    options, metadata = cluster["spec"].get("autoscalerOptions", {}), cluster["metadata"]
    env = {
        "RAY_CLUSTER_NAME": metadata["name"],
        "RAY_CLUSTER_NAMESPACE": metadata["namespace"],
        "RAY_HEAD_POD_NAME": head["metadata"]["name"],
        "KUBERAY_CRD_VER": "v1",
        "RAY_enable_autoscaler_v2": "1",
        "KUBERNETES_SERVICE_HOST": node,
        "KUBERNETES_SERVICE_PORT_HTTPS": "6443",
    }
    names = ("--cluster-name", metadata["name"], "--cluster-namespace", metadata["namespace"])
    return {
        "name": "autoscaler",
        "image": options.get("image", head["spec"]["containers"][0]["image"]),
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"ray kuberay-autoscaler {' '.join(names)}"],
        "env": [*({"name": name, "value": own} for name, own in env.items()), *_token(cluster)],
        "resources": options.get("resources", {}),
        "securityContext": options.get("securityContext", {}),
        "volumeMounts": [
            {"name": "ray-logs", "mountPath": "/tmp/ray"},
            {"name": "kube-api-access", "mountPath": _ACCOUNT},
        ],
    }


def _probe(action: Manifest, **times: int) -> Manifest:
    return {**action, **times}


_HEALTH: Manifest = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
_LIVENESS = _probe(
    _HEALTH, initialDelaySeconds=30, timeoutSeconds=5, periodSeconds=5, failureThreshold=120
)
_HEAD_READINESS = _probe(
    _HEALTH, initialDelaySeconds=10, timeoutSeconds=5, periodSeconds=5, failureThreshold=10
)


def _worker_readiness(container: Manifest) -> Manifest:
    ports = {own.get("name"): own["containerPort"] for own in container.get("ports", [])}
    asks = [
        f"wget --tries 1 -T {timeout_s} -q -O- http://localhost:{port}/{path} | grep success"
        for timeout_s, port, path in (
            (5, AGENT_PORT, "api/local_raylet_healthz"),
            (10, ports.get("serve", SERVE_HTTP_PORT), "-/healthz"),
        )
    ]
    command = ["bash", "-c", " && ".join(asks)]
    return _probe(
        {"exec": {"command": command}},
        initialDelaySeconds=10, timeoutSeconds=15, periodSeconds=5, failureThreshold=1,
    )  # fmt: skip
