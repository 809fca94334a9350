"""transformers' config of a checkpoint: it knows the defaults that config.json leaves out."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from expertmesh.runtime.errors import NotACheckpoint, UnsupportedCheckpoint

CONFIG_NAME = "config.json"


def load_config(path: str | Path, **overrides: Any) -> Any:
    """The config of a checkpoint directory.

    Args:
        overrides: fields to set differently.

    Raises:
        NotACheckpoint: no config.json there.
        UnsupportedCheckpoint: transformers does not know the model type, or refuses a field.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise NotACheckpoint(
            f"{path}: no {CONFIG_NAME}; expected a Hugging Face checkpoint directory", path=path
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, **overrides)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        message = f"{file}: transformers cannot read it: {error}"
        raise UnsupportedCheckpoint(message, path=path) from error
