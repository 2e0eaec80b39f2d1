"""The tokenizer of a byte-level model, as transformers reads it: every id is the byte it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from growkit.data.tokenizer import END, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_ID = END[0]
FILES = ("tokenizer.json", "tokenizer_config.json")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Text → its UTF-8 bytes and back; the end of a document, byte 0, ends a text and pads it, at the left.

    ASCII characters are tokens, the other bytes what BPE falls back to. The end is spelled as the character it is: any
    other spelling (<0x00>, as is usual) would be found in a text that has it, and become the end of that text.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(byte) if byte < 128 else f"<0x{byte:02X}>": byte for byte in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = END.decode()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        padding_side="left",  # what is generated stands at the right
        clean_up_tokenization_spaces=False,
    )


def write(folder: Path) -> list[Path]:
    """Writes the byte tokenizer's files into ``folder``; returns them."""
    byte_tokenizer().save_pretrained(folder)
    return [folder / name for name in FILES]
