"""Text: where it comes from, how it is cut, tokenized, split, batched and streamed.

A `Source` gives documents; `prepare` splits them by key, drops near-duplicate lines across the splits
and writes memory-mapped token files; `TrainBatches` and `evaluation_batches` read those; an `Order` lays
tasks out in stages, and a `Stream` gives the batches of each.

    >>> from cambia.data import BytesTokenizer, EmbeddedSource, TrainBatches, build_tokenizer
    >>> from cambia.data.prepare import prepare
    >>> tokenizer = build_tokenizer(BytesTokenizer())
    >>> corpus = prepare(EmbeddedSource("english"), tokenizer, cache_dir="cache")
    >>> batches = TrainBatches(corpus.splits["train"], batch_size=8, sequence_length=256, seed=0)
    >>> next(batches).input_ids.shape
    torch.Size([8, 256])

Names are imported when they are first used. Sources and `prepare` need numpy only; batches need torch.
`prepare` and `fetch` are the functions of the modules of those names: ``cambia.data.prepare.prepare``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

SOURCES = {
    "embedded": "cambia.data.embedded:EmbeddedSource",
    "files": "cambia.data.textfiles:FilesSource",
    "hub": "cambia.data.hub:HubSource",
    "fetch": "cambia.data.fetch:FetchSource",
    "generated": "cambia.data.generated:GeneratedSource",
    "mixture": "cambia.data.sources:MixtureSource",
}
"""Where text comes from: `type:` of a source."""

FILTERS = {
    "field": "cambia.data.filters:FieldFilter",
    "language": "cambia.data.filters:LanguageFilter",
    "length": "cambia.data.filters:LengthFilter",
    "license": "cambia.data.filters:LicenseFilter",
    "regex": "cambia.data.filters:RegexFilter",
}
"""Which documents are kept: `type:` of a source's filter."""

TOKENIZERS = {
    "bytes": "cambia.data.tokenizers:BytesTokenizer",
    "bpe": "cambia.data.tokenizers:BpeTokenizer",
    "hf": "cambia.data.tokenizers:HfTokenizer",
    "model": "cambia.data.tokenizers:ModelTokenizer",
}
"""How text becomes tokens: `type:` of a tokenizer."""

STREAMS = {
    "sequence": "cambia.data.orders:SequenceOrder",
    "mixtures": "cambia.data.orders:MixturesOrder",
    "gradual": "cambia.data.orders:GradualOrder",
    "stationary": "cambia.data.orders:StationaryOrder",
    "permuted_vocabulary": "cambia.data.orders:PermutedVocabularyOrder",
    "skills": "cambia.data.orders:SkillsOrder",
    "counting": "cambia.data.orders:CountingOrder",
}
"""How tasks follow each other: `type:` of a stream."""

_HOME = {
    **{target.partition(":")[2]: target.partition(":")[0] for target in SOURCES.values()},
    **{target.partition(":")[2]: target.partition(":")[0] for target in FILTERS.values()},
    **{target.partition(":")[2]: target.partition(":")[0] for target in TOKENIZERS.values()},
    **{target.partition(":")[2]: target.partition(":")[0] for target in STREAMS.values()},
    "Document": "cambia.data.sources",
    "Source": "cambia.data.sources",
    "Splits": "cambia.data.sources",
    "Filter": "cambia.data.filters",
    "Tokenizer": "cambia.data.tokenizers",
    "TokenizerConfig": "cambia.data.tokenizers",
    "build_tokenizer": "cambia.data.tokenizers",
    "PreparedCorpus": "cambia.data.corpus",
    "TokenFile": "cambia.data.corpus",
    "special_ids": "cambia.data.corpus",
    "Batch": "cambia.data.batches",
    "TrainBatches": "cambia.data.batches",
    "evaluation_batches": "cambia.data.batches",
    "ReplayBuffer": "cambia.data.replay",
    "Order": "cambia.data.orders",
    "TaskText": "cambia.data.orders",
    "Stage": "cambia.data.streams",
    "Stream": "cambia.data.streams",
    "Task": "cambia.data.streams",
}

__all__ = ["FILTERS", "SOURCES", "STREAMS", "TOKENIZERS", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
