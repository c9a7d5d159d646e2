from __future__ import annotations

import os
from pathlib import Path

import pytest

from cambia.data import BytesTokenizer, Tokenizer, build_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return build_tokenizer(BytesTokenizer())


@pytest.fixture
def corpora() -> Path:
    root = os.environ.get("CAMBIA_DATA")
    if not root:
        pytest.skip("CAMBIA_DATA is not set: no real corpora on this machine")
    return Path(root)
