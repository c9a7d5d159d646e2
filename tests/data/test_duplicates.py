from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cambia.data import duplicates
from cambia.data.duplicates import HashFile, HeldOutHashes, line_hashes, normal_form, without_lines

BANNER = "Copyright (c) 2024, The Authors of This"


def test_normal_form_ignores_case_numbers_marks_and_space():
    assert normal_form(BANNER) == normal_form("  COPYRIGHT (C)  2031 -- the authors of this.\t")
    assert normal_form("a\n\n b_c ") == "a\n\nb c"
    assert normal_form("self.__encoding") == normal_form("self.encoding")


def test_short_lines_are_not_compared():
    assert line_hashes("return x\n" + BANNER)[0] is None
    assert line_hashes("return x\n" + BANNER)[1] is not None


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=200))
def test_there_is_one_hash_per_line(text):
    assert len(line_hashes(text)) == text.count("\n") + 1


def known_of(text):
    hashes = HeldOutHashes()
    hashes.add(text)
    return {int(value) for value in hashes.array()}


def test_known_lines_are_dropped_and_the_instruction_is_kept():
    known = known_of("x\n" + BANNER)
    assert without_lines(f"one\n{BANNER}\ntwo", 0, known) == ("one\ntwo", 1)
    prompt = BANNER + "\n"
    assert without_lines(prompt + "answer", len(prompt), known) == (prompt + "answer", 0)


def test_a_known_document_of_short_lines_is_dropped_whole():
    text = "first line\nsecond line\nthird line"
    assert without_lines(text, 0, known_of(text + "\n")) == ("", 3)


def test_hashes_on_disk_are_found_again_in_any_number_of_chunks(monkeypatch):
    monkeypatch.setattr(duplicates, "_CHUNK", 3)
    file = HashFile(io.BytesIO())
    for number in range(10):
        file.add(f"training line number {chr(97 + number) * 5}")
    held_out = HeldOutHashes()
    held_out.add("training line number ccccc")
    held_out.add("training line number zzzzz")
    known = file.common(held_out.array())
    assert len(known) == 2  # the line, and the document that it is
    assert np.isin(known, held_out.array()).all()
