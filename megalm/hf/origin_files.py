"""What an imported checkpoint's own files say of how its model is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.hf import files
from megalm.model.hf.origin import FOLDER, Origin
from megalm.train.stored import Stored


def adds_bos(checkpoint: Path) -> bool:
    """Whether transformers' tokenizer begins every text with its bos token."""
    path = checkpoint / FOLDER / files.TOKENIZER_CONFIG
    if path.is_file() and (said := files.read_json(path).get("add_bos_token")) is not None:
        return bool(said)
    path = checkpoint / FOLDER / files.TOKENIZER
    if not path.is_file():
        return False
    template = (files.read_json(path).get("post_processor") or {}).get("single") or []
    return bool(template) and "SpecialToken" in template[0]


def end_tokens(stored: Stored) -> list[int]:
    """Tokens that end a text: those of the imported generation settings, else the tokenizer's end-of-document token."""
    origin = Origin.of(stored.manifest.state)
    path = stored.folder / FOLDER / files.GENERATION
    said: Any = files.read_json(path).get("eos_token_id") if path.is_file() else None
    if said is None and origin is not None:
        said = origin.config.get("eos_token_id")
    if said is None:
        said = stored.tokenizer.special.eos
    found = said if isinstance(said, list) else [said]
    return [token for token in found if isinstance(token, int)]
