"""The model that ``data.select`` compares the trained one with: any checkpoint. Safetensors and JSON alone are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.run_folder import manifest_of
from growkit.config.recipe import BYTES, DataConfig, Recipe, SelectConfig
from growkit.errors import ConfigError, DataError
from growkit.models.config import from_json, to_json

if TYPE_CHECKING:
    from growkit.data.corpus import Corpus
    from growkit.models.decoder import DecoderLM

KEY = "data.select.reference"
SAMPLE_BYTES = 1 << 14  # of text on which two tokenizers are compared


@dataclass(frozen=True)
class Reference:
    """``path``: where it was. ``model``: on the CPU until a stage takes it, in eval mode, without gradients.
    ``digest``: of its tensors."""

    path: str
    model: DecoderLM
    digest: str

    def require_same(self, digest: str) -> None:
        """Raises ConfigError when these are not the weights of ``digest``, which a run was trained with."""
        if digest != self.digest:
            raise _changed(self.path)


def described(recipe: Recipe) -> Recipe:
    """``recipe`` with the configuration of the reference that it names, which its schedule is reckoned with. No tensor
    is looked at, no torch loaded. Raises ConfigError if there is nothing, CheckpointError if it holds no model."""
    select = recipe.data.select
    if select is None or select.reference is None:
        return recipe
    model = to_json(_manifest(select.reference).model)
    data = dataclasses.replace(recipe.data, select=dataclasses.replace(select, reference_model=model))
    return dataclasses.replace(recipe, data=data)


def load_reference(select: SelectConfig | None, corpus: Corpus, backend: str) -> Reference | None:
    """The reference that ``select`` names, whose tokens are those of ``corpus``; None if it names none. Raises
    ConfigError if it is not the one that the recipe describes, DataError for other tokens, CheckpointError if it is
    damaged."""
    if select is None or select.reference is None:
        return None
    import xxhash

    from growkit.checkpoint.opening import open_any
    from growkit.models.decoder import build

    _manifest(select.reference)
    checkpoint = open_any(Path(select.reference))
    _require_tokens(checkpoint.manifest, checkpoint.folder, corpus, select.reference)
    if checkpoint.manifest.model != from_json(select.reference_model):
        raise _changed(select.reference)
    model = build(checkpoint.manifest.model, checkpoint.state.params, backend=backend)
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return Reference(select.reference, model.requires_grad_(False).eval(), digest.hexdigest())


def _changed(path: str) -> ConfigError:
    problem = "is not the model that this run was trained with"
    mend = "restore it; of a run that trains on, name a checkpoint (…/checkpoints/step-…) and not the run"
    return ConfigError("reference-changed", problem, key=KEY, value=path, mend=mend)


def _manifest(path: str) -> Manifest:
    if not Path(path).is_dir():
        mend = "name a run, a checkpoint or a Hugging Face folder; docs/how-to/hard-samples.md makes one"
        raise ConfigError("reference-missing", "is not a folder", key=KEY, value=path, mend=mend)
    return manifest_of(Path(path))


def _require_tokens(manifest: Manifest, folder: Path, corpus: Corpus, path: str) -> None:
    """Raises DataError if the reference was trained on other tokens. Where no recipe of growkit trained it, the
    tokenizer beside it is asked what it makes of some text; without one, only the sizes of the vocabularies are
    compared."""
    from growkit.data.synthetic.tasks import is_task
    from growkit.data.tokenizer import load_tokenizer, tokenizer_in

    ours = corpus.tokenizer
    if "sha256" in manifest.corpus:
        task = is_task(str(manifest.corpus["name"]))
        same = not task and manifest.corpus.get("tokenizer", BYTES) == ours.identity
    else:
        name = tokenizer_in(folder)
        if name is None:
            return
        text = [corpus.train_text[:SAMPLE_BYTES].tobytes()]
        theirs, _ = load_tokenizer(DataConfig(tokenizer=name)).encode_documents(text)
        same = theirs.tolist() == ours.encode_documents(text)[0].tolist()
    if not same:
        problem = f"was trained on other tokens than those of data.tokenizer {ours.name!r}"
        mend = "name a reference that was trained with this tokenizer"
        raise DataError("other-tokenizer", problem, key=KEY, value=path, mend=mend)
