"""Tokenizers: bytes, a byte-pair encoding trained here, or one from Hugging Face, behind one class.

Whatever the family, `Tokenizer.hf` is an ordinary transformers tokenizer that `save_pretrained` writes
and `AutoTokenizer` loads. Bytes need no vocabulary to be agreed on before the next domain arrives,
so they are the default for streams.

    >>> tokenizer = build_tokenizer(BytesTokenizer())
    >>> tokenizer.encode("né").tolist(), tokenizer.vocab_size, tokenizer.eos_id
    ([110, 195, 169], 257, 256)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cambia.errors import ConfigError, DataError
from cambia.files import expanded

if TYPE_CHECKING:
    import tokenizers as rust
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
TextSource = Callable[[], Iterable[str]]


class Tokenizer:
    """Text to token ids and back.

    Special tokens are never read out of text: a corpus that contains "<|endoftext|>" is encoded as
    those characters.

    Args:
        hf: a transformers tokenizer with a backend of the tokenizers library and an end-of-text token.

    Raises:
        ConfigError: it has no end-of-text token.
    """

    def __init__(self, hf: PreTrainedTokenizerFast):
        backend = hf.backend_tokenizer
        if hf.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token; name one with the tokenizer's `eos_token`"
            )
        self.hf = hf
        """The transformers tokenizer."""
        self._backend = _plain_copy(backend)
        self._is_bytes = backend.get_vocab() == _byte_vocab()
        self.opening = _opening(hf)
        """What begins every document, (0 or 1,): the begin-of-text token where it adds one (Llama's does)."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are: one more than the largest."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def eos_id(self) -> int:
        """The id that stands between documents."""
        return int(self.hf.eos_token_id)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids: equal fingerprints, equal tokens."""
        opening = "".join(f"{token} " for token in self.opening)
        return hashlib.sha256(f"{opening}{self.eos_id} {self._backend.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64, without special tokens."""
        if self._is_bytes:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts at once, which is faster."""
        if self._is_bytes:
            return [self.encode(text) for text in texts]
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        plain = np.asarray(ids, dtype=np.int64)
        if self._is_bytes:
            return plain[plain < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        return self._backend.decode(plain.tolist(), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write it the way transformers does; `AutoTokenizer` and `HfTokenizer` load it."""
        self.hf.save_pretrained(folder)


def _opening(hf: PreTrainedTokenizerFast) -> np.ndarray:
    """The begin-of-text token where the tokenizer puts it before a text, and it is not the end's as well."""
    first = list(hf("a")["input_ids"])[:1]
    there = first == [hf.bos_token_id] != [hf.eos_token_id]
    return np.array(first if there else [], dtype=np.int64)


def _plain_copy(backend: rust.Tokenizer) -> rust.Tokenizer:
    import tokenizers

    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


# ---- the families --------------------------------------------------------------------------------


class TokenizerConfig(ABC):
    """How to come by a tokenizer."""

    @abstractmethod
    def build(self, texts: TextSource | None) -> Tokenizer:
        """Make the tokenizer; `texts` gives the training split's texts to a family that learns from them."""


@dataclass(frozen=True)
class BytesTokenizer(TokenizerConfig):
    """Each byte of UTF-8 is a token: 256 of them, and 256 is the end-of-text token."""

    def build(self, texts: TextSource | None) -> Tokenizer:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([EOS])
        return Tokenizer(_wrap(backend, EOS))


@dataclass(frozen=True)
class BpeTokenizer(TokenizerConfig):
    """A byte-pair encoding trained on the training split, the same for the same text."""

    vocab_size: int = 4096
    """How many tokens to learn, the 256 bytes and the end-of-text token included."""
    training_bytes: int = 20_000_000
    """Learn from at most this much text, in bytes."""

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; expected at least 257 (all bytes, end of text)"
            )

    def build(self, texts: TextSource | None) -> Tokenizer:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if texts is None:
            raise ConfigError("a bpe tokenizer learns from text: call build_tokenizer(config, texts=...)")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_upto(texts(), self.training_bytes), trainer)
        return Tokenizer(_wrap(backend, EOS))


@dataclass(frozen=True)
class HfTokenizer(TokenizerConfig):
    """A tokenizer that exists: a folder that transformers wrote, or a tokenizer.json."""

    path: str = ""
    """A local folder, or a tokenizer.json file."""
    eos_token: str | None = None
    """The token that stands between documents, where the tokenizer names none itself."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("an hf tokenizer needs `path`: a folder or a tokenizer.json")

    def build(self, texts: TextSource | None) -> Tokenizer:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = expanded(self.path)
        if not path.exists():
            raise DataError(f"there is no tokenizer {self.path!r}: expected a folder or a tokenizer.json")
        named: dict[str, Any] = {} if self.eos_token is None else {"eos_token": self.eos_token}
        try:
            if path.is_dir():
                hf = AutoTokenizer.from_pretrained(path, **named)
            else:
                hf = PreTrainedTokenizerFast(tokenizer_file=str(path), **named)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no tokenizer: {' '.join(str(error).split())}") from None
        if not isinstance(hf, PreTrainedTokenizerFast):
            raise DataError(
                f"{path} holds a {type(hf).__name__}, which the tokenizers library does not run: expected a "
                "folder with a tokenizer.json"
            )
        if len(hf) <= len(hf.all_special_tokens):  # made up by transformers for the kind of model
            raise DataError(
                f"{path} holds no tokenizer, only a model: save its tokenizer there too "
                "(tokenizer.save_pretrained(folder)), or name another with --tokenizer.type hf "
                "--tokenizer.path FOLDER"
            )
        return Tokenizer(hf)


@dataclass(frozen=True)
class ModelTokenizer(TokenizerConfig):
    """The one that lies beside the pretrained model of the run."""

    eos_token: str | None = None
    """The token that stands between documents, where the tokenizer names none itself."""

    def of(self, folder: Path) -> HfTokenizer:
        """The tokenizer beside the model in a folder."""
        return HfTokenizer(path=str(folder), eos_token=self.eos_token)

    def build(self, texts: TextSource | None) -> Tokenizer:
        raise ConfigError("a model tokenizer needs its model: build `ModelTokenizer().of(folder)`")


def build_tokenizer(config: TokenizerConfig, *, texts: TextSource | None = None) -> Tokenizer:
    """The tokenizer that a config describes.

    Args:
        config: one of `TOKENIZERS`.
        texts: called for the training split's texts by a family that learns (see `train_texts`).
    """
    return config.build(texts)


def _wrap(backend: rust.Tokenizer, eos: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=eos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> dict[str, int]:
    """The visible characters by which byte-level encodings write bytes, each with its byte as id.

    Printable Latin-1 stands for itself, the other bytes for the code points from 256 on (GPT-2's table).
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _byte_vocab() -> dict[str, int]:
    return {**_byte_alphabet(), EOS: 256}


def _upto(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    left = limit_bytes
    for text in texts:
        if left <= 0:
            return
        left -= len(text.encode("utf-8"))
        yield text
