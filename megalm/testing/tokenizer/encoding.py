"""Text to ids: any text, each on its own terms, and never a special token."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from megalm.data.sentences import split_sentences
from megalm.errors import TokenizerError
from megalm.testing.check import Check, CheckFailed
from megalm.testing.tokenizer import words
from megalm.testing.tokenizer.subject import TokenizerSubject
from megalm.testing.tokenizer.texts import SPELLINGS, pieces

LONG = 200_000
"""Characters of the longest texts."""
SECONDS = 20.0
"""Processor time in which one of them must be encoded and decoded: a megabyte in less than two minutes."""
_SLACK = 3
"""Characters by which a decoded prefix may be longer, where a character is cut into bytes."""


def ids_in_range(subject: TokenizerSubject) -> str:
    """Ids are plain integers below the size of the vocabulary."""
    tokenizer = subject.tokenizer
    size: Any = tokenizer.vocab_size
    if type(size) is not int or size < 1:
        raise CheckFailed(f"vocab_size is {size!r}; it must be a positive int")
    # All that was learnt is tried: the last ids are often those of what is rare, which no sample need hold.
    texts = [*subject.usable, *subject.encodable(subject.texts)]
    found: Any = tokenizer.encode_batch(texts)
    if not isinstance(found, list) or not all(isinstance(one, list) for one in found):
        raise CheckFailed(
            f"encode_batch must return a list of lists; found {type(found).__name__}"
            + (f" of {type(found[0]).__name__}" if isinstance(found, list) and found else "")
        )
    if len(found) != len(texts):
        raise CheckFailed(f"encode_batch returned {len(found)} lists for {len(texts)} texts")
    largest = -1
    for text, one in zip(texts, found, strict=True):
        for index in one:
            if type(index) is not int:
                raise CheckFailed(f"{words.show(text)} gives the id {index!r} of type {type(index).__name__}; use int")
            if not 0 <= index < size:
                raise CheckFailed(f"{words.show(text)} gives the id {index}; ids are 0 to vocab_size - 1 = {size - 1}")
        largest = max([largest, *one])
    return f"{len(found)} texts, ids up to {largest:,} of {size:,}"


def batch_independence(subject: TokenizerSubject) -> str:
    """A text's ids are its own: neither its neighbours nor its place change them."""
    tokenizer, texts = subject.tokenizer, subject.usable
    if (nothing := tokenizer.encode_batch([])) != []:
        raise CheckFailed(f"encode_batch([]) is {nothing!r}; it must be []")
    alone = [tokenizer.encode_batch([text])[0] for text in texts]
    draw = random.Random(subject.seed)
    places = list(range(len(texts)))
    shuffled = draw.sample(places, len(places))
    twice = draw.choices(places, k=2 * len(places))
    for how, order in (
        ("in a batch", places),
        ("in a batch of another order", shuffled),
        ("in a batch with repeats", twice),
    ):
        found = tokenizer.encode_batch([texts[place] for place in order])
        if len(found) != len(order):
            raise CheckFailed(f"encode_batch returned {len(found)} lists for {len(order)} texts ({how})")
        for place, one in zip(order, found, strict=True):
            if one != alone[place]:
                raise CheckFailed(
                    f"{words.show(texts[place])} gives other ids alone than {how}: "
                    f"{words.difference(alone[place], one)}; encode each text by itself, without padding"
                )
    return f"{len(texts)} texts alone, together, in another order, and twice"


def any_text(subject: TokenizerSubject) -> str:
    """Every text that is valid Unicode is encoded, or refused with a TokenizerError; the empty one has no ids."""
    tokenizer = subject.tokenizer
    if (found := tokenizer.encode_batch([""])) != [[]]:
        raise CheckFailed(
            f"encode_batch(['']) is {found!r}; an empty text has no tokens: add no special tokens in encode_batch"
        )
    refused = []
    for name, text in subject.probes.items():
        try:
            tokenizer.encode_batch([text])
        except TokenizerError as error:
            if not str(error).strip():
                raise CheckFailed(f"{name}, {words.show(text)}, raises a TokenizerError that says nothing") from None
            refused.append(name)
        except Exception as error:
            raise CheckFailed(
                f"{name}, {words.show(text)}, raises {type(error).__name__}: {error}; encode every text, with an "
                "unknown token or bytes for what is not in the vocabulary, or raise a TokenizerError"
            ) from error
    total = len(subject.probes)
    return f"{total} texts" + (f", {len(refused)} refused: {', '.join(refused[:3])}..." if refused else "")


