"""A Hugging Face folder as a place to start from: which family it is of, and what its config.json describes. No torch.

Its weights: folder.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.hf.adapter import Adapter
from growkit.checkpoint.hf.gpt_neox import GPTNeoX
from growkit.checkpoint.hf.llama import Llama, Mistral
from growkit.checkpoint.hf.mamba import FalconMamba, MambaAdapter
from growkit.checkpoint.hf.native import Native
from growkit.checkpoint.hf.qwen3 import Qwen3
from growkit.checkpoint.hf.settings import CONFIG, Settings, read_config
from growkit.errors import CheckpointError, ConfigError
from growkit.schedule.progress import Progress

LINEAGE = "growkit.json"  # beside the weights that growkit grew: how
LAYOUT = "huggingface"
# What goes with the weights wherever they go: the tokenizer, and how to generate with it.
TRAVELLING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model*",
    "spiece.model",
    "tekken.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates",
)
ADAPTERS: Mapping[str, Adapter] = {
    adapter.architecture: adapter
    for adapter in (Native(), Llama(), Mistral(), Qwen3(), GPTNeoX(), MambaAdapter(), FalconMamba())
}


def is_model_folder(path: Path) -> bool:
    """Whether a Hugging Face model, and no checkpoint of growkit, lies at ``path``."""
    return (path / CONFIG).is_file() and not (path / manifests.NAME).is_file()


def travelling(folder: Path) -> list[Path]:
    """The files, and folders of files, that go wherever the weights in ``folder`` go."""
    return sorted(path for pattern in TRAVELLING for path in folder.glob(pattern))


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """What reads the architecture that a config.json names. Raises ConfigError for one growkit does not know."""
    named: list[Any] = Settings(config).get("architectures", list, [])
    if len(named) == 1 and named[0] in ADAPTERS:
        return ADAPTERS[named[0]]
    raise ConfigError(
        "unknown-architecture",
        "is not an architecture growkit knows",
        key=f"{CONFIG}: architectures",
        value=named,
        mend=f"known: {', '.join(ADAPTERS)}",
    )


def manifest(folder: Path) -> manifests.Manifest:
    """What the folder says of itself, as a checkpoint would: its model, no progress, and the growths behind it. Raises
    ConfigError for a model growkit does not know, CheckpointError for files that cannot be read."""
    config = read_config(folder)
    model = adapter_of(config).from_hf(Settings(config))
    return manifests.Manifest(model, Progress(), lineage=_lineage(folder / LINEAGE), layout=LAYOUT)


def lineage_file(manifest: manifests.Manifest) -> str:
    """The text of the file that keeps a manifest's lineage beside a model."""
    from growkit import __version__

    return json.dumps({"growkit": __version__, "lineage": list(manifest.lineage)}, indent=1, sort_keys=True) + "\n"


def _lineage(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(dict(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["lineage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        mend = "restore it, or remove it: the weights do not need it"
        raise CheckpointError("damaged", f"is not a lineage ({error})", key=str(path), mend=mend) from error
