"""Every supported family that is not among the fifteen promised ones, against transformers' module.

Here and not among the unit tests because importing twenty model files takes a while.
"""

from pathlib import Path

import pytest
import torch
from tests.checkpoints import FAMILIES
from tests.reference_experts import assert_bit_equal, other_checkpoint

from expertmesh.experts.expert_spec import SUPPORTED_MODEL_TYPES

OTHERS = sorted(set(SUPPORTED_MODEL_TYPES) - set(FAMILIES) - {"llama4_text"})


@pytest.mark.parametrize("model_type", OTHERS)
def test_reads_and_computes_as_transformers(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert_bit_equal(other_checkpoint(model_type, tmp_path), torch.float32)
