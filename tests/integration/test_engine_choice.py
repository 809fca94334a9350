"""Which engine runs which family, and why."""

import pytest
from tests.checkpoints import FAMILIES, tiny_model

from expertmesh.runtime.errors import ConfigError
from expertmesh.services.gateway.continuous import ContinuousEngine, why_not_continuous
from expertmesh.services.gateway.engine import choose_engine
from expertmesh.services.gateway.engine_config import EngineConfig
from expertmesh.services.gateway.exact import ExactEngine

NOT_CONTINUOUS = {
    "deepseek_v2": "latent",
    "deepseek_v3": "latent",
    "jamba": "recurrent",
    "llama4": "chunked",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_continuous_batching_can_run(family: str) -> None:
    reason = why_not_continuous(tiny_model(family))
    if family in NOT_CONTINUOUS:
        assert reason
        assert NOT_CONTINUOUS[family] in reason
    else:
        assert reason is None


def test_processors_it_would_drop_rule_it_out() -> None:
    model = tiny_model("mixtral")
    model.generation_config.update(temperature=0.5, top_k=3, do_sample=True)
    assert why_not_continuous(model) is None
    model.generation_config.repetition_penalty = 1.1
    assert "RepetitionPenalty" in (why_not_continuous(model) or "")


def test_choice_of_engine() -> None:
    mixtral, jamba = tiny_model("mixtral"), tiny_model("jamba")
    assert isinstance(choose_engine(mixtral, "auto", EngineConfig()), ContinuousEngine)
    assert isinstance(choose_engine(mixtral, "exact", EngineConfig()), ExactEngine)
    assert isinstance(choose_engine(jamba, "auto", EngineConfig()), ExactEngine)
    with pytest.raises(ConfigError, match="recurrent"):
        choose_engine(jamba, "continuous", EngineConfig())