def long_text(subject: TokenizerSubject) -> str:
    """Time grows with the length, not with its square: corpora hold lines of megabytes."""
    draw = random.Random(subject.seed)
    slowest = 0.0
    for what, alphabet in (
        ("one letter", "a"),
        ("letters without spaces", "etaoinshrdlu"),
        ("Chinese", "中文再见你好"),
    ):
        for length in (LONG // 100, LONG // 10, LONG):
            seconds = _timed(subject, what, "".join(draw.choices(alphabet, k=length)))
            left = LONG // length
            if seconds > SECONDS or (left > 1 and seconds * left > SECONDS * 2):
                tail = "" if left == 1 else f", so {LONG:,} would take more than {SECONDS:.0f} s"
                raise CheckFailed(
                    f"{length:,} characters ({what}) take {seconds:.1f} s of processor time to encode and decode"
                    f"{tail}; look for work that grows with the square of a word's length, and cut long words"
                )
        slowest = max(slowest, seconds)
    return f"{LONG:,} characters without a space in {slowest:.1f} s at most"


def _timed(subject: TokenizerSubject, what: str, text: str) -> float:
    tokenizer = subject.tokenizer
    began = time.process_time()
    try:
        found = tokenizer.encode_batch([text])[0]
        tokenizer.decode(found)
    except TokenizerError:
        return 0.0
    except Exception as error:
        raise CheckFailed(f"{len(text):,} characters ({what}) raise {type(error).__name__}: {error}") from error
    seconds = time.process_time() - began
    if not found:
        raise CheckFailed(
            f"{len(text):,} characters ({what}) give no ids at all; nothing may be dropped for its length"
        )
    return seconds


def special_text(subject: TokenizerSubject) -> str:
    """A document that spells ``</s>`` holds four characters, and may not end itself."""
    tokenizer = subject.tokenizer
    forbidden = set(tokenizer.special.ids()) - subject.unknown
    names = [*SPELLINGS]
    for index in tokenizer.special.ids():
        try:
            names.append(tokenizer.token(index))
        except Exception:  # another check's concern
            continue
    names = [name for name in dict.fromkeys(names) if name]
    roles = {index: role for role, index in vars(tokenizer.special).items() if index is not None}
    count = 0
    for text in [*names, *(f"a{name}b" for name in names), "".join(names), " ".join(names)]:
        for how, found in _ways(subject, text):
            count += 1
            if bad := sorted(set(found) & forbidden):
                raise CheckFailed(
                    f"{how}({words.show(text)}) gives {bad[0]}, the {roles[bad[0]]} token ({words.ids(found)}); text "
                    "may never become a special token: encode it as the characters it is"
                )
    return f"{len(names)} spellings, encoded {count} times"


def _ways(subject: TokenizerSubject, text: str) -> Iterator[tuple[str, Sequence[int]]]:
    try:
        yield "encode_batch", subject.tokenizer.encode_batch([text])[0]
        yield "encode_segments", [i for part in subject.tokenizer.encode_segments([[text]])[0] for i in part]
    except Exception:  # what cannot be encoded is another check's concern
        return


def segments(subject: TokenizerSubject) -> str:
    """Boundaries of sentences do not change the tokens, and lie where the sentences do."""
    tokenizer = subject.tokenizer
    draw = random.Random(subject.seed)
    documents: list[list[str]] = [[], [""], ["", ""]]
    for text in subject.usable:
        documents += [[text], split_sentences(text), pieces(text, draw)]
    documents += [["", *documents[-1], ""]]
    found = tokenizer.encode_segments(documents)
    if len(found) != len(documents):
        raise CheckFailed(f"encode_segments returned {len(found)} lists for {len(documents)} documents")
    cuts = 0
    for document, parts in zip(documents, found, strict=True):
        text = "".join(document)
        if len(parts) != len(document):
            raise CheckFailed(
                f"encode_segments([{_shown(document)}]) returned {len(parts)} lists; it must return one for each of "
                f"the {len(document)} segments, empty ones included"
            )
        joined = [index for part in parts for index in part]
        whole = tokenizer.encode_batch([text])[0]
        if joined != whole:
            raise CheckFailed(
                f"the segments {_shown(document)} give other ids than their whole text: "
                f"{words.difference(joined, whole)}; override encode_segments: encode the whole, and cut the ids at "
                "the segments"
            )
        if tokenizer.decode(whole) == text:
            _check_cuts(subject, document, parts)
            cuts += max(0, len(parts) - 1)
    return f"{len(documents)} documents, the places of {cuts} boundaries"


def documents(subject: TokenizerSubject) -> str:
    """The arrays that preparation stores hold the ids of the whole texts, cut where the segments are."""
    tokenizer = subject.tokenizer
    draw = random.Random(subject.seed)
    given: list[list[str]] = [[], ["", ""]]
    for text in subject.usable:
        given += [[text], pieces(text, draw)]
    ids, lengths = tokenizer.encode_documents(given)
    count = sum(map(len, given))
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise CheckFailed(
            f"encode_documents returned arrays of {ids.dtype} {list(ids.shape)} and {lengths.dtype} "
            f"{list(lengths.shape)}; it must return two flat arrays of integers"
        )
    if len(lengths) != count or int(lengths.sum()) != len(ids) or (count and int(lengths.min()) < 0):
        raise CheckFailed(
            f"encode_documents returned {len(lengths)} lengths that add up to {int(lengths.sum())} for {len(ids)} ids; "
            f"it must return one for each of the {count} segments, and they must add up to the ids"
        )
    ends = [0, *lengths.cumsum().tolist()]
    parts = iter([ids[start:stop].tolist() for start, stop in pairwise(ends)])
    for document in given:
        mine = [next(parts) for _ in document]
        joined = [index for part in mine for index in part]
        whole = tokenizer.encode_batch(["".join(document)])[0]
        if joined != whole:
            raise CheckFailed(
                f"encode_documents gives other ids for {_shown(document)} than encode_batch for the text: "
                f"{words.difference(joined, whole)}"
            )
        if tokenizer.decode(whole) == "".join(document):
            _check_cuts(subject, document, mine)
    return f"{len(given)} documents of {count} segments"


def _check_cuts(subject: TokenizerSubject, document: list[str], parts: list[list[int]]) -> None:
    """A boundary may lie on either side of the token across it, and no further."""
    tokenizer = subject.tokenizer
    whole = [index for part in parts for index in part]
    read = tokens = 0
    for number, (segment, part) in enumerate(zip(document[:-1], parts, strict=False)):
        read += len(segment)
        tokens += len(part)
        least = len(tokenizer.decode(whole[: max(0, tokens - 1)]))
        most = len(tokenizer.decode(whole[: tokens + 1]))
        if not least - _SLACK <= read <= most + _SLACK:
            raise CheckFailed(
                f"of the segments {_shown(document)}, the first {number + 1} have {read:,} characters but were given "
                f"ids of {len(tokenizer.decode(whole[:tokens])):,}; a token belongs to the segment in which it begins"
            )


def _shown(document: list[str]) -> str:
    return "[" + ", ".join(words.show(segment) for segment in document[:6]) + (", ...]" if len(document) > 6 else "]")


CHECKS: tuple[Check[TokenizerSubject], ...] = (
    Check("any_text", "Every text is encoded or refused by name, and the empty text has no ids", any_text),
    Check("ids_in_range", "Ids are ints from 0 to vocab_size - 1", ids_in_range),
    Check("batch_independence", "A text's ids do not depend on the batch it is in", batch_independence),
    Check("long_text", f"{LONG:,} characters without a space take seconds, not hours", long_text),
    Check("special_text", "Text that spells a special token never becomes one", special_text),
    Check("documents", "The arrays that preparation stores hold the same ids, cut at the segments", documents),
    Check("segments", "A document in segments has the ids of its whole text, cut where the segments are", segments),
)
