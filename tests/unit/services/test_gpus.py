"""GPUs by name, and those a user describes."""

import pytest

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.gpus import GPUS, gpu_named, parse_gpus, parse_own


def test_a_list_of_gpus() -> None:
    assert [gpu.name for gpu in parse_gpus("a100x2, L4")] == ["a100", "a100", "l4"]
    assert [gpu.name for gpu in parse_gpus("rtx4090,rtx4090x2")] == ["rtx4090"] * 3
    assert [gpu.name for gpu in parse_gpus("a100-80gx1")] == ["a100-80g"]


def test_the_catalogue_is_of_one_scale() -> None:
    for name, gpu in GPUS.items():
        assert name == gpu.name
        assert 16e9 <= gpu.memory_bytes < 300e9
        assert 300e9 <= gpu.bandwidth_bytes_per_s <= 8e12
        assert 60e12 < gpu.flops_per_s < 2.5e15


def test_a_gpu_of_ones_own() -> None:
    own = parse_own(["T9=16,320,65.5", "l4=48,300,121"])
    t9, l4 = parse_gpus("t9,l4", own)
    assert (t9.memory_bytes, t9.bandwidth_bytes_per_s, t9.flops_per_s) == (16e9, 320e9, 65.5e12)
    assert l4.memory_bytes == 48e9, "what the user says comes first"


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"one of t4, .* h200, b200, got 'a10000'.*--gpu NAME="):
        gpu_named("a10000")


@pytest.mark.parametrize("text", ["", "l4,,t4", "l4x0", "x2"])
def test_a_wrong_list(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^gpus: expected"):
        parse_gpus(text)


@pytest.mark.parametrize(
    "text", ["t9", "t9=16,320", "t9=16,320,0", "t9=a,b,c", "=1,2,3", "t9=nan,1,1", "t 9=1,1,1"]
)
def test_a_wrong_description(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu: expected NAME=MEMORY_GB,.* got '"):
        parse_own([text])
