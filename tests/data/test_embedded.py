from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys

import pytest

from cambia.data import EmbeddedSource, installed
from cambia.data.embedded import DOMAINS
from cambia.data.installed import Places
from cambia.data.prepare import prepare
from cambia.data.sources import Splits

LIMIT = {"english": 1_000_000}  # enough to reach the docstrings behind the language reference


FAST_FIRST = [pytest.param(d, marks=[pytest.mark.slow] if d == "english" else []) for d in DOMAINS]
"""The largest is slow."""


def source(domain):
    return EmbeddedSource(domain, limit_bytes=LIMIT.get(domain, 300_000))


@functools.cache
def read(domain):
    return [*source(domain).documents()]


def plain(line):
    """Written anew here, so that the law does not rest on the code that it tests."""
    words = re.findall(r"[^\W_]+", line.lower())
    return re.sub(r"\d+", "0", " ".join(words))


@pytest.mark.parametrize("domain", FAST_FIRST)
def test_splits_are_disjoint_by_key_and_by_near_duplicate_lines(domain, tmp_path, byte_tokenizer):
    """Law 9."""
    rule = Splits()
    corpus = prepare(source(domain), byte_tokenizer, cache_dir=tmp_path)
    lines = {}
    for split, file in corpus.splits.items():
        text = byte_tokenizer.decode(file.tokens)
        lines[split] = {plain(line) for line in text.split("\n") if len(plain(line)) >= 20}
        assert lines[split], f"{domain} has no {split} lines"
    assert not lines["train"] & (lines["valid"] | lines["test"])
    assert not lines["valid"] & lines["test"]
    for split, file in corpus.splits.items():
        whole = "".join(document.text for document in read(domain) if rule.of(document.key) == split)
        assert whole
        if split == "train":
            assert byte_tokenizer.decode(file.tokens) == whole
        else:
            assert 0.5 * len(whole.encode()) < file.num_bytes <= len(whole.encode())


def test_docstrings_fall_on_the_side_of_their_module():
    modules = {file.key for tier in installed.DOMAINS["python"](installed.places()) for file in tier}
    docstrings = {
        d.key for d in read("english") if d.key.startswith(("stdlib/", "torch/")) and "#" not in d.key
    }
    assert len(docstrings) > 20
    assert docstrings <= modules


@pytest.mark.parametrize("domain", FAST_FIRST)
def test_a_domain_is_text_of_its_kind_and_the_same_each_time(domain):
    found = read(domain)
    assert found == [*source(domain).documents()]
    assert source(domain).describe()["fallback"] is None
    total = sum(len(document.text.encode()) for document in found)
    assert 100_000 < total <= LIMIT.get(domain, 300_000)
    assert len({document.key for document in found}) == len(found) > 20
    text = " ".join(document.text for document in found)
    typical = {"english": r"\bthe\b", "python": r"\bdef ", "cpp": r"#include", "legal": r"(?i)\bwarrant"}
    assert len(re.findall(typical[domain], text)) > 50
    assert "\0" not in text


PYTHON = '''"""A module."""
# a comment
import  os

class Empty:
    """Nothing but this."""

def pick(
        rows,  # all of them
         last=None):
    """Which one."""
    text = "# no comment"
    if rows:
            return   rows[0]


    if last:
        return f"""no
docstring"""
    return [rows,
            {last}
    ]
'''
BARE_PYTHON = '''import os

class Empty:
\t...

def pick(
\trows,
\tlast=None):
\ttext = "# no comment"
\tif rows:
\t\treturn rows[0]

\tif last:
\t\treturn f"""no
\t\tdocstring"""
\treturn [rows,
\t\t{last}
\t]
'''
CPP = """#if !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)
/* A header
   of two lines. */
#pragma once
namespace a { // opened
    int  f(int x);   /// what it does

    const char* url = "http://x"; char q = '"'; /* and */ int y;
}

#else
#error "This file should not be included when either TORCH_STABLE_ONLY or TORCH_TARGET_VERSION is defined."
#endif  // !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)
"""
BARE_CPP = """#pragma once
namespace a {
  int f(int x);

  const char* url = "http://x"; char q = '"'; int y;
}
"""


def test_code_comes_without_its_prose_and_in_one_layout():
    assert [*installed._python_code(PYTHON)] == [("", BARE_PYTHON)]
    assert [*installed._cpp_code(CPP)] == [("", BARE_CPP)]
    assert [*installed._python_code('"""Only a docstring."""\n# and a comment\n')] == []
    assert [*installed._cpp_code("// nothing\n")] == []


def test_python_without_its_prose_is_still_python():
    stdlib, _ = installed.DOMAINS["python"](installed.places())
    read = [text for file in stdlib[::4] for _, text in file.read()]
    assert len(read) > 50
    for text in read:
        tree = ast.parse(text)
        assert not any(ast.get_docstring(owner) for owner in installed._owners(tree))


def test_english_is_whole_sentences():
    text = """
    Return the mean of the values.  The values are `numbers`, as a list of
    them is
    longer. It takes two arguments and gives back one of them.

        >>> mean([1, 2])

    x : array_like
    """
    plain = "Return the mean of the values. It takes two arguments and gives back one of them.\n"
    assert installed._prose_of(text) == plain


def test_missing_text_is_replaced_by_generated_text_and_said(monkeypatch):
    monkeypatch.setattr(installed, "places", lambda: Places(None, {}, ()))
    texts = {}
    for domain in DOMAINS:
        missing = EmbeddedSource(domain, limit_bytes=20_000)
        assert f"in place of {domain}" in missing.describe()["fallback"]
        texts[domain] = "".join(document.text for document in missing.documents())
        assert len(texts[domain]) == 20_000
    assert len(set(texts.values())) == len(DOMAINS)


def test_the_description_changes_with_the_installation(monkeypatch):
    whole = installed.places()
    before = EmbeddedSource("english").describe()
    monkeypatch.setattr(installed, "places", lambda: Places(whole.stdlib, whole.packages, whole.metadata[1:]))
    assert EmbeddedSource("english").describe() != before


def test_python_with_the_stdlib_missing_falls_back_on_torch(monkeypatch):
    whole = installed.places()
    monkeypatch.setattr(installed, "places", lambda: Places(None, whole.packages, ()))
    found = [*EmbeddedSource("python", limit_bytes=100_000).documents()]
    assert all(document.key.startswith("torch/") for document in found)


def test_reading_text_imports_no_torch():
    code = (
        "import sys; from cambia.data import EmbeddedSource; import cambia.data.prepare;"
        "next(EmbeddedSource('cpp', limit_bytes=1000).documents());"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
