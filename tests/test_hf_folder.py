"""A Hugging Face folder: what transformers reads is what was written, whole or not there."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from growkit.checkpoint.hf.folder import write_folder
from growkit.errors import CheckpointError, ConfigError

CONFIG = {"model_type": "llama", "vocab_size": 7}
ROW = 40  # bytes of a row below


class Lazy(Mapping[str, torch.Tensor]):
    """Five tensors of ten rows of 40 bytes; remembers the most that were alive at once."""

    def __init__(self) -> None:
        self.most = 0
        self._alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.full((10, ROW // 4), float(name[1:]))
        self._alive.add(tensor)
        self.most = max(self.most, len(self._alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(f"t{i}" for i in range(5))

    def __len__(self) -> int:
        return 5


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    beside = tmp_path / "tokenizer.json"
    beside.write_text("{}")
    write_folder(tmp_path / "out", CONFIG, Lazy(), beside=[beside])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, Lazy()[name])


def test_a_large_one_is_cut_into_shards_that_transformers_reads(tmp_path: Path) -> None:
    from transformers.utils.hub import get_checkpoint_shard_files

    tensors = Lazy()
    write_folder(tmp_path / "out", CONFIG, tensors, shard_bytes=2 * 10 * ROW)
    assert tensors.most <= 3  # a shard, and the first tensor of the next
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    index = tmp_path / "out" / "model.safetensors.index.json"
    files, metadata = get_checkpoint_shard_files(str(tmp_path / "out"), str(index))
    assert [Path(file).name for file in files] == names
    assert metadata["total_size"] == 5 * 10 * ROW
    assert metadata["weight_map"] == {"t0": names[0], "t1": names[0], "t2": names[1], "t3": names[1], "t4": names[2]}
    assert set(stored(tmp_path / "out")) == set(Lazy())


class Failing(Lazy):
    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "t3":
            raise OSError("no space left")
        return super().__getitem__(name)


def test_nothing_is_left_half_written_and_nothing_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no space left") as caught:
        write_folder(out, CONFIG, Failing(), shard_bytes=10 * ROW)
    assert caught.value.code == "cannot-write" and list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError) as caught:
        write_folder(out, CONFIG, Lazy(), beside=[tmp_path / "tokenizer.json"])
    assert caught.value.code == "damaged" and list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(ConfigError) as refused:
        write_folder(out, CONFIG, Lazy())
    assert refused.value.code == "file-exists" and list(out.iterdir()) == []
