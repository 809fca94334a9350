"""Hugging Face checkpoint directories: checked from their headers before anything is loaded, then
read tensor by tensor straight from the page cache."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import safe_open

from expertmesh.runtime.errors import DamagedShard, MissingShard, NotACheckpoint

if TYPE_CHECKING:  # what only looks at headers starts without torch
    import torch

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of one tensor; `dtype` is safetensors' name, e.g. "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


class Checkpoint:
    """A checkpoint directory whose files have been found complete.

    Tensors come out memory-mapped and zero-copy (https://huggingface.co/docs/safetensors): a page
    is read when it is first touched, and processes on one host share it. Clone what must stay.
    Not for use after the files change.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], tensors: Mapping[str, TensorHeader]
    ) -> None:
        """Use `Checkpoint.open`."""
        self.path = path
        self.config = config
        self._tensors = tensors
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Checks the directory: reads config.json, the index and every file's header, no weights.

        Raises:
            NotACheckpoint: no directory, no valid config.json, or no safetensors in it.
            MissingShard: the index names a file that is not there.
            DamagedShard: a file shorter or longer than its header says, or without a header.
        """
        root = Path(path)
        config = _read_config(root)
        weight_map = _read_index(root)
        files = sorted({root / name for name in weight_map.values()}) or _files_without_index(root)
        tensors = {name: info for file in files for name, info in _read_header(file).items()}
        for name, file_name in weight_map.items():
            if name not in tensors:
                raise DamagedShard(
                    f"{file_name}: {INDEX_NAME} says that it holds {name}, but its header does "
                    "not; download the file again.",
                    file=file_name,
                    tensor=name,
                )
        return cls(root, config, tensors)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of config.json: `text_config` where there is one."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def model_type(self) -> str:
        """The language model's `model_type`, or "" when config.json has none."""
        return str(self.text_config.get("model_type", ""))

    @property
    def dtype_name(self) -> str:
        """The compute dtype config.json names, as transformers reads it: "bfloat16", "float32"."""
        configs = (self.text_config, self.config)
        names = [config.get("dtype") or config.get("torch_dtype") for config in configs]
        return next((str(name) for name in names if name), "float32").removeprefix("torch.")

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._tensors.keys()

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """Element type on disk as safetensors names it: "F32", "BF16", "F8_E4M3", "U8", ..."""
        return self._tensors[name].dtype

    def num_bytes(self, name: str) -> int:
        """Bytes on disk, from the header."""
        return self._tensors[name].num_bytes

    def offset_bytes(self, name: str) -> int:
        """Where the tensor starts in its file; files are mapped at page boundaries."""
        return self._tensors[name].offset_bytes

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, memory-mapped and read-only by convention."""
        tensor: torch.Tensor = self._slice(name)[:]
        return tensor

    def row(self, name: str, index: int) -> torch.Tensor:
        """Entry `index` of the first dimension (one dimension less), memory-mapped."""
        tensor: torch.Tensor = self._slice(name)[index]
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of the first dimension, memory-mapped."""
        tensor: torch.Tensor = self._slice(name)[start:stop]
        return tensor

    def check_still_there(self, names: Iterable[str]) -> None:
        """To be asked before mapped tensors are read late: touching what a file has lost is a
        SIGBUS, which ends the process.

        Raises:
            DamagedShard: a file of theirs has been cut off since it was opened.
        """
        for name in names:
            header = self._tensors[name]
            expected_bytes = header.offset_bytes + header.num_bytes
            actual_bytes = header.file.stat().st_size if header.file.exists() else expected_bytes
            if actual_bytes < expected_bytes:
                raise _damaged(
                    header.file, f"{expected_bytes} bytes or more", actual_bytes, expected_bytes
                )

    def _slice(self, name: str) -> Any:
        file = self._tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt", device="cpu")
        return self._files[file].get_slice(name)


def _read_config(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise NotACheckpoint(
            f"{root}: no such directory. Expected a Hugging Face checkpoint on this machine; a "
            "model on the hub is fetched with `hf download NAME --local-dir DIR`.",
            path=root,
        )
    file = root / CONFIG_NAME
    if not file.is_file():
        raise NotACheckpoint(
            f"{root}: no {CONFIG_NAME} in it. Expected a Hugging Face checkpoint directory: "
            f"{CONFIG_NAME} and *.safetensors.",
            path=root,
        )
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise NotACheckpoint(
            f"{file}: not JSON ({error}); download it again.", path=file
        ) from error
    if not isinstance(content, dict):
        raise NotACheckpoint(
            f"{file}: expected a JSON object, got {type(content).__name__}.", path=file
        )
    return content


def _read_index(root: Path) -> dict[str, str]:
    """Tensor name -> file name; empty when the checkpoint is not sharded."""
    file = root / INDEX_NAME
    if not file.is_file():
        return {}
    weight_map = _read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise NotACheckpoint(
            f"{file}: expected a `weight_map` from tensor to file name, got none.", path=file
        )
    for name in sorted(set(weight_map.values())):
        if not (root / name).is_file():
            raise MissingShard(
                f"{root}: {name} is missing; {INDEX_NAME} names it. Download it into this "
                "directory.",
                path=root,
                file=name,
                index=INDEX_NAME,
            )
    return weight_map


def _files_without_index(root: Path) -> list[Path]:
    single = root / SINGLE_NAME
    files = [single] if single.is_file() else sorted(root.glob("*.safetensors"))
    if files:
        return files
    if any(root.glob("pytorch_model*.bin")):
        raise NotACheckpoint(
            f"{root}: only pytorch_model.bin, which can run code when it is loaded. Convert it "
            'once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{root}', dtype='auto').save_pretrained('{root}')\"",
            path=root,
        )
    raise NotACheckpoint(
        f"{root}: {CONFIG_NAME} but no weights. Expected {SINGLE_NAME}, or {INDEX_NAME} and its "
        "files.",
        path=root,
    )


def _read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one file, after checking that the file is as long as its header says.

    The format: 8 bytes of header length, a JSON header, the data.
    """
    actual_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, actual_bytes - _LENGTH_BYTES):
            raise _damaged(file, "a complete safetensors header", actual_bytes)
        raw = stream.read(header_bytes)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        data_start = _LENGTH_BYTES + header_bytes
        tensors = {name: _tensor_header(file, entry, data_start) for name, entry in entries.items()}
        data_bytes = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, "a readable safetensors header", actual_bytes) from error
    expected_bytes = data_start + data_bytes
    if actual_bytes != expected_bytes:
        raise _damaged(file, f"{expected_bytes} bytes by its header", actual_bytes, expected_bytes)
    return tensors


def _tensor_header(file: Path, entry: dict[str, Any], data_start: int) -> TensorHeader:
    start, stop = entry["data_offsets"]
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    return TensorHeader(file, dtype, shape, data_start + start, stop - start)


def _damaged(
    file: Path, expected: str, actual_bytes: int, expected_bytes: int | None = None
) -> DamagedShard:
    return DamagedShard(
        f"{file}: expected {expected}, got a file of {actual_bytes} bytes. The copy is damaged or "
        "incomplete; download it again.",
        file=file,
        expected_bytes="unknown" if expected_bytes is None else expected_bytes,
        actual_bytes=actual_bytes,
    )
