from __future__ import annotations

import pytest

from cambia.data import FieldFilter, LanguageFilter, LengthFilter, LicenseFilter, RegexFilter
from cambia.data.filters import SCRIPTS
from cambia.errors import ConfigError, DataError

SAMPLES = {
    "latin": "Grüße, Łódź và Hà Nội",
    "greek": "Ελλάδα",
    "cyrillic": "Ёлка растёт",
    "hebrew": "שלום",
    "arabic": "سلام",
    "devanagari": "नमत",
    "han": "漢字",
    "kana": "ひらがなカタカナ",
    "hangul": "안녕",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_knows_its_own_letters_only(script):
    kept = [name for name, text in SAMPLES.items() if LanguageFilter(script, min_share=0.99).keep(text, {})]
    assert kept == [script]


def test_digits_and_marks_say_nothing():
    assert LanguageFilter("latin").keep("abc 1234567890 --- ...", {})
    assert not LanguageFilter("latin").keep("1234 ...", {})


def test_an_alphabet_replaces_the_script():
    german = LanguageFilter(alphabet="abcdefghijklmnopqrstuvwxyzäöüß", min_share=1.0)
    assert german.keep("Über Größe", {})
    assert not german.keep("Łódź", {})


def test_share_is_of_letters():
    assert LanguageFilter("latin", min_share=0.5).keep("ab שלום"[:5], {})
    assert not LanguageFilter("latin", min_share=0.51).keep("ab שלום"[:5], {})


def test_length():
    assert [LengthFilter(2, 3).keep("x" * size, {}) for size in range(1, 5)] == [False, True, True, False]
    with pytest.raises(ConfigError, match="below min_chars"):
        LengthFilter(5, 2)


def test_license():
    mine = LicenseFilter(allow=("MIT", "apache-2.0"))
    assert mine.keep("", {"license": "mit"})
    assert mine.keep("", {"license": ["MIT", "Apache-2.0"]})
    assert not mine.keep("", {"license": ["MIT", "GPL-3.0"]})
    assert not mine.keep("", {"license": []})
    with pytest.raises(DataError, match="fields are code, size"):
        mine.keep("", {"code": "x", "size": 1})


def test_field():
    sums = FieldFilter("skill", "sums")
    assert [sums.keep("", {"skill": skill}) for skill in ("sums", "Sums", "", None)] == [
        True,
        False,
        False,
        False,
    ]
    assert FieldFilter("level", "3").keep("", {"level": 3})
    with pytest.raises(DataError, match=r"the field filter found no field 'skill'.*fields are code"):
        sums.keep("", {"code": "x"})
    with pytest.raises(DataError, match="plain text has no fields"):
        sums.keep("", {})
    with pytest.raises(ConfigError, match="needs `field`"):
        FieldFilter(value="sums")


def test_regex():
    assert RegexFilter(keep_pattern=r"^def ").keep("import os\ndef f(): ...", {})
    assert not RegexFilter(keep_pattern=r"^def ").keep("import os", {})
    assert not RegexFilter(drop_pattern="secret").keep("a secret", {})
    with pytest.raises(ConfigError, match="not a regular expression"):
        RegexFilter(drop_pattern="(")
