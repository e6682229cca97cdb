"""Training: repeatable in every process, blind to global random state, and told apart by the identity."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from megalm.config.settings import Settings
from megalm.config.toml import write_value
from megalm.config.validate import validate
from megalm.errors import MegalmError, TokenizerError
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.testing.check import Check, CheckFailed
from megalm.testing.fresh import FreshProcessError
from megalm.testing.tokenizer import words
from megalm.testing.tokenizer.files import save
from megalm.testing.tokenizer.subject import TokenizerSubject
from megalm.testing.tokenizer.worker import describe, trained_elsewhere

_IDENTITY = re.compile(r"[0-9a-f]{64}")
_OTHER_SETTINGS = 2
"""Settings, changed one at a time, that the quick form tries."""
_STATES = 3
"""States of the global random generators that are tried."""
_LITTLE: dict[str, list[str]] = {
    "no text": [],
    "an empty text": [""],
    "white space": [" \n\t "],
    "one character": ["a"],
    "NUL": ["\0"],
    "one character of several bytes": ["中"],
    "one word, many times": ["word"] * 300,
}


def same(subject: TokenizerSubject, expected: dict[str, Any], found: dict[str, Any], how: str) -> None:
    """CheckFailed unless two descriptions agree."""
    for key in ("vocab_size", "special"):
        if expected[key] != found[key]:
            raise CheckFailed(f"{how}: {key} is {found[key]} instead of {expected[key]}")
    for text, ours, theirs in zip(subject.usable, expected["ids"], found["ids"], strict=True):
        if ours != theirs:
            raise CheckFailed(f"{how}: {words.show(text)} gives other ids: {words.difference(ours, theirs)}")
    if expected["identity"] != found["identity"]:
        raise CheckFailed(
            f"{how}: the same ids, but the identity is {found['identity'][:16]} instead of "
            f"{expected['identity'][:16]}, so that data would be refused; hash what decides the ids and nothing else "
            "(no time, no path, no order of a set)"
        )


def training_repeats(subject: TokenizerSubject) -> str:
    """Same texts, same settings: same tokenizer, whatever the process."""
    expected = describe(subject.tokenizer, subject.usable)
    again = describe(subject.train(list(subject.texts)), subject.usable)
    same(
        subject,
        expected,
        again,
        "trained again on the same texts, given as a list instead of an iterator that can be read once",
    )
    saved = subject.folder("saved")
    save(subject.tokenizer, saved)
    for number in (1, 2):
        how = f"trained again on the same texts in a fresh process ({_order(number)})"
        try:
            found = trained_elsewhere(
                subject.component.target,
                subject.cfg.model_dump_json(by_alias=True),
                subject.texts,
                saved,
                subject.usable,
                subject.folder("fresh process"),
                subject.seed + number,
            )
        except FreshProcessError as error:
            raise CheckFailed(f"training or loading in a fresh process failed: {error}") from None
        same(subject, expected, found["trained"], how)
        same(subject, expected, found["loaded"], "saved here and loaded in a fresh process")
    characters = sum(map(len, subject.texts))
    return f"twice here and in 2 fresh processes, on {characters:,} characters"


def _order(number: int) -> str:
    return f"number {number}, another hash seed: sets and dictionaries of sets come in another order"


def random_state(subject: TokenizerSubject) -> str:
    """Global generators are everybody's: what they were seeded with may not matter."""
    expected = subject.tokenizer.encode_batch(subject.usable)
    for state in range(_STATES):
        with _global_state(subject.seed + state):
            again = subject.tokenizer.encode_batch(subject.usable)
        for text, ours, theirs in zip(subject.usable, expected, again, strict=True):
            if ours != theirs:
                raise CheckFailed(
                    f"encoding {words.show(text)} again gives other ids: {words.difference(ours, theirs)}; draw no "
                    "random numbers in encode_batch, and keep no state between calls"
                )
    trainings = _STATES if subject.full else 1
    for state in range(trainings):
        with _global_state(subject.seed + state):
            found = describe(subject.train(iter(subject.texts)), subject.usable)
        how = (
            "trained while the global random generators were in another state (draw from a generator with a fixed seed)"
        )
        same(subject, describe(subject.tokenizer, subject.usable), found, how)
    return f"encoded in {_STATES} states of the global generators, trained in {1 + trainings}"


@contextmanager
def _global_state(seed: int) -> Iterator[None]:
    """Python's, numpy's and, where it is loaded, torch's generators, seeded for a block."""
    python, numpy = random.getstate(), np.random.get_state()
    torch: Any = sys.modules.get("torch")
    others = None if torch is None else torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch is not None:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.random.set_rng_state(others)


