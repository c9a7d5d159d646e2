"""What tests of `cambia learn` share: a small checkpoint, texts in files, and settings that take seconds."""

from __future__ import annotations

from pathlib import Path

from cambia.data.generated import GeneratedSource
from tests.conftest import checkpoint

QUICK = [
    *("--training.batch_size", "16", "--training.sequence_length", "32", "--optimizer.learning_rate", "0.02"),
    *("--evaluation.max_bytes", "600", "--evaluation.context_tokens", "16", "--threads", "1"),
    *("--methods.0.prefix_tokens", "16", "--methods.0.background_rows", "16"),
    *("--methods.0.course.consolidation_steps", "4"),
]
"""Settings behind model and texts."""


def base(folder: Path) -> Path:
    """A checkpoint with a tokenizer of bytes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "initializer_range": 0.1}
    return checkpoint(folder, **sizes, num_attention_heads=2, num_key_value_heads=2)


def text(folder: Path, kind: str, name: str = "", size: int = 60_000) -> Path:
    """A file of generated text."""
    path = folder / (name or f"{kind}.txt")
    source = GeneratedSource(task=kind, size_bytes=size)  # ty: ignore[invalid-argument-type]
    path.write_text("\n\n".join(document.text for document in source.documents()), encoding="utf-8")
    return path
