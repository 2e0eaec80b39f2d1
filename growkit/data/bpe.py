"""A byte-level BPE of one's own text: every byte has an id, and the most frequent pairs of ids become ids in turn
(Sennrich et al. 2016; bytes as GPT-2 has them). The same text gives the same tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from growkit.data.tokenizer import FILE, decoded
from growkit.errors import ConfigError, cannot_write, require

END_OF_TEXT = "<|endoftext|>"  # stands between documents
LEAST = 257  # ids: of every byte, and of the end


def require_trainable(vocab_size: int, folder: Path) -> None:
    """Raises ConfigError when no tokenizer of that size can be made in ``folder``."""
    require("tokenizers", extra="hf", key="growkit tokenizer train")
    if vocab_size < LEAST:
        mend = f"use {LEAST} or more: every byte has an id, and the end of a document"
        raise ConfigError("too-small", f"must be at least {LEAST}", key="--vocab-size", value=vocab_size, mend=mend)
    if folder.exists():
        raise ConfigError("file-exists", "is already there", key="--output", value=str(folder), mend="name another one")


def train_bpe(documents: Iterable[bytes], vocab_size: int, folder: Path) -> int:
    """Writes a tokenizer of at most ``vocab_size`` ids, which ``AutoTokenizer`` loads, into ``folder``, where none is
    yet; returns how many it has. Raises ConfigError."""
    require_trainable(vocab_size, folder)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(map(decoded, documents), trainer)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 10**30}
    beside = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        bpe.save(str(beside / FILE))
        (beside / "tokenizer_config.json").write_text(json.dumps(said, indent=1))
        os.rename(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise cannot_write(folder, error) from error
    return int(bpe.get_vocab_size())