def identity(subject: TokenizerSubject) -> str:
    """Whatever changes ids must change the identity, or data of one tokenizer is read with another."""
    tokenizer = subject.tokenizer
    found: Any = tokenizer.identity
    if not (isinstance(found, str) and _IDENTITY.fullmatch(found)):
        raise CheckFailed(
            f"identity is {found!r}; it must be the 64 hex digits of a SHA-256, such as hexdigest() gives"
        )
    if tokenizer.identity != found:
        raise CheckFailed(f"identity is {found} and then {tokenizer.identity}; the same tokenizer has one identity")
    others: list[tuple[str, Tokenizer]] = []
    for how, make in _others(subject):
        try:
            others.append((how, make()))
        except MegalmError:  # settings that do not go together, or too little text for them
            continue
    for how, other in others:
        if other.identity != found:
            continue
        for text in subject.usable:
            ours, theirs = tokenizer.encode_batch([text])[0], other.encode_batch([text])[0]
            if ours != theirs:
                raise CheckFailed(
                    f"trained {how}, {words.show(text)} gives other ids ({words.difference(ours, theirs)}), but the "
                    f"identity is the same, {found[:16]}; hash everything that decides the ids"
                )
    return f"{len(others)} other tokenizers: {', '.join(how for how, _ in others)}" if others else "nothing to train on"


def _others(subject: TokenizerSubject) -> Iterator[tuple[str, Callable[[], Tokenizer]]]:
    yield "on other texts", lambda: subject.train(iter(subject.other_texts()))
    yield "on fewer texts", lambda: subject.train(iter(subject.texts[: len(subject.texts) * 3 // 4]))
    settings = list(_other_settings(subject.cfg))
    if not subject.full:
        settings = random.Random(subject.seed).sample(settings, min(_OTHER_SETTINGS, len(settings)))
    for key, cfg, value in settings:
        yield f"with {key} = {write_value(value)}", partial(_train, subject, cfg)


def _train(subject: TokenizerSubject, cfg: Settings) -> Tokenizer:
    return subject.train(iter(subject.texts), cfg)


def _other_settings(cfg: Settings) -> Iterator[tuple[str, Settings, Any]]:
    """(key, settings with another choice there, choice) of each switch and each choice among names."""
    table = cfg.model_dump(mode="json", by_alias=True)
    for key, field in type(cfg).model_json_schema().get("properties", {}).items():
        choices = [False, True] if field.get("type") == "boolean" else field.get("enum", [])
        for choice in [choice for choice in choices if choice != table.get(key)]:
            changed, problems = validate(type(cfg), {**_given(table), key: choice})
            if changed is not None and not problems:
                yield key, changed, choice


def _given(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def little_text(subject: TokenizerSubject) -> str:
    """Nearly nothing to learn from ends in a TokenizerError that says so, or in a tokenizer that works."""
    refused = []
    for what, texts in _LITTLE.items():
        try:
            tokenizer = subject.train(iter(texts))
        except TokenizerError as error:
            if not str(error).strip():
                raise CheckFailed(f"training on {what} raises a TokenizerError that says nothing") from None
            refused.append(what)
            continue
        except CheckFailed:
            raise
        except Exception as error:
            raise CheckFailed(
                f"training on {what} ({words.show(' '.join(texts))}) raises {type(error).__name__}: {error}; raise a "
                "TokenizerError that says what is missing, or learn what there is"
            ) from error
        _works(tokenizer, what)
    return f"{len(_LITTLE)} texts of next to nothing, {len(refused)} of them refused"


def _works(tokenizer: Tokenizer, what: str) -> None:
    for text in ("", "a", "word 中"):
        try:
            found = tokenizer.encode_batch([text])[0]
            tokenizer.decode(found)
        except TokenizerError:
            continue
        except Exception as error:
            raise CheckFailed(
                f"trained on {what}, it raises {type(error).__name__} for {words.show(text)}: {error}; refuse the "
                "training with a TokenizerError, or give text without a token the unknown token"
            ) from error
        bad = [index for index in found if not 0 <= index < tokenizer.vocab_size]
        if bad:
            raise CheckFailed(f"trained on {what}, {words.show(text)} gives id {bad[0]}, but {tokenizer.vocab_size=}")


CHECKS: tuple[Check[TokenizerSubject], ...] = (
    Check("training_repeats", "Same texts and settings, same ids and identity, in every process", training_repeats),
    Check("random_state", "Neither training nor encoding depends on global random state", random_state),
    Check("identity", "The identity is a SHA-256 that changes whenever ids do", identity),
    Check("little_text", "Next to no text is refused, or gives a tokenizer that works", little_text),
)
