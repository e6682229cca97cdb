"""Cuts a document into sentences, so that objectives on sentence pairs have boundaries to work with.

A small rule, not a model, and no data files. A sentence ends

* after ``. ! ? …`` with any closing quotes or brackets, where white space follows and the next word does not start in
  lower case; but not after a lone initial (``J. Smith``) or a common English abbreviation (``Mr.``);
* after a full-width full stop, exclamation or question mark (U+3002, U+FF01, U+FF1F, U+FF61) with any
  closing quotes or brackets, whatever follows;
* at an empty line.

A single line break does not end a sentence: prose is wrapped, and verse runs on. White space between two sentences
goes to the later one, as byte-level tokenizers attach a space to the word after it. The pieces, joined, are the
document.
"""

from __future__ import annotations

import re

_END = re.compile(
    r"""(?P<latin>[.!?\u2026]+)["'\u201d\u2019\xbb)\]]*(?=\s+(?P<next>\S))
      | [\u3002\uff01\uff1f\uff61]+\u2026*["')\u201d\u2019\u300d\u300f\u3009\u300b\u3011\uff09]*
      | \n[^\S\n]*(?=\n)""",
    re.VERBOSE,
)
_INK = re.compile(r"\S")
_LAST_WORD = re.compile(r"[\w.]*\w\Z")
_LOOK_BACK = 24
_ABBREVIATIONS = frozenset(
    """
    mr mrs ms mx messrs dr prof st rev hon gen col capt lt sgt maj cmdr gov sen rep pres jr sr esq vs etc e.g i.e cf
    viz al ca approx no nos vol vols pp fig figs eq ch sec ed eds jan feb mar apr jun jul aug sep sept oct nov dec
    mon tue wed thu fri inc ltd co corp dept univ u.s u.k
    """.split()  # noqa: SIM905
)


def split_sentences(document: str) -> list[str]:
    """Consecutive pieces of ``document``; each holds at least one visible character, unless the document holds none."""
    pieces = []
    start = 0
    for match in _END.finditer(document):
        end = match.end()
        following = match["next"]
        if following is not None:  # a Latin end, which is visible itself
            if following.islower() or _abbreviates(document, match):
                continue
        elif _INK.search(document, end) is None:
            break
        elif document[end - 1].isspace():  # an empty line
            ink = _INK.search(document, start)
            if ink is None or ink.start() >= end:
                continue
        pieces.append(document[start:end])
        start = end
    pieces.append(document[start:])
    return pieces


def _abbreviates(document: str, match: re.Match[str]) -> bool:
    if match["latin"] != ".":
        return False
    word = _LAST_WORD.search(document[max(0, match.start() - _LOOK_BACK) : match.start()])
    if word is None:
        return False
    text = word[0]
    initial = len(text) == 1 and text.isalpha() and text.isupper() and text != "I"
    return initial or text.lower() in _ABBREVIATIONS
