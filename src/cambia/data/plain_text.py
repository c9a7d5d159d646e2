"""Plain text: what a corpus says, without the marks of how it was made.

Two corpora of one language are told apart at a glance by how they were typeset or tokenized: curly quotes
here, ``" @-@ "`` there, lines of 72 characters elsewhere. What is to notice a new domain then notices the
typesetting. `plain_text` undoes such marks and leaves what is said.

    >>> plain_text("the game 's role @-@ playing part , as of 2011 , sold 1 @,@ 000 copies .")
    "the game's role-playing part, as of 2011, sold 1,000 copies."
    >>> plain_text("“Well,” said he—and left…")
    '"Well," said he - and left...'

It is for prose: code and verse need the line breaks that it takes out. Doing it twice changes nothing, and
prose that is plain already stays as it is.

What is not covered: spelling, stage directions ("(Applause.)"), footnotes and chapter headings stay. Letters
stay as they are, accents too.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

VERSION = 1
"""Part of what names a prepared corpus: raise it when a change here changes a text."""


def plain_text(text: str) -> str:
    """The text with ASCII punctuation and a paragraph on a line; tokens and broken lines are put together.

    Text whose full stops and commas mostly stand apart is taken for tokenized (WikiText, Penn Treebank). Of
    it, sentences with a hole (``<unk>``) are left out whole, about half of WikiText-2: neither a gap nor one
    word in the place of all that are lost is English, and each would tell the corpus by itself.
    """
    while (plainer := _once(text)) != text:  # what one rule leaves may be for another
        text = plainer
    return text


def _once(text: str) -> str:
    text = _with_plain_characters(text)
    tokenized = _is_tokenized(text)
    lines = text.split("\n") if tokenized else _paragraphs(text)
    lines = [_with_plain_dashes(line) for line in lines]
    if tokenized:
        lines = [_put_together(line) for line in lines]
    return "\n".join(kept for line in lines if (kept := " ".join(line.split())))


# ---- characters ----------------------------------------------------------------------------------

_ASCII = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),  # “ ” „ and the like
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2039\u203a", "'"),
        **dict.fromkeys("\u2010\u2011\u2212", "-"),  # hyphens and minus
        **dict.fromkeys("\u2014\u2015", "--"),  # em dash, bar
        "\u2012": "\u2013",  # figure dash: as an en dash
        **dict.fromkeys("\r\f\v\u0085\u2028\u2029", "\n"),
        **dict.fromkeys("\u00ad\u200b\ufeff", ""),  # soft hyphen, spaces without width
        **{"…": "...", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl"},
    }
)
_NOT_ASCII = re.compile(r"[^\n -~]")
_LOST_APOSTROPHE = re.compile("(?<=[A-Za-z])\ufffd+(?=(?:s|t|re|ve|ll|d|m)\\b)")
_WIDE_ELLIPSIS = re.compile(r" ?\.(?: \.){2,}")


def _with_plain_characters(text: str) -> str:
    text = text.replace("\r\n", "\n").translate(_ASCII).replace("``", '"').replace("''", '"')
    text = _NOT_ASCII.sub(_plain_character, _LOST_APOSTROPHE.sub("'", text))
    return _WIDE_ELLIPSIS.sub("...", text)


def _plain_character(match: re.Match[str]) -> str:
    character = match[0]
    if character.isspace():
        return " "
    # A replacement character is all that is left of something, nobody knows what.
    return "" if character == "\ufffd" or unicodedata.category(character) == "Cc" else character


_RANGE = re.compile(r"(?<=\d) ?\u2013 ?(?=\d)")
_DASH = re.compile(r" *(?:--+| \u2013|\u2013 )[ \u2013-]*")
_CLOSING_MARK = re.compile(r"""[.,;:?!)\]}]|["'](?:[\s.,;:?!)\]}]|$)|$""")
_OPENING_MARK = re.compile(r"""(?:^|[(\[{]|(?:^|[\s(\[{])["'])$""")


def _with_plain_dashes(line: str) -> str:
    """Dashes as ``" - "``, without the space at a mark that opens or closes; in ranges as hyphens."""
    return _DASH.sub(_plain_dash, _RANGE.sub("-", line)).replace("\u2013", "-")


def _plain_dash(match: re.Match[str]) -> str:
    before = match.string[max(0, match.start() - 2) : match.start()]
    after = match.string[match.end() : match.end() + 2]
    opened, closed = _OPENING_MARK.search(before), _CLOSING_MARK.match(after)
    return ("" if opened else " ") + "-" + ("" if closed else " ")


# ---- lines broken to fit a page ------------------------------------------------------------------

