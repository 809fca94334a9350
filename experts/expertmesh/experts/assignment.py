"""Which experts belong to which group, and how that is written in configuration. Pure."""

from collections.abc import Iterable, Mapping

from expertmesh.runtime.errors import ConfigError

_MAX_ID = 65535  # far beyond any model; keeps a typing error from filling the memory


def split_evenly(num_experts: int, num_groups: int, field: str = "experts.groups") -> list[str]:
    """Each group's contiguous range of expert ids; sizes differ by at most one.

    Raises:
        ConfigError: fewer than 1 group, or more groups than experts.
    """
    if not 1 <= num_groups <= num_experts:
        message = f"{field}: expected 1 to {num_experts} (the model's experts), got {num_groups}"
        raise ConfigError(message, field=field, expected=f"1..{num_experts}", got=num_groups)
    bounds = [num_experts * i // num_groups for i in range(num_groups + 1)]
    return [format_ids(range(bounds[i], bounds[i + 1])) for i in range(num_groups)]


def format_ids(ids: Iterable[int]) -> str:
    """Ascending ids as "0-3,7": the inverse of `parse_ids`."""
    runs: list[list[int]] = []
    for number in sorted(set(ids)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_ids(text: str, field: str = "experts") -> tuple[int, ...]:
    """ "0-3,7" -> (0, 1, 2, 3, 7).

    Raises:
        ConfigError: anything else, or an empty list.
    """
    ids: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f'{field}: expected ids like "0-3,7", got {text!r}', field=field)
        start, stop = int(first), int(last or first)
        if stop > _MAX_ID:
            raise ConfigError(f"{field}: ids are at most {_MAX_ID}, got {stop}", field=field)
        if stop < start:
            raise ConfigError(f"{field}: the range {part!r} runs backwards", field=field)
        ids.update(range(start, stop + 1))
    return tuple(sorted(ids))


def experts_by_layer(
    experts: str | Mapping[int, str], layers: Mapping[int, int]
) -> dict[int, tuple[int, ...]]:
    """Expert ids of each layer that a group holds.

    Args:
        experts: ids held in every MoE layer ("0-3,7"), or ids by layer.
        layers: number of experts of each MoE layer of the model.

    Raises:
        ConfigError: a layer or expert the model does not have.
    """
    wanted = dict.fromkeys(layers, experts) if isinstance(experts, str) else experts
    most = max(layers.values(), default=0)
    held = {}
    for layer, text in wanted.items():
        if layer not in layers:
            raise ConfigError(
                f"experts: layer {layer}: MoE layers are {sorted(layers)}", layer=layer
            )
        ids = parse_ids(text, f"experts[{layer}]")
        limit = most if isinstance(experts, str) else layers[layer]
        if ids[-1] >= limit:
            message = f"experts[{layer}]: ids are 0 to {limit - 1}, got {text!r}"
            raise ConfigError(message, layer=layer)
        # layers with fewer experts than others hold what they have of the range
        own = tuple(e for e in ids if e < layers[layer])
        if own:
            held[layer] = own
    return held
