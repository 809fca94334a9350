"""`expertmesh k8s render`: an overlay sized for a model, held to what the committed ones are."""

import shutil
from pathlib import Path

import pytest
import yaml
from tests.checkpoints import tiny_checkpoint
from tests.k8s import mesh_agreement, metric_agreement, policy, schemas
from tests.k8s.capacity_agreement import of_checkpoint, serve_config
from tests.k8s.rendering import K8S, Manifest, kustomize, named

from expertmesh.experts.assignment import parse_ids
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import ConfigError, InsufficientMemory
from expertmesh.services.cli import USER_ERROR, main
from expertmesh.services.gpus import parse_gpus
from expertmesh.services.k8s.placing import place
from expertmesh.services.k8s.pools import GpuPool, pools_of
from expertmesh.services.k8s.sizing import GIB, ModelSizes, gateway_need, router_need
from expertmesh.services.planning.paper import Model
from expertmesh.services.ray_service import plan_for
from expertmesh.services.settings import MeshSettings

TINY = ["--gpu", "tiny=0.0004,1,1", "--gpu", "small=0.0008,1,1"]
"""GPUs for whose memory the tiny checkpoint, 1.1 MiB of experts, is large."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("models") / "tiny-moe")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of k8s/, as overlays refer to it by relative paths."""
    shutil.copytree(K8S, tmp_path / "k8s")
    return tmp_path / "k8s" / "base"


def render(checkpoint: Path, base: Path, gpus: str, *flags: str) -> list[Manifest]:
    """What kubectl makes of the overlay."""
    args = ["k8s", "render", str(checkpoint), "--gpus", gpus, "--base", str(base), *flags]
    assert main(args) == 0
    return kustomize(base.parent / "overlays" / checkpoint.name)


