from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.data import FilesSource
from cambia.data.plain_text import plain_text

PROSE = """\
The guests - all forty of them - had left by 10:30, and Mr. Smith's "friends" (so he called them) with them.
"Who's there?" she asked. "It's 3.5 miles, or $1,000; e.g., a well-known 19th-century inn: the dogs' home..."
Rock 'n' roll [sic] cost 5% more in 1914-18, didn't it? "'Tis so," he said, 'of course,' and left!"""

WRAPPED = """\
    CHAPTER I

It was so late when the last of the guests had gone that nobody in the
house thought of going to bed, and the old count walked from one room
to another—humming.

“Well, then?”

“I am not sure that I follow you, my dear friend,” said the well-
known guest…

    The curfew tolls the knell of parting day,
    The lowing herd wind slowly o'er the lea

The end.
"""


# ---- prose that is plain already -----------------------------------------------------------------


def test_plain_prose_stays_as_it_is():
    assert plain_text(PROSE) == PROSE


@pytest.mark.parametrize(
    "text",
    [
        "Quoi ? Non ; oui : voilà, c'est tout. Merci !",
        "Kutúzov sagte: straße, naïve Œuvre. 戦場のヴァルキュリア",
        "One line\nand another, which are not\nof one paragraph.",
        "Short\nlines\nstay.",
        "A tag like <unk> in a text that is about tokens, which this is.",
    ],
)
def test_other_prose_stays_as_it_is(text):
    assert plain_text(text) == text


PLAIN = "the old count's house stood empty; 1812, (or so) well-known - it's \"here\" no. 5% $3"
PARAGRAPHS = st.lists(st.sampled_from(PLAIN.split(" ")), max_size=12).map(
    lambda words: " ".join(words) + "End."
)


@settings(max_examples=60)
@given(st.lists(PARAGRAPHS, min_size=1, max_size=6).map("\n".join))
def test_paragraphs_of_plain_words_stay_as_they_are(text):
    assert plain_text(text) == text


WORDS = ["a", "Bob", "s", "é", "日本", "1", "word " * 14, "@,@", " @-@ ", "<unk>", " = T = ", "n't", "°", "$"]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\u00a0", "\ufeff", "\x00", "= ", "* "]
POINTS = [",", ".", "!", ":", ";", "…", "...", ". . .", "-", "--", "\u2014", "\u2013", "/", "(", "]"]
QUOTES = ['"', "'", "“", "\u2018", "\u2019", "``", "''"]
PIECES = st.one_of(*map(st.sampled_from, (WORDS, SPACES, POINTS, QUOTES)))


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join) | st.text())
def test_doing_it_twice_changes_nothing(text):
    once = plain_text(text)
    assert plain_text(once) == once
    assert not any(mark in once for mark in "“”\u2018\u2019\u2014\u2013…\r\t\x00\u00a0\ufeff")
    assert "\n\n" not in once and "  " not in once


# ---- typesetting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("“Well,” said he, “it\u2019s \u2018fine\u2019…”", '"Well," said he, "it\'s \'fine\'..."'),
        ("He came\u2014and left -- so what \u2013 again.", "He came - and left - so what - again."),
        (
            "from 1805\u201307, 5 \u2013 3, the north\u2013south line",
            "from 1805-07, 5-3, the north-south line",
        ),
        ("“I never\u2014” he said.", '"I never -" he said.'),
        ("He said, “\u2014and then?”", 'He said, "- and then?"'),
        ("wait\u2014, no", "wait -, no"),
        ("a decent home . . . for all", "a decent home... for all"),
        ("one.  Two.\tThree.\u00a0Four.", "one. Two. Three. Four."),
        ("\ufeffof\u00adfice, \ufb01ve\u200b\x07", "office, five"),
        ("one\r\ntwo\r\n\r\n\r\nthree\n \n", "one\ntwo\nthree"),
        ("America\ufffd\ufffds work \ufffd a start", "America's work a start"),
        ("", ""),
        (" \n \n", ""),
    ],
)
def test_typesetting_is_undone(text, plain):
    assert plain_text(text) == plain


