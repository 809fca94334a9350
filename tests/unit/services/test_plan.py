"""`expertmesh plan`: for people and programs, from headers alone; what is wrong is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import tiny_checkpoint

from expertmesh.experts.assignment import experts_by_layer
from expertmesh.runtime.errors import ConfigError, InsufficientMemory
from expertmesh.services.cli import USER_ERROR, main
from expertmesh.services.gpus import Gpu
from expertmesh.services.planning.paper import plan_on_paper, usable_bytes
from expertmesh.services.planning.popularity import read_popularity, usage_csv
from expertmesh.services.planning.report import read_model
from expertmesh.v1 import control_pb2

EXPERT_BYTES = 3 * 64 * 48 * 2  # deepseek_v3 in bfloat16
LAYERS = {1: 8, 2: 8}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three layers, two of them with eight experts, three of which a token takes; bfloat16."""
    path = tmp_path_factory.mktemp("checkpoints") / "deepseek"
    return str(tiny_checkpoint("deepseek_v3", path, dtype=torch.bfloat16))


def gpu(num_experts: float, name: str = "tiny", bandwidth: float = 1e9) -> Gpu:
    """With room for so many experts once the headroom is taken off, and bound by memory."""
    return Gpu(name, round(num_experts * EXPERT_BYTES / 0.9) + 1, bandwidth, 1e18)


def test_every_expert_is_somewhere_and_fits(deepseek: str) -> None:
    gpus = [gpu(10), gpu(6, "small", 5e8), gpu(4, "small", 5e8)]
    plan = plan_on_paper(read_model(deepseek, "auto"), gpus, None, batch_tokens=64)
    held = [experts_by_layer(own.experts, LAYERS) for own in plan.gpus]  # as a group's args
    for layer in LAYERS:
        assert {e for own in held for e in own.get(layer, ())} == set(range(8))
    for own, mine, kind in zip(plan.gpus, held, gpus, strict=True):
        assert own.expert_bytes == sum(map(len, mine.values())) * EXPERT_BYTES
        assert own.expert_bytes <= own.usable_bytes == usable_bytes(kind)
    assert sum(own.rows_frac for own in plan.gpus) == pytest.approx(1)
    assert plan.gpus[0].rows_frac > plan.gpus[1].rows_frac, "twice as fast"
    assert sum(own.copies for own in plan.layers.values()) == 20
    assert all(own.max_over_mean >= own.bound >= 1 for own in plan.layers.values())


def test_gpus_that_hold_the_same_are_a_group(deepseek: str) -> None:
    gpus = [gpu(16), gpu(16), gpu(16, "other")]
    plan = plan_on_paper(read_model(deepseek, "auto"), gpus, None, batch_tokens=64)
    assert [own.group for own in plan.gpus] == ["g0", "g0", "g1"]
    assert all(own.experts == {1: "0-7", 2: "0-7"} for own in plan.gpus)


def test_the_time_is_that_of_the_data_sheet(deepseek: str) -> None:
    model = read_model(deepseek, "auto")
    plan = plan_on_paper(model, [gpu(16)], None, batch_tokens=64, prices={"tiny": 3.6})
    seconds = 16 * EXPERT_BYTES / 1e9  # bound by memory: every weight is read once
    assert plan.experts_s == pytest.approx(seconds)
    assert plan.tokens_per_s == pytest.approx(64 / seconds)
    assert plan.cost_per_million_tokens == pytest.approx(0.001 * seconds / 64 * 1e6)
    slow = Gpu("tiny", gpu(16).memory_bytes, 1e18, 1e9)  # bound by arithmetic
    plan = plan_on_paper(model, [slow], None, batch_tokens=64)
    assert plan.experts_s == pytest.approx(2 * 64 * 3 * 2 * EXPERT_BYTES / 2 / 1e9)
    assert plan.cost_per_million_tokens is None


def test_float32_needs_twice_the_memory(deepseek: str) -> None:
    plan = plan_on_paper(read_model(deepseek, "float32"), [gpu(32)], None, batch_tokens=1)
    assert plan.gpus[0].expert_bytes == 32 * EXPERT_BYTES


def test_popular_experts_get_the_copies(deepseek: str, tmp_path: Path) -> None:
    file = tmp_path / "popularity.csv"
    rows = [f"{layer},{e},{1000 if e == 5 else 100}" for layer in LAYERS for e in range(8)]
    file.write_text("\n".join(["layer,expert,rows", *rows, ""]))
    popularity = read_popularity(file, LAYERS)
    plan = plan_on_paper(read_model(deepseek, "auto"), [gpu(6)] * 3, popularity, batch_tokens=256)
    held = [experts_by_layer(own.experts, LAYERS) for own in plan.gpus]
    for layer in LAYERS:
        assert sum(5 in own[layer] for own in held) == 2
    assert not plan.notes


