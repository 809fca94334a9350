"""`expertmesh k8s render`: an overlay sized for a model, held to what the committed ones are."""

import shutil
from pathlib import Path

import pytest
import yaml
from tests.checkpoints import tiny_checkpoint
from tests.k8s import mesh_agreement, metric_agreement, policy, schemas
from tests.k8s.capacity_agreement import serve_config
from tests.k8s.rendering import K8S, Manifest, kustomize, named

from expertmesh.runtime.errors import InsufficientMemory
from expertmesh.services.cli import USER_ERROR, main
from expertmesh.services.gpus import parse_gpus
from expertmesh.services.k8s.sizing import GIB, ModelSizes, pools_for

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


@pytest.mark.parametrize("gpus", ["l4x2", "a100-80gx2,l4x6", "tinyx4", "smallx1,tinyx2"])
def test_what_is_written_passes_every_check(
    checkpoint: Path, base: Path, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = render(checkpoint, base, gpus, *TINY)
    for check in (schemas.faults, policy.faults, mesh_agreement.faults, metric_agreement.faults):
        assert check(documents) == []
    said = capsys.readouterr().out
    assert said.startswith("tiny-moe: 8 experts, ")
    assert "kubectl apply --server-side -k" in said


def test_a_model_larger_than_a_gpu_is_cut_into_groups(checkpoint: Path, base: Path) -> None:
    documents = render(checkpoint, base, "smallx1,tinyx2", *TINY)
    apps = serve_config(documents)["applications"]
    held = {app["name"]: app["args"]["experts"] for app in apps}
    assert held == {"small-0": "0-3", "tiny-0": "4-5", "tiny-1": "6-7"}
    ray = named(documents, "RayService", "experts")["spec"]["rayClusterConfig"]
    assert [group["groupName"] for group in ray["workerGroupSpecs"]] == ["small", "tiny"]
    assert [group["minReplicas"] for group in ray["workerGroupSpecs"]] == [1, 2]


def test_rendering_twice_changes_nothing(checkpoint: Path, base: Path) -> None:
    first = render(checkpoint, base, "l4x2")
    assert render(checkpoint, base, "l4x2") == first


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        ("tinyx2", TINY, "--gpus: the model's experts need "),
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


def model(num_experts: int, total_gib: float) -> ModelSizes:
    """One of so many experts, which together have this size."""
    each = int(total_gib * GIB) // num_experts
    return ModelSizes(num_experts, each, 4 * GIB, 98304, 1 << 20, int(total_gib * GIB))


@pytest.mark.parametrize(
    ("total_gib", "gpus", "expected"),
    [
        (54, "l4x4", {"l4": ("", 4, 1)}),
        (54, "l4x9", {"l4": ("", 3, 3)}),
        (54, "a100-80gx2,l4x6", {"a100-80g": ("", 1, 2), "l4": ("", 3, 2)}),
        (54, "a100-80gx1,l4x1", {"a100-80g": ("", 1, 1), "l4": ("0-46", 1, 1)}),
        (90, "a100-80gx1,l4x4", {"a100-80g": ("0-58", 1, 1), "l4": ("59-127", 4, 1)}),
    ],
)
def test_how_experts_are_spread(
    total_gib: float, gpus: str, expected: dict[str, tuple[str, int, int]]
) -> None:
    pools = pools_for(model(128, total_gib), parse_gpus(gpus))
    got = {
        name: (pool.settings.experts, pool.settings.groups, pool.settings.replicas)
        for name, pool in pools.items()
    }
    assert got == expected
    for pool in pools.values():
        assert pool.num_gpus == pool.settings.groups * pool.settings.replicas


def test_too_few_gpus_say_how_few() -> None:
    with pytest.raises(InsufficientMemory, match=r"need 54.00 GiB, these GPUs have 40.23 GiB"):
        pools_for(model(128, 54), parse_gpus("l4x2"))


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
