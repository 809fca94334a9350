"""One schema for the whole mesh: partial sections, every field explained, wrong values named."""

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from expertmesh.runtime.config import load
from expertmesh.runtime.errors import ConfigError
from expertmesh.services.settings import MeshSettings

MODEL = {"EXPERTMESH_MODEL": "m"}


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and all models inside it."""
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_a_model_is_enough() -> None:
    settings = load(MeshSettings, env=MODEL)
    assert (settings.router.port, settings.gateway.port) == (50051, 50052)
    assert settings.redis.url is None
    assert settings.experts.limits.max_wait_s == 0.0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ROUTER__CALL_TIMEOUT_S", "3.5"),
        ("GATEWAY__ENGINE", "exact"),
        ("REDIS__URL", "redis://h:6379/0"),
        ("EXPERTS__LIMITS__MAX_WAIT_S", "0.001"),
    ],
)
def test_one_field_of_a_section_leaves_the_others_at_their_defaults(name: str, text: str) -> None:
    settings = load(MeshSettings, env={**MODEL, f"EXPERTMESH_{name}": text})
    defaults = load(MeshSettings, env=MODEL)
    *path, field = name.lower().split("__")
    for section in path:
        settings, defaults = getattr(settings, section), getattr(defaults, section)
    assert str(getattr(settings, field)) == text
    assert settings.model_copy(update={field: getattr(defaults, field)}) == defaults


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("MODEL", "''", "model: .* at least 1 character"),
        ("MESH", "a:b", "mesh: .* match pattern"),
        ("DTYPE", "float64", "dtype: .* 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("LOG_LEVEL", "loud", "log_level: "),
        ("MAX_MESSAGE_BYTES", "0", "max_message_bytes: .* greater than or equal to 1"),
        ("EXPERTS__GROUPS", "two", "experts.groups: .* valid integer"),
        ("EXPERTS__REPLICAS", "0", "experts.replicas: .* greater than 0"),
        ("EXPERTS__LEASE_S", "0", "experts.lease_s: .* greater than or equal to 1"),
        ("EXPERTS__LIMITS__MAX_QUEUE_ROWS", "0", "experts.limits.max_queue_rows: "),
        ("EXPERTS__SCALING__MODE", "auto", "experts.scaling.mode: .* 'off', 'advisory' or 'on'"),
        ("ROUTER__PORT", "65536", "router.port: .* less than or equal to 65535"),
        ("GATEWAY__PORT", "-1", "gateway.port: .* greater than or equal to 0"),
        ("GATEWAY__ENGINE", "fast", "gateway.engine: "),
        ("GATEWAY__PROT", "1", "gateway.prot: no such field"),
    ],
)
def test_a_wrong_field_is_named_with_its_variable(name: str, text: str, message: str) -> None:
    variable = f"EXPERTMESH_{name}"
    with pytest.raises(ConfigError, match=rf"^{message}.*\(from {variable}\)$"):
        load(MeshSettings, env={**MODEL, variable: text})


def test_every_field_says_what_it_does() -> None:
    leaves = [
        (section.__name__, name, field.description)
        for section in sections(MeshSettings)
        for name, field in section.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]
    assert len(leaves) > 30
    assert [leaf for leaf in leaves if not leaf[2]] == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("min_replicas", 5, "min_replicas 5 is above max_replicas 4; raise the one"),
        ("min_replicas", 0, "no other group could serve the experts of a group without replicas"),
        ("sample_s", 5, "sample_s must be at most up_window_s, 2 s"),
    ],
)
def test_scaling_that_contradicts_itself_is_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^experts\.scaling: .*{message}"):
        load(MeshSettings, env=MODEL, overrides={f"experts.scaling.{field}": value})