def test_what_does_not_fit_says_how_much_is_missing_on_what(deepseek: str) -> None:
    model = read_model(deepseek, "auto")
    with pytest.raises(InsufficientMemory) as caught:
        plan_on_paper(model, [gpu(8), gpu(4, "other")], None, batch_tokens=1)
    missing = int(caught.value.fields["missing_bytes"])
    assert missing == 4 * EXPERT_BYTES
    assert f": {missing} bytes are missing. Use more GPUs" in caught.value.message
    assert "(1 x tiny with 144.00 KiB, 1 x other with 72.00 KiB;" in caught.value.message
    with pytest.raises(InsufficientMemory, match=r"layer 1 .* 9216 bytes are missing"):
        plan_on_paper(model, [gpu(0.5)] * 40, None, batch_tokens=1)


def test_what_a_router_counted_can_be_read_back(tmp_path: Path) -> None:
    usage = control_pb2.GetExpertUsageResponse(
        layers=[
            control_pb2.LayerUsage(layer=layer, rows=range(layer, layer + 8)) for layer in LAYERS
        ]
    )
    file = tmp_path / "popularity.csv"
    file.write_text(usage_csv(usage))
    found = read_popularity(file, LAYERS)
    assert found == {layer: list(range(layer, layer + 8)) for layer in LAYERS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected layer,expert,rows, got an empty file"),
        ("1,0,5\n", "line 1: expected layer,expert,rows, got 1,0,5"),
        (
            "layer,expert,rows\n1,0,5\n1,x,5\n\n1,2\n",
            "line 3: expected two whole numbers and a number, got '1,x,5'; "
            "line 5: expected 3 values, got 2",
        ),
        (
            "layer,expert,rows\n0,0,5\n",
            "line 2: layer 0: the model's layers with experts are 1 to 2",
        ),
        ("layer,expert,rows\n1,8,5\n", "line 2: layer 1, expert 8: it has experts 0 to 7"),
        ("layer,expert,rows\n1,-1,5\n", "line 2: layer 1, expert -1: it has"),
        ("layer,expert,rows\n1,0,-5\n", "line 2: rows: expected 0 or more, got -5"),
        ("layer,expert,rows\n1,0,nan\n", "line 2: rows: expected 0 or more, got nan"),
        ("layer,expert,rows\n1,0,0\n", "expected rows of at least one expert, got none"),
        ("layer,expert,rows\n" + "7,0,1\n" * 9, "line 6: layer 7: the model's"),
    ],
)
def test_a_wrong_popularity_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "popularity.csv"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_popularity(file, LAYERS)
    assert message in caught.value.message
    assert str(file) in caught.value.message
    if text.count("\n") == 10:
        assert caught.value.message.endswith("; and 4 lines more")


def test_for_people(
    deepseek: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    prices = tmp_path / "prices.yaml"
    prices.write_text("{A100: 1.5, l4: 0.5, other: 9}")
    options = ["--gpus", "a100x2,l4x6", "--prices", str(prices)]
    assert main(["plan", deepseek, *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "g0 a100 2 0-7 of 2 layers 288.00 KiB of 33.53 GiB",
        "g1 l4 6 0-7 of 2 layers 288.00 KiB of 20.12 GiB",
        "1 8 64 (at most 8 of one) 1.000 1.000 0.0%",
        "copies 128 of 16 experts",
        "(at most, by the GPUs' published peak rates)",
        "price 6 an hour",
        "per million tokens, at least",
        "note: no popularity given",
    ):
        assert part in text
    assert main(["plan", deepseek, *options, "--tokens-per-s", "1000"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens per s 1000 in batches of 256 (measured)" in text
    assert "cost 1.667 per million tokens note:" in text


def test_for_programs(deepseek: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--gpu", "t9=0.0002,320,65"]
    assert main(["plan", deepseek, "--gpus", "t9x2", *own, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [gpu["gpu"] for gpu in plan["gpus"]] == ["t9", "t9"]
    assert plan["layers"].keys() == {"1", "2"}
    assert plan["layers"]["1"]["gap"] >= 0
    assert plan["cost_per_million_tokens"] is None


def test_what_a_user_can_cause_is_one_line(
    deepseek: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prices.yaml"
    for options, message in (
        (["--gpus", "l9"], "gpus: expected one of t4, "),
        (["--gpus", "t9", "--gpu", "t9=0.0001,1,1"], "bytes are missing"),
        (["--gpus", "l4", "--popularity", "/nowhere"], "/nowhere: cannot be read"),
        (["--gpus", "l4", "--prices", "/nowhere"], "/nowhere: cannot be read"),
        (["--gpus", "l4", "--tokens-per-s", "0"], "--tokens-per-s: expected above 0"),
        (["--gpus", "l4", "--prices", str(file)], "prices: expected a price of l4, got a100"),
    ):
        file.write_text("a100: 1")
        assert main(["plan", deepseek, *options]) == USER_ERROR
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""


@pytest.mark.parametrize("text", ["", "[1]", "l4: cheap", "l4: -1", "l4: true", "l4: .nan", "{"])
def test_wrong_prices(
    text: str, deepseek: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    assert main(["plan", deepseek, "--gpus", "l4", "--prices", str(file)]) == USER_ERROR
    assert str(file) in capsys.readouterr().err
