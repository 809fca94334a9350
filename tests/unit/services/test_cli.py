"""The command line: instant help, settings from flags, and errors of one line with exit code 2."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.cli import COMMANDS, INTERRUPTED, USER_ERROR, main, parser
from expertmesh.services.commands import demo, generate
from expertmesh.services.commands.common import settings_from

HEAVY = ("torch", "transformers", "ray", "redis", "numpy")


def imported(module: str) -> set[str]:
    """Which of HEAVY a fresh process has loaded after importing `module`."""
    code = f"import sys, {module}; print(*(set({HEAVY}) & set(sys.modules)))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["expertmesh.services.cli", "expertmesh.client"])
def test_what_everyone_imports_is_light(module: str) -> None:
    assert imported(module) == set()


def test_building_applications_needs_no_torch() -> None:
    loaded = imported("expertmesh.services.serve_config")  # with both deployment modules
    assert loaded.isdisjoint({"torch", "transformers", "redis"})
    assert "ray" in loaded


def test_the_controller_is_light() -> None:
    loaded = imported("expertmesh.services.controller.process")
    assert loaded == {"redis"}


def test_help_of_the_installed_program() -> None:
    command = [sys.executable, "-m", "expertmesh.services.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("serve", "demo", "generate", "inspect", "status", "parity", "router"):
        assert f"\n    {name} " in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", [module.__name__.rpartition(".")[2] for module in COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main([command, "--help"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: expertmesh {command} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == version("expertmesh")


@pytest.mark.parametrize("argv", [[], ["dance"], ["serve", "--groups", "two"], ["generate"]])
def test_a_wrong_command_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(argv)
    assert ending.value.code == USER_ERROR
    assert "usage: expertmesh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve"], "model: Field required (from defaults and arguments)"),
        (
            ["serve", "m", "--set", "experts.grops=1"],
            "experts.grops: no such field (from arguments",
        ),
        (["serve", "m", "--set", "experts.groups"], "--set experts.groups: expected NAME=VALUE"),
        (["serve", "m", "--set", "mesh=[a"], "--set mesh: '[a' is not YAML"),
        (["serve", "m", "--config", "none.yaml"], "--config none.yaml: no such file"),
        (["serve", "/nowhere"], "/nowhere: "),
        (["inspect", "/nowhere"], "/nowhere: "),
        (["router", "--set", "model=m"], "redis.url: a router of its own needs a Redis"),
        (["gateway", "--set", "model=m"], "redis.url: a gateway of its own needs a Redis"),
        (
            ["k8s", "serve-config", "--num-experts", "8", "--set", "model=m"],
            "redis.url: replicas in a cluster need a Redis",
        ),
        (
            [
                *("k8s", "serve-config", "--num-experts", "2"),
                *("--set", "redis.url=redis://h:1", "--set", "model=m"),
            ],
            "experts.groups: expected 1 to 2",
        ),
        (["k8s", "drain", "--ports", "1-2"], "--address: expected Ray's head, host:port"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == USER_ERROR
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_an_interrupt_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupted)
    assert main(["generate", "hello"]) == INTERRUPTED
    assert capsys.readouterr().err == ""


def test_flags_override_variables_override_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("{mesh: file, experts: {groups: 1, threads: 1, replicas: 5}}")
    monkeypatch.setenv("EXPERTMESH_EXPERTS__GROUPS", "2")
    monkeypatch.setenv("EXPERTMESH_EXPERTS__THREADS", "2")
    flags = ["--config", str(file), "--groups", "3", "--set", "log_level=DEBUG"]
    args = parser().parse_args(["serve", "dir", *flags, "--set", "redis.url=redis://h:1/0"])
    settings = settings_from(args, model=args.model_dir)
    experts = settings.experts
    assert (experts.groups, experts.threads, experts.replicas) == (3, 2, 5)
    assert (settings.model, settings.mesh, settings.log_level) == ("dir", "file", "DEBUG")
    assert settings.redis.url == "redis://h:1/0"


def test_the_model_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("model: from-file")
    args = parser().parse_args(["serve", "--config", str(file)])
    assert settings_from(args, model=args.model_dir).model == "from-file"


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("model: m")
    args = parser().parse_args(["serve", "--config", str(file), "--set", "router.port=high"])
    with pytest.raises(ConfigError, match=r"^router.port: .* got 'high' \(from arguments\)$"):
        settings_from(args)


def test_the_demo_needs_no_arguments() -> None:
    args = parser().parse_args(["demo"])
    assert (args.model_dir, args.keep) == (demo.DEFAULT_MODEL, False)
    assert settings_from(args, model=args.model_dir).experts.groups == 4
