"""Tokenizers as they are named, stored and found again.

A saved tokenizer is a folder: the plugin's own files beside ``megalm_tokenizer.json``, which says which component wrote
them and with what identity. Loading compares the identity, so that edited files, or a library that reads them
differently, are noticed before a single id is used.

Components are imported through ``resolve``, a function from a component's name to its class: the plugin manager's in a
run, a dictionary's in a test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megalm.data.manifest import TokenizerRecord
from megalm.data.store import TOKENIZER_FOLDER
from megalm.errors import PluginError, TokenizerError
from megalm.plugin.contract.tokenizer import Tokenizer

DESCRIPTOR = "megalm_tokenizer.json"
FORMAT = "megalm-tokenizer"
VERSION = 1

Resolve = Callable[[str], type[Tokenizer]]


def save_tokenizer(tokenizer: Tokenizer, component: str, folder: Path) -> None:
    """Write ``tokenizer``, of the plugin component ``component``, into an existing folder."""
    tokenizer.save(folder)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "component": component,
        "identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "special": asdict(tokenizer.special),
    }
    (folder / DESCRIPTOR).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def add_tokenizer(tokenizer: Tokenizer, component: str, store: Path) -> TokenizerRecord:
    """Save ``tokenizer`` in a token store that is being written; what the store's manifest says of it."""
    folder = store / TOKENIZER_FOLDER
    folder.mkdir()
    save_tokenizer(tokenizer, component, folder)
    return TokenizerRecord(
        component=component,
        identity=tokenizer.identity,
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.special.eos,
    )


def load_tokenizer(folder: Path, resolve: Resolve) -> tuple[str, Tokenizer]:
    """(component, tokenizer) from what :func:`save_tokenizer` wrote.

    Raises TokenizerError where the folder is none, is damaged, or gives a tokenizer of another identity; PluginError
    where the component is not installed.
    """
    path = folder / DESCRIPTOR
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be read: {error.strerror}; expected a folder of train-tokenizer"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TokenizerError(f'{path}: not a tokenizer\'s descriptor: "format" is not "{FORMAT}"')
    if content.get("version") != VERSION:
        raise TokenizerError(f"{path}: version {content.get('version')!r}, this megalm reads version {VERSION}")
    component, identity = content.get("component"), content.get("identity")
    if not isinstance(component, str) or not isinstance(identity, str):
        raise TokenizerError(f'{path}: "component" and "identity" must be strings')
    tokenizer = resolve(component).load(folder)
    if tokenizer.identity != identity:
        raise TokenizerError(
            f"{folder}: tokenizer {component} has identity {tokenizer.identity[:16]}, but {DESCRIPTOR} says "
            f"{identity[:16]}: its files were changed, or its plugin or library reads them differently; restore them, "
            "or train and prepare again"
        )
    return component, tokenizer


def tokenizer_from_spec(spec: str, resolve: Resolve) -> tuple[str, Tokenizer]:
    """(component, tokenizer) for what a user may write.

    ``COMPONENT`` (one that needs no training, such as byte), ``COMPONENT:PATH`` (a model file or folder of that
    component, such as ``hf:tokenizer.json``), a folder of ``train-tokenizer``, or a token store, whose tokenizer is
    meant.
    """
    folder = Path(spec)
    for place in (folder, folder / "tokenizer"):
        if os.path.isfile(place / DESCRIPTOR):
            return load_tokenizer(place, resolve)
    if os.path.isdir(folder):
        raise TokenizerError(f"{folder}: a folder without {DESCRIPTOR}; name what loads it, as in hf:{folder}")
    component, path, cls = _component_and_path(spec, resolve)
    if path is not None:
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise TokenizerError(f"{path}: no such file; tokenizer {component} was to be loaded from it")
        return component, cls.load(path)
    return component, cls.train((), cls.Config())


def _component_and_path(spec: str, resolve: Resolve) -> tuple[str, Path | None, type[Tokenizer]]:
    """Take a component's name, which may be ``plugin:name`` where plugins clash, from the front of ``spec``."""
    words = spec.split(":")
    problem: PluginError | None = None
    for count in range(1, min(len(words), 2) + 1):
        component, rest = ":".join(words[:count]), ":".join(words[count:])
        try:
            return component, Path(rest) if rest else None, resolve(component)
        except PluginError as error:
            problem = problem or error
    raise TokenizerError(
        f"{spec}: neither a folder with a tokenizer nor a tokenizer's name, as in byte, sentencepiece:FILE or hf:FILE"
        + (f" ({problem})" if problem else "")
    ) from problem
