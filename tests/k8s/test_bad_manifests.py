"""What people get wrong is found before it is applied, by a message that names the field."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tests.k8s import mesh_agreement, metric_agreement, policy, schemas
from tests.k8s.capacity_agreement import serve_config
from tests.k8s.rendering import Manifest, named, rendered

Change = Callable[[list[Manifest]], None]


def all_faults(documents: list[Manifest]) -> list[str]:
    """Of every check."""
    checks = (schemas.faults, policy.faults, mesh_agreement.faults, metric_agreement.faults)
    return [fault for check in checks for fault in check(documents)]


def worker(documents: list[Manifest]) -> dict[str, Any]:
    """The first worker group."""
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    group: dict[str, Any] = ray["workerGroupSpecs"][0]
    return group


def container(documents: list[Manifest], name: str) -> dict[str, Any]:
    """That of a Deployment."""
    spec = named(documents, "Deployment", name)["spec"]["template"]["spec"]
    own: dict[str, Any] = spec["containers"][0]
    return own


def in_serve_config(change: Callable[[dict[str, Any]], None]) -> Change:
    """Changes what is in the string."""

    def apply(documents: list[Manifest]) -> None:
        config = serve_config(documents)
        change(config)
        spec = named(documents, "RayService", "experts")["spec"]
        spec["serveConfigV2"] = yaml.safe_dump(config)

    return apply


def in_mesh(change: Callable[[dict[str, Any]], None]) -> Change:
    """Changes mesh.yaml."""

    def apply(documents: list[Manifest]) -> None:
        data = named(documents, "ConfigMap", "mesh")["data"]
        values = yaml.safe_load(data["mesh.yaml"])
        change(values)
        data["mesh.yaml"] = yaml.safe_dump(values)

    return apply


def wrong_import_path(config: dict[str, Any]) -> None:
    config["applications"][0]["import_path"] = "expertmesh.experts.deployment:buidl"


def no_route(config: dict[str, Any]) -> None:
    config["applications"][0]["route_prefix"] = None


def a_group_less(config: dict[str, Any]) -> None:
    del config["applications"][-1]


def misspelt_argument(config: dict[str, Any]) -> None:
    config["applications"][0]["args"]["num_gpu"] = 1


def too_many_groups(values: dict[str, Any]) -> None:
    values["experts"]["groups"] = 9


def misspelt_setting(values: dict[str, Any]) -> None:
    values["experts"]["thread"] = 2


def other_ports(values: dict[str, Any]) -> None:
    values["experts"]["ports"] = "20000-20031"


def long_drain(values: dict[str, Any]) -> None:
    values["gateway"]["drain_s"] = 600


def eternal_connections(values: dict[str, Any]) -> None:
    del values["router"]["max_connection_age_s"]


def loopback(values: dict[str, Any]) -> None:
    values["router"]["host"] = "127.0.0.1"


def another_redis(values: dict[str, Any]) -> None:
    values["redis"]["url"] = "redis://redis-stat:6379/0"


def telemetry_to_nobody(values: dict[str, Any]) -> None:
    values["otlp_endpoint"] = "http://redis-state:6379"


def wrong_port_name(documents: list[Manifest]) -> None:
    named(documents, "Service", "gateway")["spec"]["ports"][0]["targetPort"] = "grcp"


def missing_secret(documents: list[Manifest]) -> None:
    volumes = worker(documents)["template"]["spec"]["volumes"]
    volumes[0]["secret"]["secretName"] = "redis-stat"


def missing_secret_of_the_head(documents: list[Manifest]) -> None:
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    password = ray["gcsFaultToleranceOptions"]["redisPassword"]
    password["valueFrom"]["secretKeyRef"]["key"] = "pasword"


def missing_claim(documents: list[Manifest]) -> None:
    volumes = worker(documents)["template"]["spec"]["volumes"]
    volumes[1] = {"name": "weights", "persistentVolumeClaim": {"claimName": "weigths"}}


def little_memory(documents: list[Manifest]) -> None:
    resources = worker(documents)["template"]["spec"]["containers"][0]["resources"]
    resources["requests"]["memory"] = resources["limits"]["memory"] = "1Gi"


def little_memory_of_the_gateway(documents: list[Manifest]) -> None:
    resources = container(documents, "gateway")["resources"]
    resources["requests"]["memory"] = resources["limits"]["memory"] = "512Mi"


def little_cpu(documents: list[Manifest]) -> None:
    worker(documents)["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "1"


def misspelt_field(documents: list[Manifest]) -> None:
    group = worker(documents)
    group["maxReplica"] = group.pop("maxReplicas")


def wrong_type(documents: list[Manifest]) -> None:
    worker(documents)["replicas"] = "two"


def service_links(documents: list[Manifest]) -> None:
    del worker(documents)["template"]["spec"]["enableServiceLinks"]


def bare_autoscaler(documents: list[Manifest]) -> None:
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    del ray["autoscalerOptions"]["securityContext"]


def blocking_budget(documents: list[Manifest]) -> None:
    spec = named(documents, "PodDisruptionBudget", "experts")["spec"]
    spec["maxUnavailable"] = spec.pop("minAvailable")


def latest_image(documents: list[Manifest]) -> None:
    container(documents, "router")["image"] = "expertmesh:latest"


def wrong_probe(documents: list[Manifest]) -> None:
    container(documents, "gateway")["readinessProbe"]["grpc"]["service"] = "expertmesh.Gateway"


def liveness_by_readiness(documents: list[Manifest]) -> None:
    del container(documents, "gateway")["livenessProbe"]["grpc"]["service"]


def misspelt_flag(documents: list[Manifest]) -> None:
    container(documents, "router")["args"][1] = "--konfig"


def unknown_variable(documents: list[Manifest]) -> None:
    env = [{"name": "EXPERTMESH_ROUTER__PROT", "value": "1"}]
    container(documents, "router")["env"] = env


def plain_password(documents: list[Manifest]) -> None:
    container(documents, "router")["env"] = [{"name": "REDIS_PASSWORD", "value": "x"}]


def closed_ports(documents: list[Manifest]) -> None:
    policy_ = named(documents, "NetworkPolicy", "ray")
    policy_["spec"]["ingress"][1]["ports"][0]["endPort"] = 20007


def deaf_operator(documents: list[Manifest]) -> None:
    del named(documents, "NetworkPolicy", "ray")["spec"]["ingress"][2]["ports"][0]


def two_owners(documents: list[Manifest]) -> None:
    named(documents, "Deployment", "router")["spec"]["replicas"] = 3


def no_programs_for_ray(documents: list[Manifest]) -> None:
    env = worker(documents)["template"]["spec"]["containers"][0]["env"]
    env.append({"name": "RAY_USAGE_STAT_ENABLED", "value": "0"})


BAD: list[tuple[Change, str]] = [
    (in_serve_config(wrong_import_path), "import_path: no expertmesh.experts.deployment:buidl"),
    (in_serve_config(no_route), "application g0: route_prefix: expected one"),
    (in_serve_config(a_group_less), "applications: experts.groups of mesh.yaml makes 4, got 3"),
    (in_serve_config(misspelt_argument), "application g0: args: num_gpu: no such field"),
    (in_mesh(too_many_groups), "mesh.yaml: experts.groups: expected 1 to 8"),
    (in_mesh(misspelt_setting), "mesh.yaml: experts.thread: no such field"),
    (in_mesh(other_ports), "does not reach ports 20016 to 20031"),
    (in_mesh(long_drain), "terminationGracePeriodSeconds: expected at least 615"),
    (in_mesh(eternal_connections), "router.max_connection_age_s: expected seconds, as clients of"),
    (in_mesh(loopback), "router.host: 127.0.0.1 is not reached from outside"),
    (in_mesh(another_redis), "redis.url: 'redis://redis-stat:6379/0' names no Service"),
    (in_mesh(telemetry_to_nobody), "otlp_endpoint: http://redis-state:6379, but no collector"),
    (wrong_port_name, "spec.ports.grpc.targetPort: Deployment gateway has no port 'grcp'"),
    (missing_secret, "secret.secretName: no Secret 'redis-stat'"),
    (missing_secret_of_the_head, "redisPassword: no Secret 'redis-gcs' with a key 'pasword'"),
    (missing_claim, "persistentVolumeClaim.claimName: no claim 'weigths'"),
    (little_memory, "resources.limits.memory: expected at least 2Gi for 4 replicas in 2 Pods"),
    (
        little_memory_of_the_gateway,
        "container gateway: resources.limits.memory: expected at least 1 GiB: process 500.00 MiB",
    ),
    (little_cpu, "workerGroupSpecs[0]: cpu: its replicas reserve 4, its Pods have 2"),
    (misspelt_field, "spec.rayClusterConfig.workerGroupSpecs[0]: Additional properties"),
    (wrong_type, "workerGroupSpecs[0].replicas: 'two' is not of type 'integer'"),
    (service_links, "enableServiceLinks: expected false"),
    (bare_autoscaler, "container autoscaler: securityContext.allowPrivilegeEscalation"),
    (blocking_budget, "PodDisruptionBudget experts: spec.minAvailable: expected a number"),
    (latest_image, "image: expected a version or digest, got 'expertmesh:latest'"),
    (wrong_probe, "readinessProbe.grpc.service: expected 'expertmesh.v1.GenerateService'"),
    (liveness_by_readiness, "livenessProbe.grpc.service: expected 'liveness', got None"),
    (misspelt_flag, "container router: args: expertmesh: error: unrecognized arguments"),
    (unknown_variable, "env EXPERTMESH_ROUTER__PROT: no such setting"),
    (plain_password, "env REDIS_PASSWORD: a secret in plain text"),
    (closed_ports, "NetworkPolicy ray: the gateway does not reach ports 20008 to 20015"),
    (deaf_operator, "NetworkPolicy ray: KubeRay does not reach ports {8265} of the head"),
    (two_owners, "spec.replicas: expected one owner of it, got 1 autoscalers and a number"),
    (no_programs_for_ray, "env RAY_USAGE_STAT_ENABLED: Ray knows no such variable"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_manifest_is_found(change: Change, message: str) -> None:
    documents = rendered("base")
    change(documents)
    faults = all_faults(documents)
    assert any(message in fault for fault in faults), "\n".join(faults) or "nothing was found"


def test_a_metric_that_is_not_there() -> None:
    documents = rendered("monitoring")
    [group] = named(documents, "PrometheusRule", "expertmesh")["spec"]["groups"]
    group["rules"][0]["expr"] = 'sum(expertmesh_error_total{stage="gateway"})'
    group["rules"][1]["expr"] = 'sum(expertmesh_errors_total{stage="dense", kod="x"})'
    group["rules"][2]["expr"] = "min(ray_serve_deployment_replica_healty)"
    faults = metric_agreement.faults(documents)
    assert [fault.partition(": ")[2] for fault in faults] == [
        "ExpertmeshErrors: there is no metric expertmesh_error_total",
        "ExpertmeshExpertUnavailable: expertmesh_errors_total: no stage 'dense'",
        "ExpertmeshExpertUnavailable: expertmesh_errors_total has no label kod",
        "ExpertmeshQueueFull: Ray has no metric ray_serve_deployment_replica_healty",
    ]


def test_a_port_nobody_has() -> None:
    documents = rendered("monitoring")
    monitor = named(documents, "PodMonitor", "ray-workers")
    monitor["spec"]["podMetricsEndpoints"][0] |= {"port": "metric", "path": "/metric"}
    assert metric_agreement.faults(documents) == [
        "PodMonitor ray-workers: path: expected /metrics, got '/metric'",
        "PodMonitor ray-workers: port: no Pod has 'metric'",
    ]


def test_a_field_that_an_operator_does_not_have() -> None:
    documents = rendered("keda")
    spec = named(documents, "ScaledObject", "router")["spec"]
    spec["minReplicasCount"] = spec.pop("minReplicaCount")
    [fault] = schemas.faults(documents)
    assert fault.startswith("ScaledObject router: spec: Additional properties are not allowed")
    assert "'minReplicasCount' was unexpected" in fault
