"""One YAML file plus EXPERTMESH_* variables become a frozen, validated model, or a ConfigError."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from expertmesh.runtime.errors import ConfigError

ENV_PREFIX = "EXPERTMESH_"
NESTING = "__"
_SECRETS = {"password", "sha256", "token", "url", "redis_url"}
"""Fields whose values no message repeats: somebody may have put a secret there."""


class Settings(BaseModel):
    """Base of all configuration: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # pydantic's own text, which others may log
    )


S = TypeVar("S", bound=BaseModel)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", file=path) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or 2024-13-45
        raise ConfigError(f"{path}: not YAML: {_one_line(error)}", file=path) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected fields, got {type(content).__name__}", file=path)
    return content


def parse_value(text: str, source: str) -> Any:
    """The value that `text` is in YAML, or a ConfigError naming the variable or flag it is from."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 is no date
        message = f"{source}: {text!r} is not YAML: {_one_line(error)}"
        raise ConfigError(message, source=source) from error


def _place(values: dict[str, Any], field: str, value: Any, source: str) -> None:
    *sections, last = field.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{source}: {section!r} has no fields of its own", field=section)
        values = inner
    values[last] = value


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "configuration"


def _source(field: str, sources: Mapping[str, str], file: Path | None) -> str:
    """Where the field, or the section it was given in, came from last."""
    parts = field.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((sources[n] for n in names if n in sources), str(file or "defaults and arguments"))


def _got(problem: Any) -> str:
    """What came, unless it may be, or hold, a secret."""
    is_plain = isinstance(problem["input"], str | int | float | None)
    is_secret = bool(_SECRETS.intersection(problem["loc"]))
    return f", got {problem['input']!r}" if is_plain and not is_secret else ""


def _explain(error: ValidationError, sources: Mapping[str, str], file: Path | None) -> ConfigError:
    lines = []
    for problem in error.errors():
        field = _dotted(problem["loc"])
        source = _source(field, sources, file)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{field}: no such field (from {source})")
        else:
            lines.append(f"{field}: {problem['msg']}{_got(problem)} (from {source})")
    return ConfigError("; ".join(lines), field=_dotted(error.errors()[0]["loc"]))


def load(
    model: type[S],
    file: Path | None = None,
    *,
    env: Mapping[str, str],
    overrides: Mapping[str, Any] | None = None,
) -> S:
    """Defaults, then `file`, then variables (`EXPERTMESH_ROUTER__PORT=1`), then `overrides`.

    Args:
        overrides: dotted names ("router.port") to values, from the command line; None is skipped.

    Raises:
        ConfigError: names each wrong field, what was expected, what came, and from where.
    """
    values = _read_yaml(file) if file else {}
    sources: dict[str, str] = {}
    for variable in sorted(env):
        if variable.startswith(ENV_PREFIX):
            field = variable.removeprefix(ENV_PREFIX).lower().replace(NESTING, ".")
            # a password is text, whatever YAML would make of it
            is_text = field.rpartition(".")[2] == "password"
            text = env[variable]
            _place(values, field, text if is_text else parse_value(text, variable), variable)
            sources[field] = variable
    for field, value in (overrides or {}).items():
        if value is not None:
            _place(values, field, value, f"argument {field}")
            sources[field] = "arguments"
    return validate(model, values, sources=sources, file=file)


def validate(
    model: type[S],
    values: Mapping[str, Any],
    *,
    sources: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> S:
    """`values` as a `model`, or a ConfigError naming the fields.

    Args:
        sources: dotted name -> where its value is from, if not from `file`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(error, sources or {}, file) from error