@pytest.mark.parametrize("gpus", ["l4x2", "a100x2,l4x6", "tinyx4", "smallx1,tinyx2"])
def test_what_is_written_passes_every_check(
    checkpoint: Path, base: Path, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = render(checkpoint, base, gpus, *TINY)
    for check in (schemas.faults, policy.faults, mesh_agreement.faults, metric_agreement.faults):
        assert check(documents) == []
    said = capsys.readouterr().out
    assert said.startswith("tiny-moe: 2 layers of 8 experts, on ")
    assert "kubectl apply --server-side -k" in said


def test_less_than_the_planner_needs_is_found(checkpoint: Path, base: Path) -> None:
    documents = render(checkpoint, base, "l4x2")
    settings = mesh_agreement.settings_of(documents)
    assert list(of_checkpoint(documents, settings, str(checkpoint))) == []
    claim = named(documents, "PersistentVolumeClaim", "weights")["spec"]["resources"]
    claim["requests"]["storage"] = "1Mi"
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    [worker] = ray["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    worker["resources"]["limits"]["memory"] = "4Gi"
    [storage] = of_checkpoint(documents, settings, str(checkpoint))
    assert " weights: spec.resources.requests.storage: expected at least 1 GiB: " in storage
    faults = mesh_agreement.faults(documents)
    assert any("resources.limits.memory: expected at least 6Gi" in fault for fault in faults)


def held_by(documents: list[Manifest]) -> dict[str, set[int]]:
    """Group -> experts it holds in every layer."""
    apps = serve_config(documents)["applications"]
    return {app["name"]: set(parse_ids(app["args"]["experts"])) for app in apps}


def test_a_model_larger_than_a_gpu_is_cut_into_groups(checkpoint: Path, base: Path) -> None:
    documents = render(checkpoint, base, "smallx1,tinyx2", *TINY)
    held = held_by(documents)
    assert list(held) == ["small-0", "tiny-0", "tiny-1"]
    assert set().union(*held.values()) == set(range(8))
    assert max(map(len, held.values())) < 8
    assert len(held["small-0"]) > len(held["tiny-0"])
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    assert [group["groupName"] for group in ray["workerGroupSpecs"]] == ["small", "tiny"]
    assert [group["minReplicas"] for group in ray["workerGroupSpecs"]] == [1, 2]


def test_popular_experts_get_the_copies_that_there_is_room_for(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    rows = [
        f"{layer},{expert},{90 if expert == 5 else 1}" for layer in (0, 1) for expert in range(8)
    ]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["layer,expert,rows", *rows]))
    documents = render(checkpoint, base, "tinyx5", *TINY, "--popularity", str(file))
    assert mesh_agreement.faults(documents) == []
    holders = [0] * 8
    for app in serve_config(documents)["applications"]:
        experts = app["args"]["experts"]
        for expert in parse_ids(experts if isinstance(experts, str) else experts["0"]):
            holders[expert] += 1
    assert max(holders) == holders[5] > min(holders)


def test_the_numbers_are_explained(
    checkpoint: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = render(checkpoint, base, "smallx1,tinyx2", *TINY)
    said = capsys.readouterr().out
    assert "  small: 1 groups x 1 replicas, a GPU each: at most " in said
    assert "of experts in 703.12 KiB; " in said
    claim = named(documents, "PersistentVolumeClaim", "weights")["spec"]["resources"]["requests"]
    assert claim["storage"] == "1Gi"
    assert "  volume: 1 GiB: checkpoint " in said
    deployment = named(documents, "Deployment", "gateway")["spec"]["template"]["spec"]
    assert deployment["containers"][0]["resources"]["limits"]["memory"] == "1Gi"
    assert "  gateway: 1 GiB: process 500.00 MiB + dense part " in said


def test_rendering_twice_changes_nothing(checkpoint: Path, base: Path) -> None:
    first = render(checkpoint, base, "l4x2")
    assert render(checkpoint, base, "l4x2") == first


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        ("tinyx2", TINY, " bytes are missing. Use more GPUs, larger ones, or a smaller dtype."),
        ("l4x2", ["--popularity", "nowhere.csv"], "nowhere.csv: cannot be read"),
        ("l5x2", [], "gpus: expected one of t4, v100"),
        ("l4x2", ["--base", "nowhere"], "--base: expected k8s/base of a checkout"),
    ],
)
def test_what_cannot_be_rendered_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    gpus: str,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    base = ["--base", str(K8S / "base"), *flags]
    args = ["k8s", "render", str(checkpoint), "--gpus", gpus, "--out", str(out), *base]
    assert main(args) == USER_ERROR
    assert message in capsys.readouterr().err
    assert not out.exists()


LAYERS = 4


