"""stories260K as a folder of Hugging Face: a model that somebody else trained, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from peers.llama import Pieces, stories
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_MARKS = ("<unk>", "<s>", "</s>")
_BYTES = 256
"""Behind the marks stands each byte, for what no other piece spells."""
_SPACE = "▁"


def tokenizer_of(pieces: Pieces) -> PreTrainedTokenizerFast:
    """The same pieces for the tokenizers library: of two that can be joined the likelier pair comes first."""
    first = len(_MARKS) + _BYTES
    vocabulary = {mark: number for number, mark in enumerate(_MARKS)}
    vocabulary |= {f"<0x{byte:02X}>": byte + len(_MARKS) for byte in range(_BYTES)}
    spelled = {number: piece.decode() for piece, number in pieces.number.items() if number >= first}
    vocabulary |= {piece.replace(" ", _SPACE): number for number, piece in sorted(spelled.items())}
    pairs = []
    for whole, number in vocabulary.items():
        halves = [(whole[:i], whole[i:]) for i in range(1, len(whole))] if number >= first else []
        pairs += [(-pieces.score[number], *pair) for pair in halves if vocabulary.keys() >= {*pair}]
    merges = [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=_MARKS[0], byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    unknown, begin, end = _MARKS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, bos_token=begin, eos_token=end
    )


def stories_folder(data: Path, folder: Path) -> Path:
    """Write the model and its tokenizer; made once."""
    if not folder.exists():
        made = folder.with_name(f"{folder.name}.part")
        stories(data).save_pretrained(made)
        tokenizer_of(Pieces(data / "tok512.bin")).save_pretrained(made)
        made.rename(folder)
    return folder


def piece_bytes(pieces: Pieces) -> Tensor:
    """(V,) int64: the bytes of text that each token stands for."""
    sizes = torch.ones(len(pieces.score), dtype=torch.int64)
    for piece, number in pieces.number.items():
        if number >= len(_MARKS) + _BYTES:
            sizes[number] = len(piece)
    sizes[: len(_MARKS)] = 0
    return sizes
