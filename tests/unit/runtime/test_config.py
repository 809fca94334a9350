"""Configuration: who overrides whom, and errors that name the field and where its value is from."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import PositiveInt, ValidationError

from expertmesh.runtime.config import Settings, load, parse_value, validate
from expertmesh.runtime.errors import ConfigError


class Limits(Settings):
    """Nested twice."""

    rows: PositiveInt = 10
    """Rows."""


class Experts(Settings):
    """Nested."""

    groups: int = 4
    """Groups."""
    device: Literal["auto", "cpu"] = "auto"
    """Device."""
    limits: Limits = Limits()
    """Limits."""


class Mesh(Settings):
    """All."""

    model: str
    """Model."""
    name: str = "default"
    """Name."""
    url: str | None = None
    """URL."""
    experts: Experts = Experts()
    """Experts."""


def write(tmp_path: Path, text: str) -> Path:
    """A configuration file of this text."""
    file = tmp_path / "mesh.yaml"
    file.write_text(text)
    return file


def failure(
    file: Path | None = None, env: dict[str, str] | None = None, **overrides: object
) -> ConfigError:
    """The error that loading ends with; `a__b` stands for the override a.b."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    with pytest.raises(ConfigError) as caught:
        load(Mesh, file, env=env or {}, overrides=dotted)
    return caught.value


def test_without_anything_the_defaults_hold() -> None:
    assert load(Mesh, env={}, overrides={"model": "m"}) == Mesh(model="m")


def test_file_then_variables_then_arguments(tmp_path: Path) -> None:
    file = write(tmp_path, "{model: file, name: file, experts: {groups: 1, limits: {rows: 1}}}")
    env = {"EXPERTMESH_NAME": "env", "EXPERTMESH_EXPERTS__GROUPS": "2", "HOME": "/root"}
    assert load(Mesh, file, env={}) == Mesh(
        model="file", name="file", experts=Experts(groups=1, limits=Limits(rows=1))
    )
    assert load(Mesh, file, env=env) == Mesh(
        model="file", name="env", experts=Experts(groups=2, limits=Limits(rows=1))
    )
    overrides = {"experts.groups": 3, "name": None}
    assert load(Mesh, file, env=env, overrides=overrides) == Mesh(
        model="file", name="env", experts=Experts(groups=3, limits=Limits(rows=1))
    )


def test_two_underscores_go_one_section_deeper() -> None:
    env = {"EXPERTMESH_MODEL": "m", "EXPERTMESH_EXPERTS__LIMITS__ROWS": "7"}
    assert load(Mesh, env=env).experts.limits.rows == 7


@pytest.mark.parametrize(
    ("text", "value"), [("null", None), ("", None), ("redis://h:6379/0", "redis://h:6379/0")]
)
def test_a_variable_is_read_as_yaml(text: str, value: str | None) -> None:
    assert load(Mesh, env={"EXPERTMESH_MODEL": "m", "EXPERTMESH_URL": text}).url == value


def test_a_whole_section_in_one_variable() -> None:
    env = {"EXPERTMESH_MODEL": "m", "EXPERTMESH_EXPERTS": "{groups: 9, device: cpu}"}
    assert load(Mesh, env=env).experts == Experts(groups=9, device="cpu")
    env["EXPERTMESH_EXPERTS__GROUPS"] = "2"
    assert load(Mesh, env=env).experts == Experts(groups=2, device="cpu")


def test_an_empty_file_is_no_configuration(tmp_path: Path) -> None:
    assert load(Mesh, write(tmp_path, "# nothing\n"), env={}, overrides={"model": "m"}).name


def test_what_is_loaded_cannot_be_changed() -> None:
    settings = load(Mesh, env={}, overrides={"model": "m"})
    with pytest.raises(ValidationError, match="frozen"):
        settings.experts.groups = 5


def test_a_typo_in_the_file_is_named_with_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "{model: m, experts: {grops: 1}}")
    error = failure(file)
    assert error.message == f"experts.grops: no such field (from {file})"
    assert error.fields["field"] == "experts.grops"


