"""The tokenizer of a run as transformers reads it. Of a byte-level one every id is the byte it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from growkit.data.tokenizer import END, VOCAB_SIZE, FastTokenizer, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer_config.json")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Text → its UTF-8 bytes and back; the end of a document, byte 0, ends a text and pads it, at the left.

    ASCII characters are tokens, the other bytes what BPE falls back to. The end is spelled as the character it is: any
    other spelling (<0x00>, as is usual) would be found in a text that has it, and become the end of that text.
    """
    import tokenizers
    from tokenizers import decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(byte) if byte < 128 else f"<0x{byte:02X}>": byte for byte in range(VOCAB_SIZE)}
    tokenizer = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = END.decode()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        padding_side="left",  # what is generated stands at the right
        clean_up_tokenization_spaces=False,
    )


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """``tokenizer`` with the end of a document as eos and, at the left, as padding."""
    if not isinstance(tokenizer, FastTokenizer):
        return byte_tokenizer()
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.token(tokenizer.end)
    bos = {} if tokenizer.bos is None else {"bos_token": tokenizer.token(tokenizer.bos), "add_bos_token": True}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.file),
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **bos,
    )


def write(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """Writes the tokenizer's files into ``folder``; returns them."""
    as_transformers(tokenizer).save_pretrained(folder)
    return [folder / name for name in FILES]