_WIDEST = 100  # characters; a longer line was not broken to fit a page
_NARROWEST = 60  # a page is not narrower, but lists and verse are
_FULL = 0.8  # of the width: what breaks lines may also even them out
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)]) ")


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that was broken into lines of one width; of any other text its lines."""
    blocks = [block.split("\n") for block in re.split(r" *\n(?: *\n)+", text.strip(" \n"))]
    lines = [line for block in blocks for line in block]
    inner = [len(line.rstrip()) for block in blocks for line in block[:-1]]
    if max(map(len, lines)) > _WIDEST or max(inner, default=0) < _NARROWEST:
        return lines
    if len(blocks) == 1 and not _breaks_sentences(lines):
        return lines  # without blank lines, each line may be a paragraph
    found: list[str] = []
    for block in blocks:
        found += [_line(block)] if _fills(block, max(inner)) else block
    return found


def _breaks_sentences(lines: Sequence[str]) -> bool:
    """Whether most of several lines end amid a sentence."""
    amid = sum(line.rstrip()[-1:].isalnum() or line.rstrip().endswith(",") for line in lines[:-1])
    return len(lines) > 2 and 2 * amid > len(lines) - 1


def _fills(block: Sequence[str], width: int) -> bool:
    """Whether each line of a paragraph goes on until the next word would not, or hardly, fit."""
    return all(
        len(line.rstrip()) + 1 + len(after.split()[0]) > _FULL * width and not _ITEM.match(after)
        for line, after in itertools.pairwise(block)
    )


def _line(block: Sequence[str]) -> str:
    text = " ".join(line.strip() for line in block)
    return re.sub(r"(?<=[A-Za-z]-) (?=[a-z])", "", text)


# ---- tokenized text ------------------------------------------------------------------------------

_APART = re.compile(r"\S [.,](?=\s|$)")
_ATTACHED = re.compile(r"\w[.,](?=\s|$)")


def _is_tokenized(text: str) -> bool:
    """Whether most full stops and commas stand apart; French sets other marks apart, but not these."""
    return len(_APART.findall(text)) > len(_ATTACHED.findall(text))


_HEADING = re.compile(r" *(?:= )+(.*?)(?: =)+ *")
_INSIDE = re.compile(r" ?@([-,.])@ ?")  # WikiText's marks in a word or a number
_APOSTROPHE = re.compile(r" ' (?=(?:s|t|re|ve|ll|d|m) )")
_HOLE = "<unk>"
_ENDS, _OPENING, _CLOSING = (".", "!", "?"), ("(", "[", "{"), (")", "]", "}")
_LEFT = re.compile(r"[.,;:?!%)\]}]|\.\.\.|n't|'[^\W\d].*")
_RIGHT = (*_OPENING, "$", "£", "€", "₹", "#")


def _put_together(line: str) -> str:
    """A line of tokens as text, a heading without its marks, and no sentence with a hole."""
    heading = _HEADING.fullmatch(line)
    line = _INSIDE.sub(r"\1", heading[1] if heading else line)
    tokens = _APOSTROPHE.sub("'", line).split()
    return " ".join(
        _glued(sentence) for sentence in _sentences(tokens) if not any(_HOLE in token for token in sentence)
    )


def _sentences(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Sentences of a line; what quotes or brackets hold together is not taken apart."""
    start = depth = 0
    quoted = ended = False
    for i, token in enumerate(tokens):
        quoted ^= token == '"'
        depth += (token in _OPENING) - (token in _CLOSING)
        ended = token in _ENDS or (ended and token in ('"', *_CLOSING))
        after = tokens[i + 1] if i + 1 < len(tokens) else ""
        if ended and not quoted and depth <= 0 and not after[:1].islower() and not _LEFT.fullmatch(after):
            yield list(tokens[start : i + 1])
            start, depth, ended = i + 1, 0, False
    yield list(tokens[start:])


def _glued(tokens: Sequence[str]) -> str:
    """Tokens as text: each stands apart, or sticks to the one on its left, its right or both."""
    text = ""
    stuck = True
    quotes = {'"': False, "'": False}  # whether one is open
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        left, right = _sticks(before, token, after, quotes)
        text += token if stuck or left else " " + token
        stuck = right
    return text


def _sticks(before: str, token: str, after: str, quotes: dict[str, bool]) -> tuple[bool, bool]:
    if token in quotes:
        closes = quotes[token] or (token == "'" and before.endswith("s") and before != "'s")
        quotes[token] = not closes
        return closes, not closes
    if token == "/":
        return before not in (",", ";", *_ENDS), before not in (",", ";", *_ENDS)
    if token == ":":
        clock = before[-1:].isdigit() and after[:1].isdigit()
        return True, clock
    if token == "&":
        initials = len(before) == len(after) == 1
        return initials, initials
    if token == "°":
        return after not in ("C", "F"), after in ("C", "F")
    return bool(_LEFT.fullmatch(token)), token in _RIGHT
