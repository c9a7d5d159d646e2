from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from cambia.data import BpeTokenizer, BytesTokenizer, HfTokenizer, TokenFile, Tokenizer, build_tokenizer
from cambia.data.tokenizers import EOS
from cambia.errors import ConfigError, DataError

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n" * 3,
    "def f(x):\n    return x + 1\n" * 4,
    "naïve Straße",
]


@pytest.fixture(scope="module")
def bpe():
    return build_tokenizer(BpeTokenizer(vocab_size=300), texts=lambda: TEXTS)


def test_a_byte_is_its_own_id(byte_tokenizer):
    assert byte_tokenizer.encode("né\0").tolist() == [110, 195, 169, 0]
    assert (byte_tokenizer.vocab_size, byte_tokenizer.eos_id, byte_tokenizer.hf.pad_token_id) == (
        257,
        256,
        256,
    )
    assert byte_tokenizer.hf.padding_side == "left"


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=80))
def test_any_text_round_trips(byte_tokenizer, bpe, text):
    for tokenizer in (byte_tokenizer, bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids) == text
        assert not np.isin(tokenizer.eos_id, ids)


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=40))
def test_the_fast_path_for_bytes_is_what_the_library_gives(byte_tokenizer, text):
    library = byte_tokenizer.hf.backend_tokenizer
    assert byte_tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_a_batch_is_its_texts_one_by_one(byte_tokenizer, bpe):
    for tokenizer in (byte_tokenizer, bpe):
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            assert ids.tolist() == tokenizer.encode(text).tolist()


def test_a_special_token_in_text_is_text(byte_tokenizer, bpe):
    text = "before <|endoftext|> after"
    for tokenizer in (byte_tokenizer, bpe):
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.eos_id not in tokenizer.encode_batch([text])[0]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_leaves_out_special_tokens_and_marks_broken_characters(byte_tokenizer):
    assert byte_tokenizer.decode([256, 97, 195, 98, 256]) == "a\ufffdb"
    assert byte_tokenizer.decode(np.array([104, 105], dtype=np.uint16)) == "hi"


def test_bpe_is_the_same_for_the_same_text(bpe):
    again = build_tokenizer(BpeTokenizer(vocab_size=300), texts=lambda: iter(TEXTS))
    assert again.fingerprint == bpe.fingerprint
    other = build_tokenizer(BpeTokenizer(vocab_size=300), texts=lambda: TEXTS[:1])
    assert other.fingerprint != bpe.fingerprint
    assert bpe.vocab_size <= 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_bpe_learns_from_no_more_than_it_may():
    drawn = []

    def texts():
        for number in range(100):
            drawn.append(number)
            yield "x" * 100

    build_tokenizer(BpeTokenizer(training_bytes=1000), texts=texts)
    assert len(drawn) <= 11


@pytest.mark.parametrize("family", ["bytes", "bpe"])
def test_saved_tokenizers_are_loaded_by_transformers_and_by_us(family, tmp_path, byte_tokenizer, bpe):
    tokenizer = {"bytes": byte_tokenizer, "bpe": bpe}[family]
    tokenizer.save(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert hf(TEXTS[2], add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXTS[2]).tolist()
    assert hf.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]
    assert (hf.eos_token_id, hf.padding_side) == (tokenizer.eos_id, "left")
    loaded = build_tokenizer(HfTokenizer(str(tmp_path)))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
    alone = build_tokenizer(HfTokenizer(str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>"))
    assert alone.eos_id == tokenizer.eos_id


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path, byte_tokenizer):
    byte_tokenizer.save(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        build_tokenizer(HfTokenizer(str(tmp_path / "tokenizer.json")))
    with pytest.raises(DataError, match="there is no tokenizer"):
        build_tokenizer(HfTokenizer(str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tokenizer"):
        build_tokenizer(HfTokenizer(str(tmp_path / "empty")))
    GPT2Config().save_pretrained(tmp_path / "model")  # for which transformers makes up one without words
    with pytest.raises(DataError, match=r"only a model: save its tokenizer there too"):
        build_tokenizer(HfTokenizer(str(tmp_path / "model")))
    with pytest.raises(ConfigError, match="learns from text"):
        build_tokenizer(BpeTokenizer())
    with pytest.raises(ConfigError, match="at least 257"):
        BpeTokenizer(vocab_size=100)
    with pytest.raises(ConfigError, match="needs `path`"):
        HfTokenizer()


def test_fingerprints_differ_between_families(byte_tokenizer, bpe):
    assert byte_tokenizer.fingerprint != bpe.fingerprint
    assert byte_tokenizer.fingerprint == build_tokenizer(BytesTokenizer()).fingerprint


def test_documents_begin_as_the_tokenizer_begins_a_text():
    from tokenizers import processors

    tokenizer = build_tokenizer(BpeTokenizer(vocab_size=300), texts=lambda: TEXTS)
    assert tokenizer.opening.tolist() == []
    plain = tokenizer.fingerprint
    rust = tokenizer.hf.backend_tokenizer
    rust.add_special_tokens(["<s>"])
    begin = rust.token_to_id("<s>")
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    llama = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token=EOS))
    assert llama.opening.tolist() == [begin]
    assert llama.encode("a").tolist() == tokenizer.encode("a").tolist()
    assert llama.fingerprint != plain
    file = TokenFile.from_texts(["a", "b"], llama)
    assert [int(file.tokens[start]) for start in file.starts] == [begin, begin]
    assert [int(file.tokens[start - 1]) for start in file.starts] == [llama.eos_id] * 2
