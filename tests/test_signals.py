"""FASTA and WAV as sources: what becomes of letters and samples."""

from __future__ import annotations

import gzip
import wave
from pathlib import Path

import numpy as np
import pytest

from growkit.config.recipe import DataConfig
from growkit.data.sources import file_or_folder
from tests.support import cli, recipe_dict, write_recipe

GENES = b"\n>one human\nacgt\nACG-N\n\n>two\r\nTTT*\r\n"
PEAK = 2**31 - 1  # of samples of 32 bits


def rows(path: Path) -> dict[str, bytes]:
    return {document.group: document.text for document in file_or_folder(DataConfig(source=str(path)))}


def sound(path: Path, samples: np.ndarray, size: int) -> Path:
    """``samples``: int32 (frames, channels), of which ``size`` bytes are written; one byte is unsigned."""
    kept = samples.astype("<i4").view(np.uint8).reshape(*samples.shape, 4)[..., 4 - size :]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(size)
        file.setframerate(8000)
        file.writeframes((kept ^ 128 if size == 1 else kept).tobytes())
    return path


@pytest.mark.parametrize("name", ["genes.fa", "genes.fasta", "genes.fna.gz"])
def test_each_record_of_fasta_is_a_document(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GENES) if name.endswith(".gz") else GENES)
    assert rows(path) == {"2": b"ACGTACG-N", "6": b"TTT*"}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_sample_is_a_byte_of_255_levels(size: int, tmp_path: Path) -> None:
    """Silence is 128, the loudest are 1 and 255, and between them half of them are for a sixteenth of the range."""
    loud = np.array([0, PEAK, -PEAK - 1, PEAK // 16, -PEAK // 16])
    [made] = rows(sound(tmp_path / "a.wav", loud[:, None], size)).values()
    assert list(made[:3]) == [128, 255, 1]
    assert abs(made[3] - 191.5) <= 2 and abs(made[4] - 64.5) <= 2
    ramp = np.linspace(-PEAK, PEAK, 3000).astype(int)
    [made] = rows(sound(tmp_path / "a.wav", ramp[:, None], size)).values()
    assert sorted(made) == list(made) and len(made) == 3000


def test_channels_are_averaged(tmp_path: Path) -> None:
    two = np.array([[PEAK, -PEAK], [PEAK, PEAK], [PEAK // 2, -PEAK // 2]])
    assert rows(sound(tmp_path / "a.wav", two, 2)) == {"0": bytes([128, 255, 128])}


def test_a_model_trains_on_genes_and_sound(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice(list("ACGT"), (8, 3000))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "genes.fa").write_text("".join(f">{i}\n{''.join(row)}\n" for i, row in enumerate(letters)))
    wave_form = (PEAK * 0.9 * np.sin(np.arange(9000) / 7)).astype(int)
    sound(tmp_path / "data" / "a.wav", wave_form[:, None], 2)
    recipe = write_recipe(tmp_path, recipe_dict(tmp_path, data={"source": str(tmp_path / "data")}))
    code, _, err = cli("train", recipe, "run.name=signals")
    assert code == 0, err