def test_a_typo_in_a_variable_is_named_with_the_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m")
    for variable, field in {
        "EXPERTMESH_NAEM": "naem",
        "EXPERTMESH_EXPERTS__X": "experts.x",
    }.items():
        error = failure(file, {variable: "1"})
        assert error.message == f"{field}: no such field (from {variable})"


def test_a_typo_in_an_argument_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    error = failure(write(tmp_path, "model: m"), experts__grops=2)
    assert error.message == "experts.grops: no such field (from arguments)"


def test_the_source_is_the_one_that_won(tmp_path: Path) -> None:
    file = write(tmp_path, "{model: m, experts: {groups: 1}}")
    env = {"EXPERTMESH_EXPERTS__GROUPS": "2"}
    assert "(from arguments)" in failure(file, env, experts__groups="many").message
    env["EXPERTMESH_EXPERTS__GROUPS"] = "many"
    assert "(from EXPERTMESH_EXPERTS__GROUPS)" in failure(file, env).message


def test_a_field_inside_a_section_of_one_variable_is_blamed_on_it() -> None:
    env = {"EXPERTMESH_MODEL": "m", "EXPERTMESH_EXPERTS": "{groups: many}"}
    assert "experts.groups: Input should be a valid integer" in failure(env=env).message
    assert "(from EXPERTMESH_EXPERTS)" in failure(env=env).message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{model: 3}", ["model: Input should be a valid string, got 3"]),
        ("{model: m, experts: {groups: x}}", ["experts.groups: ", "valid integer", "got 'x'"]),
        ("{model: m, experts: {device: tpu}}", ["experts.device: ", "'auto' or 'cpu'", "'tpu'"]),
        ("{model: m, experts: {limits: {rows: 0}}}", ["experts.limits.rows: ", "greater than 0"]),
        ("{model: m, experts: 4}", ["experts: ", "got 4"]),
        ("{name: n}", ["model: Field required (from"]),
        ("{name: 1, experts: {groups: x}}", ["name: ", "; experts.groups: "]),
    ],
)
def test_wrong_values_name_field_expectation_and_value(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = write(tmp_path, text)
    message = failure(file).message
    for part in (*parts, str(file)):
        assert part in message


def test_a_missing_field_without_file() -> None:
    assert failure().message == "model: Field required (from defaults and arguments)"


def test_fields_below_a_field_that_has_none() -> None:
    error = failure(env={"EXPERTMESH_MODEL": "m", "EXPERTMESH_MODEL__NAME": "n"})
    assert error.message == "EXPERTMESH_MODEL__NAME: 'model' has no fields of its own"
    error = failure(env={"EXPERTMESH_MODEL": "m"}, model__name=3)
    assert error.message == "argument model.name: 'model' has no fields of its own"


@pytest.mark.parametrize("text", ["[1", "@x", "a: b: c", "2024-13-45", "*x"])
def test_a_variable_that_is_not_yaml_is_named(text: str) -> None:
    error = failure(env={"EXPERTMESH_NAME": text})
    assert error.message.startswith(f"EXPERTMESH_NAME: {text!r} is not YAML: ")
    with pytest.raises(ConfigError, match=r"--set name: .* is not YAML"):
        parse_value(text, "--set name")


@pytest.mark.parametrize("content", [b"a: [1", b"a: 2024-13-45", b"\xff\xfe\x00a", b"a:\t- b\n -"])
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_bytes(content)
    error = failure(file)
    assert error.message.startswith(f"{file}: not YAML: ")
    assert error.fields["file"] == str(file)


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("hello", "str"), ("3", "int")])
def test_a_file_without_fields_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    assert failure(write(tmp_path, text)).message.endswith(f": expected fields, got {kind}")


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    missing = failure(tmp_path / "none.yaml").message
    assert missing == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"
    assert failure(tmp_path).message == f"{tmp_path}: cannot be read: Is a directory"


def test_validate_names_the_field() -> None:
    assert validate(Limits, {"rows": 3}) == Limits(rows=3)
    with pytest.raises(ConfigError, match=r"^rows: .* got -1 \(from defaults and arguments\)$"):
        validate(Limits, {"rows": -1})
