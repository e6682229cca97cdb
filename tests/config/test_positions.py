"""The oracle is tomllib: the scanner must find the keys that it finds, and values that are their own line numbers."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.positions import key_lines

EVERYTHING = r'''# comment with [brackets] = "x"
title = 2
"quoted key" = 3   # not = 99
'literal.key' = 4
a.b.c = 5
a."b b".d = 6
 indented = 7

[ spaced . "out" ]   # header
x = 10
text = "a \" = # [no] "
multi = """
fake = 1
[fake]
ends with quote\""""
after_multi = 16
raw = ' \ '
raw_multi = \'\'\'
k = 1 ''\'\'\'
after_raw = 20
inline = { p = 21, q.r = 21, s = { t = 21 }, "u v" = [21, { w = 21 }] }
array = [
  23, # a comment, with ] and "
  24,

  [26, 26],
]
empty = []
none = {}
date = 1979-05-27 07:32:00
after_date = 31
[spaced.out.sub]
y = 33
[[table]]
z = 35
[table.inner]
z = 37
[[table.list]]
z = 39
[[table.list]]
z = 41
[[table]]
z = 43
[table.inner]
z = 45
[top]
"esc\u0061ped" = 47
'''.replace("\\'\\'\\'", "'''").replace("''\\'''", "'''")


def walk(value, path=()):
    """(path, value) of everything that tomllib found: tables, array elements and values."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, (*path, index))


def check(text):
    lines, found = key_lines(text), dict(walk(tomllib.loads(text)))
    assert set(lines) == set(found)
    for path, value in found.items():
        if type(value) is int:
            assert lines[path] == value, path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_construct(newline):
    check(EVERYTHING.replace("\n", newline))
    assert key_lines(EVERYTHING)["table", 1, "inner", "z"] == 45


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# only a comment", "a = 1", "[a]", "a = ''", "x=[[],[],\n[]]", "[[a]]\n[[a]]"]
)
def test_small_files(text):
    assert set(key_lines(text)) == {path for path, _ in walk(tomllib.loads(text))}


@pytest.mark.parametrize(
    "text", ["a = 1\nb = [}", "a = 1\nb = [1 2", "a = 1\n= 3", "a = 1\n{", "a = 1\nb", 'a = 1\nb = "']
)
def test_what_is_no_toml_ends_too(text):
    assert key_lines(text)["a",] == 1


KEYS = st.sampled_from(["a", "b-2", '"q u"', "'l.t'", '"#="', "7"])
DOTTED = st.lists(KEYS, min_size=1, max_size=3).map(".".join)
TEXTS = st.sampled_from(['"x # \\" ["', "'[a]'", '"""\nk = 1\n"""', "'''a\n\n'''", "true", "1e-3", "[]", "{}", "inf"])


@st.composite
def documents(draw):
    """Lines of TOML whose integers are their own line numbers; some are invalid and skipped."""
    out, line = [], 1
    for _ in range(draw(st.integers(1, 8))):
        key = draw(DOTTED)
        piece = draw(
            st.sampled_from(
                ["[K]", "[[K]]", "K = N", "K = T", "K = [T, N, {K = N}]", "K = {K = T}", "K = [\nT,\n]", "#", ""]
            )
        )
        for mark, source in (("K", DOTTED), ("T", TEXTS)):
            while mark in piece:
                piece = piece.replace(mark, key if mark == "K" and piece.count("K") == 1 else draw(source), 1)
        piece = piece.replace("N", str(line))
        out.append(piece)
        line += piece.count("\n") + 1
    return "\n".join(out)


@settings(max_examples=400, deadline=None)
@given(documents())
def test_generated_files(text):
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = key_lines(text)
    found = dict(walk(tomllib.loads(text)))
    assert set(lines) == set(found)
    for path, value in found.items():
        if type(value) is int and not any(piece in text for piece in ("[\n", '"""', "'''")):
            assert lines[path] == value
