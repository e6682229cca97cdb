"""Ids to text: what comes back, what is lost, and what special tokens leave behind."""

from __future__ import annotations

from itertools import chain

from megalm.testing.check import Check, CheckFailed, NotApplicable
from megalm.testing.tokenizer import words
from megalm.testing.tokenizer.subject import TokenizerSubject

_SHARED = ({"bos", "cls"}, {"eos", "sep"})
"""Roles that one token may have, as in RoBERTa."""
_MOST_TOKENS = 200_000


def round_trip(subject: TokenizerSubject) -> str:
    """What was decoded encodes to the same ids, so that decoding loses nothing that encoding had kept."""
    tokenizer = subject.tokenizer
    exact = unknown = 0
    for text in subject.usable:
        found = tokenizer.encode_batch([text])[0]
        decoded = tokenizer.decode(found)
        if not isinstance(decoded, str):
            raise CheckFailed(f"decode returned {decoded!r}; it must return a str")
        if decoded == text:
            exact += 1
            continue
        if tokenizer.lossless:
            raise CheckFailed(
                f"the tokenizer says that it is lossless, but {words.show(text)} comes back as {words.show(decoded)}"
            )
        if subject.unknown & set(found):
            unknown += 1
            continue
        again = tokenizer.encode_batch([decoded])[0]
        if again != found:
            raise CheckFailed(
                f"{words.show(text)} is decoded as {words.show(decoded)}, which encodes to other ids: "
                f"{words.difference(found, again)}; decode must undo what encode_batch did, normalisation apart"
            )
    changed = len(subject.usable) - exact - unknown
    parts = [f"{exact} of {len(subject.usable)} texts come back exactly"]
    parts += [f"{unknown} hold unknown tokens"] * bool(unknown) + [f"{changed} come back normalised"] * bool(changed)
    dropped = _dropped(subject)
    if dropped:
        everything = len(set(chain.from_iterable(subject.usable)))
        parts.append(
            f"dropped without a trace: {len(dropped)} of {everything} characters ({words.characters(dropped)})"
        )
    return "; ".join(parts)


def _dropped(subject: TokenizerSubject) -> list[str]:
    """Characters that have no ids even when they are all that there is to encode; white space is not counted."""
    found = []
    for character in sorted(set(chain.from_iterable(subject.usable))):
        try:
            if not character.isspace() and not subject.tokenizer.encode_batch([character])[0]:
                found.append(character)
        except Exception:  # refused, so not dropped
            continue
    if found and subject.tokenizer.lossless:
        raise CheckFailed(f"the tokenizer says that it is lossless, but drops {words.characters(found)}")
    return found


def special_tokens(subject: TokenizerSubject) -> str:
    """Special tokens are ids of the vocabulary, one for each role, and leave no text behind."""
    tokenizer = subject.tokenizer
    roles = {role: index for role, index in vars(tokenizer.special).items() if index is not None}
    if not roles:
        raise NotApplicable("it has no special tokens")
    for role, index in roles.items():
        if type(index) is not int or not 0 <= index < tokenizer.vocab_size:
            raise CheckFailed(f"the {role} token has the id {index!r}; vocab_size is {tokenizer.vocab_size}")
        same = [other for other in roles if other > role and roles[other] == index]
        if any({role, other} not in _SHARED for other in same):
            raise CheckFailed(
                f"{role} and {same[0]} are both {index}; they need ids of their own (bos may serve as cls, eos as sep)"
            )
    if (nothing := tokenizer.decode([])) != "":
        raise CheckFailed(f"decode([]) is {nothing!r}; it must be ''")
    for role in (role for role in roles if role != "unk"):
        for text in subject.usable[:20]:
            found = tokenizer.encode_batch([text])[0]
            middle = len(found) // 2
            marked = [roles[role], *found[:middle], roles[role], *found[middle:], roles[role]]
            plain, with_token = tokenizer.decode(found), tokenizer.decode(marked)
            if plain != with_token:
                raise CheckFailed(
                    f"decode does not leave out the {role} token ({roles[role]}): with it before, in and after "
                    f"{words.show(text)}, the text is {words.show(with_token)} instead of {words.show(plain)}"
                )
    return ", ".join(f"{role} {index}" for role, index in roles.items())


def printable_tokens(subject: TokenizerSubject) -> str:
    """Every id has a form that ``megalm data inspect`` can show."""
    tokenizer = subject.tokenizer
    size = tokenizer.vocab_size
    step = -(-size // _MOST_TOKENS)
    empty = 0
    shown = range(0, size, step)
    for index in dict.fromkeys([*shown, size - 1, *tokenizer.special.ids()]):
        try:
            text = tokenizer.token(index)
        except Exception as error:
            raise CheckFailed(
                f"token({index}) raises {type(error).__name__}: {error}; every id below vocab_size ({size}) needs a "
                "printable form, unused ones too"
            ) from error
        if not isinstance(text, str):
            raise CheckFailed(f"token({index}) is {text!r}; it must be a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise CheckFailed(
                f"token({index}) is {text!a}, which cannot be printed: half of a surrogate pair"
            ) from None
        empty += not text
    return f"{len(shown):,} ids" + (f", {empty} of them empty texts" if empty else "")


CHECKS: tuple[Check[TokenizerSubject], ...] = (
    Check("round_trip", "Decoded text encodes to the same ids, and is the same text where that is claimed", round_trip),
    Check("special_tokens", "Special tokens have ids of their own and leave no text behind", special_tokens),
    Check("printable_tokens", "Every id has a printable form", printable_tokens),
)
