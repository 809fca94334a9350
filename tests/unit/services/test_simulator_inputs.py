"""What a simulation reads, and what it says of files that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.services.simulator_worlds import HEAD, scenario, write_trace

from expertmesh.runtime.errors import ConfigError, InsufficientMemory, InvalidInput
from expertmesh.services import cli
from expertmesh.services.simulator.arrivals import Arrivals, parse_trace, read_trace, repeated
from expertmesh.services.simulator.popularity import make_popularity, read_counts
from expertmesh.services.simulator.scenario import ModelSettings, PopularitySettings
from expertmesh.services.simulator.world import build_world

EXAMPLE = Path(__file__).parents[3] / "examples/simulate/scenario.yaml"
MODEL = ModelSettings(layers=3, experts=4, top_k=2)


def trace(*lines: str) -> Arrivals:
    """A trace of these lines."""
    return parse_trace([HEAD.strip(), *lines], "t.csv")


def test_a_trace_in_the_format_of_azure_is_read() -> None:
    own = trace("2023-11-16 18:17:03.9799600,4808,10", "", "2023-11-16 18:17:04.4799600,3180,8")
    assert own.times_s.tolist() == pytest.approx([0.0, 0.5])
    assert own.context.tolist() == [4808, 3180]
    assert own.generated.tolist() == [10, 8]
    assert own.tokens == 4808 + 9 + 3180 + 7


def test_bad_rows_are_listed_with_their_lines() -> None:
    good = "2023-11-16 18:17:04,1,1"
    with pytest.raises(InvalidInput) as caught:
        trace(
            good,
            "yesterday,1,1",
            "2023-11-16 18:17:05,0,1",
            "2023-11-16 18:17:05,1",
            good,
            "2023-11-16 18:17:03,1,1",
            "2023-11-16 18:17:06,1,x",
            "2023-11-16 18:17:06,1,-1",
        )
    message = caught.value.message
    assert "t.csv: line 3: TIMESTAMP 'yesterday'" in message
    assert "line 4: ContextTokens '0' is not a number from 1" in message
    assert "line 5: 2 cells instead of 3" in message
    assert "line 7: TIMESTAMP '2023-11-16 18:17:03' is before that of the row above" in message
    assert "line 8: GeneratedTokens 'x'" in message
    assert "and 1 more" in message


def test_other_columns_no_rows_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="columns TIMESTAMP,ContextTokens,GeneratedTokens"):
        parse_trace(["time,tokens"], "t.csv")
    with pytest.raises(InvalidInput, match="at least one request"):
        trace()
    with pytest.raises(InvalidInput, match="a CSV file"):
        read_trace(tmp_path / "none.csv")


def test_a_trace_is_made_denser_and_longer_and_keeps_its_bursts() -> None:
    own = trace(*(f"2023-11-16 18:17:{second:02},10,1" for second in (0, 1, 1, 9)))
    random = np.random.default_rng(0)
    more = repeated(own, 3, 0.5, 17.9, 0.0, random)
    assert len(more) == 21
    assert more.duration_s == 17.9
    assert (np.diff(more.times_s) >= 0).all()
    in_seconds = np.bincount(more.times_s.astype(int), minlength=19)
    assert in_seconds[1] == in_seconds[10] == 6
    night = repeated(own, 1, 0.0, 86400.0, 1.0, random)
    by_hour = np.bincount((night.times_s // 3600).astype(int), minlength=24)
    assert by_hour[12] > 10 * by_hour[0]


def popularity(**fields: Any) -> Any:
    """What these settings make, for MODEL and ten seconds."""
    settings = PopularitySettings.model_validate(fields)
    return make_popularity(settings, MODEL, 10.0, np.random.default_rng(1), Path())


@pytest.mark.parametrize("kind", ["uniform", "zipf", "lognormal"])
def test_a_popularity_is_shares_and_no_expert_gets_more_than_every_token(kind: str) -> None:
    shares_LE = popularity(kind=kind, exponent=5.0, sigma=3.0).shares_LE(0)
    assert shares_LE.shape == (3, 4)
    assert shares_LE.sum(1) == pytest.approx(1)
    assert shares_LE.max() <= 0.5 + 1e-6


def test_drift_moves_some_experts_from_phase_to_phase() -> None:
    own = popularity(kind="zipf", drift_s=2.0, drift_frac=0.5, layers="alike")
    assert [own.phase(at_s) for at_s in (0.0, 1.9, 2.0, 9.0)] == [0, 0, 1, 4]
    before, after = own.shares_LE(0), own.shares_LE(1)
    assert (before != after).any(1).all()
    assert np.sort(before[0]) == pytest.approx(np.sort(after[0]))
    assert (after == after[0]).all()


def write_counts(path: Path, counts: list[list[int]]) -> Path:
    path.write_text(json.dumps({"subjects": {"law": {"expert_popularity": counts}}}), "utf-8")
    return path


def test_counts_of_other_layers_or_experts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    [shares_LE] = read_counts(write_counts(path, [[1, 1, 1, 3]] * 3), MODEL)
    assert shares_LE[0].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    with pytest.raises(InvalidInput, match=r"law: expected 3 layers of 4 experts.*got 2 x 4"):
        read_counts(write_counts(path, [[1, 1, 1, 1]] * 2), MODEL)
    with pytest.raises(InvalidInput, match="layer 1"):
        read_counts(write_counts(path, [[1] * 4, [0] * 4, [1] * 4]), MODEL)
    with pytest.raises(InvalidInput, match="layer 2"):
        read_counts(write_counts(path, [[1] * 4, [1] * 4, [1, 1, -1, 1]]), MODEL)
    path.write_text('{"subjects": {}}', "utf-8")
    with pytest.raises(InvalidInput, match="no subjects"):
        read_counts(path, MODEL)
    path.write_text("[]", "utf-8")
    with pytest.raises(InvalidInput, match="JSON with subjects"):
        read_counts(path, MODEL)


def test_unknown_and_too_small_gpus_are_refused(tmp_path: Path) -> None:
    write_trace(tmp_path, [(0.0, 1, 1)])
    with pytest.raises(ConfigError, match=r"l4.*got 'l5'"):
        build_world(scenario(mesh={"gpus": "l5"}), tmp_path)
    large = {"hidden_size": 16384, "ffn_size": 65536}
    with pytest.raises(InsufficientMemory, match=r"l4 has 24 GB; .* GB are missing"):
        build_world(scenario(model=large), tmp_path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("scaling.rule.min_replicas=9", "min_replicas 9 is above max_replicas 8"),
        ("scaling.replicas=[9]", "scaling.replicas 9 is not within min_replicas 2"),
        ("scaling.replicas=[1,2]", "scaling.replicas must be one number or 4"),
        ("mesh.groups=9", "mesh.groups must be at most model.experts, 8"),
        ("mesh.gpus=h900", "expected one of"),
        ("mesh.gateways=0", 'mesh.gateways 0 needs sampling.engine "calls"'),
        ("model.top_k=9", "top_k must be at most experts, 8"),
        ("trace.speed=2", "trace.speed: no such field"),
        ("trace.file=nowhere.csv", "trace.file: expected a CSV file"),
        ("popularity.kind=counts", 'kind "counts" needs a file'),
        ("faults=[{kind: kill, at_s: 1, group: 4}]", "faults.0.group must be below 4"),
        ("seed", "--set seed: expected NAME=VALUE"),
    ],
)
def test_the_command_says_what_is_wrong_before_anything_runs(
    assignment: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", str(EXAMPLE), "--set", assignment]) == cli.USER_ERROR
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_the_command_prints_a_table_and_writes_numbers_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.html"
    short = ["--set", "trace.duration_s=20", "--set", "trace.rate=2", "--set", "faults=[]"]
    written = ["--json", str(numbers), "--page", str(page)]
    assert cli.main(["simulate", str(EXAMPLE), "--compare", *short, *written]) == 0
    output = capsys.readouterr().out
    assert "GPU-seconds" in output
    assert "meets first token p99 <= 5 s" in output
    found = json.loads(numbers.read_text("utf-8"))
    assert list(found["policies"]) == ["groups", "whole", "static"]
    assert found["policies"]["groups"]["failed_requests"] == 0
    assert found["scenario"]["trace"]["rate"] == 2
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert cli.main(["simulate", str(tmp_path / "none.yaml")]) == cli.USER_ERROR


def test_the_command_of_the_documentation_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = EXAMPLE.parents[2]
    monkeypatch.chdir(root)
    [line] = {
        line
        for page in ("README.md", "docs/simulation.md")
        for line in (root / page).read_text("utf-8").splitlines()
        if line.startswith("expertmesh simulate")
    }
    assert cli.main(line.split()[1:]) == 0
    output = capsys.readouterr().out
    assert "replicas lost" in output
    assert "groups: meets first token p99 <= 5 s" in output
