"""Saved files: byte-stable, sufficient, and never read as another tokenizer when they are damaged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.testing.check import Check, CheckFailed, NotApplicable
from megalm.testing.tokenizer import words
from megalm.testing.tokenizer.subject import TokenizerSubject
from megalm.testing.tokenizer.worker import describe, loaded_elsewhere


def save(tokenizer: Tokenizer, folder: Path) -> dict[str, bytes]:
    """Save into a folder; the contents of the files, by name."""
    tokenizer.save(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved_and_loaded(subject: TokenizerSubject) -> str:
    """What save writes is all that load needs."""
    from megalm.testing.tokenizer.training import same

    tokenizer = subject.tokenizer
    expected = describe(tokenizer, subject.usable)
    first = subject.folder("first")
    written = save(tokenizer, first)
    if not first.is_dir():
        raise CheckFailed("save put something in the place of the folder; it must write its files into it")
    # Another folder, with a name that is not plain, and the first one gone: nothing may lead back to it.
    second = subject.folder("zweiter Ordner, mit ü")
    shutil.copytree(first, second, dirs_exist_ok=True)
    shutil.rmtree(first)
    loaded = subject.cls.load(second)
    if not isinstance(loaded, Tokenizer):
        raise CheckFailed(f"{subject.component.target}.load returned {loaded!r}; it must return the tokenizer")
    same(subject, expected, describe(loaded, subject.usable), "saved and loaded")
    for how, other in (("saved twice", tokenizer), ("saved, loaded and saved", loaded)):
        again = save(other, subject.folder("again"))
        if again.keys() != written.keys():
            names = " and ".join(sorted(again.keys() ^ written.keys()))
            raise CheckFailed(f"{how}, the files are others: {names}")
        for name, content in written.items():
            if again[name] != content:
                place = next(
                    (i for i, (a, b) in enumerate(zip(content, again[name], strict=False)) if a != b), len(content)
                )
                raise CheckFailed(
                    f"{how}, {name} differs from byte {place:,} on ({content[place : place + 20]!r} and "
                    f"{again[name][place : place + 20]!r}); write it in one order, without times or paths"
                )
    sizes = ", ".join(f"{name} ({len(content):,} bytes)" for name, content in written.items())
    return sizes or "it writes no file"


def damaged_files(subject: TokenizerSubject) -> str:
    """Damage is found when the file is read, and named; what is read in spite of it is the same tokenizer or tells by
    its identity that it is not."""
    tokenizer = subject.tokenizer
    files = save(tokenizer, subject.folder("whole"))
    if not files:
        raise NotApplicable("it saves no file")
    probes = subject.usable[:30]
    expected = describe(tokenizer, probes)
    cases = list(_damages(files, random.Random(subject.seed), flips=150 if subject.full else 30))
    folders = []
    for _, _, content in cases:
        folder = subject.folder("damaged")
        for name, data in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        folders.append(folder)
    answers = loaded_elsewhere(subject.component.target, folders, probes, subject.folder("damaged, loaded"))
    refused = told = 0
    for (name, how, _), answer in zip(cases, answers, strict=False):
        _judge(name, how, answer, expected, probes)
        refused += "refused" in answer
        told += "refused" not in answer and answer["identity"] != expected["identity"]
    return (
        f"{len(cases)} kinds of damage: {refused} refused, {told} told by the identity, "
        f"{len(cases) - refused - told} without effect"
    )


def _judge(name: str, how: str, answer: dict[str, Any], expected: dict[str, Any], probes: list[str]) -> None:
    mend = "check what is read, and raise a TokenizerError that names the file"
    if "crashed" in answer:
        raise CheckFailed(f"loading with {name} {how} ends the process: {answer['crashed']}; {mend}")
    if "raised" in answer:
        raise CheckFailed(f"loading with {name} {how} raises {answer['raised']}; {mend}")
    if "refused" in answer:
        if Path(name).name not in answer["refused"]:
            raise CheckFailed(
                f"loading with {name} {how} raises a TokenizerError that does not name the file: {answer['refused']}"
            )
        return
    if answer["identity"] != expected["identity"]:
        return
    if "unusable" in answer:
        raise CheckFailed(
            f"loading with {name} {how} gives the same identity, but a tokenizer that raises {answer['unusable']}; "
            f"{mend}"
        )
    for text, ours, theirs in zip(probes, expected["ids"], answer["ids"], strict=True):
        if ours != theirs:
            raise CheckFailed(
                f"loading with {name} {how} gives other ids under the same identity: {words.show(text)} gives "
                f"{words.difference(ours, theirs)}; hash everything that decides the ids"
            )
    for key in ("vocab_size", "special"):
        if answer[key] != expected[key]:
            raise CheckFailed(
                f"loading with {name} {how} gives {key} {answer[key]} instead of {expected[key]} under the same "
                "identity; hash it too"
            )


def _damages(files: dict[str, bytes], draw: random.Random, flips: int) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(file, what was done to it, all files)."""
    for name, content in files.items():
        rest = {other: data for other, data in files.items() if other != name}
        yield name, "removed", rest
        yield name, "empty", {**rest, name: b""}
        size = len(content)
        for length in sorted({1, size // 4, size // 2, size - 1} - {0, size}):
            if length < size:
                yield name, f"cut to {length:,} of {size:,} bytes", {**rest, name: content[:length]}
        yield name, f"overwritten with {size:,} NUL bytes", {**rest, name: bytes(size)}
        yield name, "overwritten with random bytes", {**rest, name: draw.randbytes(size)}
        yield name, "followed by other bytes", {**rest, name: content + b"\xff\x00more"}
        # The beginning holds what says how to read the rest.
        places = {draw.randrange(size) for _ in range(flips)} | {
            draw.randrange(min(size, 200)) for _ in range(flips // 3)
        }
        for place in sorted(places) if size else ():
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            what = f"changed in byte {place:,} (0x{content[place]:02x} to 0x{changed[place]:02x})"
            yield name, what, {**rest, name: bytes(changed)}


CHECKS: tuple[Check[TokenizerSubject], ...] = (
    Check(
        "saved_and_loaded",
        "What is saved loads as the same tokenizer, and is saved as the same bytes",
        saved_and_loaded,
    ),
    Check("damaged_files", "Damaged or missing files are refused by name, never read as other ids", damaged_files),
)