def test_broken_lines_are_joined_and_verse_is_not():
    assert plain_text(WRAPPED).split("\n") == [
        "CHAPTER I",
        "It was so late when the last of the guests had gone that nobody in the house thought of going to "
        "bed, and the old count walked from one room to another - humming.",
        '"Well, then?"',
        '"I am not sure that I follow you, my dear friend," said the well-known guest...',
        "The curfew tolls the knell of parting day,",
        "The lowing herd wind slowly o'er the lea",
        "The end.",
    ]


def test_a_broken_paragraph_is_joined_where_no_blank_line_shows_it():
    line = "and so he went on, as he had gone on before, from morning until"
    assert plain_text(f"{line}\n{line}\nthe evening.") == f"{line} {line} the evening."


def test_lines_that_were_not_broken_stay_apart():
    lines = "\n".join(["A line about as long as a page is wide, but a paragraph for itself."] * 3)
    assert plain_text(lines) == lines  # no blank line tells that it is not
    items = "\n".join(["- " + "an item of a list that goes nearly to the end of the line"] * 3)
    assert plain_text(f"First:\n\n{items}\n") == f"First:\n{items}"
    long = "A paragraph on one line is longer than any page is wide. " * 3
    assert plain_text(f"{lines}\n\n{long}") == f"{lines}\n{long.strip()}"


# ---- tokenized text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (
            'He said , " It \'s the players \' turn ( again ) " , and left .',
            'He said, "It\'s the players\' turn (again)", and left.',
        ),
        ("A role @-@ playing game sold 1 @,@ 250 @,@ 000 copies at $ 2 @.@ 5 , or 5 % .",
         "A role-playing game sold 1,250,000 copies at $2.5, or 5%."),
        ("From 1914 \u2013 18 , at 10 : 30 , R & B and / or a # 1 hit : it was 4 ° C .",
         "From 1914-18, at 10:30, R&B and/or a #1 hit: it was 4 °C."),
        ("They did n't , don 't , and O 'Brien 's ' own goal ' won .",
         "They didn't, don't, and O'Brien's 'own goal' won."),
        ("`` Yes , '' he said , `` it is . ''", '"Yes," he said, "it is."'),
        ("the king \u2019 s men , all , came \u2014 late .", "the king's men, all, came - late."),
        ("one [ sic ] ... two , three ; four !", "one [sic]... two, three; four!"),
        (" = A , B and C = \n The end , then . \n", "A, B and C\nThe end, then."),
        (" = = = Plot = = = \n \n It ends , well . \n", "Plot\nIt ends, well."),
    ],
)  # fmt: skip
def test_tokens_are_put_together(tokens, text):
    assert plain_text(tokens) == text


def test_sentences_with_a_hole_are_left_out_whole():
    text = (
        ' = <unk> = \n The first , small one . The <unk> one ! Is it " <unk> . So be it . " ? He ( of <unk> .'
        ' The Elder ) came , lit . <unk> . She saw <unk> @.@ 8 . " Who ? " , he asked . \n <unk> , no . \n'
    )
    assert plain_text(text) == 'The first, small one. "Who?", he asked.'


def test_real_corpora_lose_their_marks(corpora):
    given = {
        "wikitext-2/wiki.valid.tokens": (" @", "<unk>", " ,", " .", " = ", " 's "),
        "domains/novel-en/valid.txt": ("“", "\u2019", "\u2014", "\n\n", "the\n", "  "),
        "domains/speech-en/valid.txt": ("--", "  ", " \n"),
    }
    for path, marks in given.items():
        if not (corpora / f"{path}.gz").exists():
            pytest.skip(f"{path} is not here")
        before, after = (
            "\n".join(
                document.text for document in FilesSource(path, limit_bytes=150_000, plain=plain).documents()
            )
            for plain in (False, True)
        )
        for mark in marks:
            assert mark in before and after.count(mark) <= 2, (path, mark)