def model(num_experts: int, total_gib: float) -> Model:
    """One of so many experts in each of four layers, which together have this size."""
    each = int(total_gib * GIB) // num_experts // LAYERS
    layers = range(LAYERS)
    return Model(
        dict.fromkeys(layers, each),
        dict.fromkeys(layers, each // 2),
        dict.fromkeys(layers, num_experts),
        8,
    )


def pools(total_gib: float, gpus: str) -> dict[str, GpuPool]:
    """Of a model with 128 experts in each layer."""
    held, _ = place(model(128, total_gib), parse_gpus(gpus), None, 256)
    return pools_of(held, LAYERS)


@pytest.mark.parametrize(
    ("total_gib", "gpus", "expected"),
    [
        (18, "l4x4", {"l4": (1, 4)}),
        (54, "l4x4", {"l4": (4, 1)}),
        (54, "a100-80gx2,l4x6", {"a100-80g": (1, 2), "l4": (6, 1)}),
        (54, "a100x2,l4x6", {"a100": (2, 1), "l4": (6, 1)}),
        (90, "a100-80gx1,l4x4", {"a100-80g": (1, 1), "l4": (4, 1)}),
    ],
)
def test_how_experts_are_spread(
    total_gib: float, gpus: str, expected: dict[str, tuple[int, int]]
) -> None:
    found = pools(total_gib, gpus)
    got = {name: (pool.settings.groups, pool.settings.replicas) for name, pool in found.items()}
    assert got == expected
    held: set[int] = set()
    for pool in found.values():
        assert pool.num_gpus == pool.settings.groups * pool.settings.replicas
        assert pool.expert_bytes <= pool.usable_bytes
        for share in pool.settings.shares:
            assert isinstance(share, str)  # layers are alike
            held |= set(parse_ids(share))
    assert held == set(range(128))


def test_memory_left_free_gets_second_copies() -> None:
    """The plan alone gives this A100 35 of the 67 GiB it has."""
    [share] = pools(54, "a100-80gx1,l4x4")["a100-80g"].settings.shares
    assert share == "0-127"


def test_layers_are_planned_apart_where_whole_experts_do_not_fit() -> None:
    """8 experts of 4 layers: a GPU has room for five quarters of them, so 7 GPUs suffice."""
    each = int(24e9 * 0.9) // 5
    own = Model(
        dict.fromkeys(range(4), each), dict.fromkeys(range(4), 1), dict.fromkeys(range(4), 8), 2
    )
    held, _ = place(own, parse_gpus("l4x7"), None, 256)
    holders = {layer: set[int]() for layer in range(4)}
    for gpu in held:
        assert gpu.expert_bytes <= gpu.usable_bytes
        for layer, ids in gpu.experts.items():
            holders[layer] |= set(parse_ids(ids))
    assert all(own == set(range(8)) for own in holders.values())


def test_too_few_gpus_say_how_many_bytes_are_missing() -> None:
    with pytest.raises(
        InsufficientMemory,
        match=r"need 54.00 GiB and there are 40.23 GiB .*: \d{11} bytes are missing",
    ) as raised:
        pools(54, "l4x2")
    fields = raised.value.fields
    assert int(fields["missing_bytes"]) == int(fields["needed_bytes"]) - int(fields["free_bytes"])


def test_pods_need_what_they_are_said_to() -> None:
    sizes = ModelSizes(3 * GIB, 98304, 48 << 20, 57 * GIB)
    assert str(gateway_need(sizes, 16384)) == (
        "7 GiB: process 500.00 MiB + dense part 3.00 GiB + 16384 cached tokens 1.50 GiB, "
        "and a quarter"
    )
    assert router_need(sizes).num_bytes == GIB


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"shares": ["0-3"]}, r"experts.pools.a.shares: expected one for each of the 2 groups"),
        ({"shares": ["0-3", "4-7"], "experts": "0-7"}, r"experts.pools.a.experts: expected none"),
        ({"shares": ["0-3", "4-8"]}, r"experts.pools.a.shares: expected ids 0 to 7"),
        ({"shares": ["0-3", "5-7"]}, r"experts.pools: .* got 4 in none"),
        ({"shares": ["0-3", {0: "4-7", 1: "4-6"}]}, r"experts.pools: .* got 7 of layer 1 in none"),
        ({"shares": ["0-7", {9: "0"}]}, r"layer 9: MoE layers are \[0, 1\]"),
    ],
)
def test_shares_that_do_not_fit_the_model(
    checkpoint: Path, pool: dict[str, object], message: str
) -> None:
    values = {"model": "/models/tiny", "experts": {"pools": {"a": {"groups": 2, **pool}}}}
    with pytest.raises(ConfigError, match=message):
        plan_for(validate(MeshSettings, values), str(checkpoint))


def test_names_of_known_gpus_have_products() -> None:
    from expertmesh.services.gpus import GPUS
    from expertmesh.services.k8s.products import PRODUCTS

    assert PRODUCTS.keys() == GPUS.keys()


def test_committed_overlays_are_what_render_writes() -> None:
    """Their checkpoint is not here; but what does not depend on it is the same."""
    for name in ("gpu", "mixed-gpu"):
        folder = K8S / "overlays" / name
        assert {path.name for path in folder.iterdir()} == {
            "kustomization.yaml", "mesh.yaml", "serve.yaml", "sizes.yaml", "weights.yaml",
            "worker-groups.yaml",
        }  # fmt: skip
        groups = yaml.safe_load((folder / "worker-groups.yaml").read_text("utf-8"))
        assert groups["metadata"] == {"name": "experts"}
