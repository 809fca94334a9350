"""Small scenarios for tests of the simulator."""

from pathlib import Path
from typing import Any

from expertmesh.services.simulator.scenario import Scenario

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
SMALL: dict[str, Any] = {
    "trace": {"file": "trace.csv"},
    "model": {"layers": 2, "experts": 4, "top_k": 2, "hidden_size": 1024, "ffn_size": 4096},
    "mesh": {"groups": 2, "gateways": 2, "gpus": "l4"},
    "scaling": {"policy": "static", "replicas": [2]},
}


def write_trace(folder: Path, requests: list[tuple[float, int, int]]) -> None:
    """trace.csv with requests at so many seconds after noon, their prompt and answer tokens."""
    lines = []
    for at_s, context, generated in requests:
        minutes, seconds = divmod(at_s, 60)
        lines.append(f"2024-01-01 12:{minutes:02.0f}:{seconds:010.7f},{context},{generated}\n")
    (folder / "trace.csv").write_text(HEAD + "".join(lines), "utf-8")


def scenario(**changes: dict[str, Any]) -> Scenario:
    """SMALL, with other fields in some sections."""
    values = {**SMALL}
    for section, fields in changes.items():
        own = values.get(section, {})
        values[section] = {**own, **fields} if isinstance(fields, dict) else fields
    return Scenario.model_validate(values)
