"""An exported tokenizer makes the rows that the head was trained on: the special tokens stand where they stood.

A tokenizer.json says in its post-processor what is put around one text and around two. Where that is not what the head
puts there (or nothing is said), it is written anew; what a byte-level tokenizer does there to offsets is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from megalm.hf import files
from megalm.plugin.contract.hugging_face import HuggingFaceHead
from megalm.plugin.contract.tokenizer import Tokenizer

_ROLES = ("pad", "eos", "bos", "cls", "sep", "mask", "unk")
_PROBES = ("a", "b c")


def write_rows(folder: Path, tokenizer: Tokenizer, told: HuggingFaceHead, longest: int) -> None:
    """Mend the tokenizer's files in ``folder`` where they do not make the head's rows. ``longest``: a row in tokens."""
    path, config_path = folder / files.TOKENIZER, folder / files.TOKENIZER_CONFIG
    config = files.read_json(config_path) if config_path.is_file() else {}
    if not path.is_file() or _same(path, told):
        pass
    else:
        content = files.read_json(path)
        content["post_processor"] = _with_template(content.get("post_processor"), tokenizer, told)
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # others may put their own tokens around texts
    if told.typed:
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    config["model_max_length"] = longest
    for role, name in role_tokens(tokenizer).items():
        if config.get(role) is None:  # rows of several texts are padded
            config[role] = name
    files.write_json(config_path, config)


def role_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """``pad_token`` and its like as tokenizer_config.json has them."""
    ids = {role: getattr(tokenizer.special, role) for role in _ROLES}
    return {f"{role}_token": tokenizer.token(index) for role, index in ids.items() if index is not None}


def _same(path: Path, told: HuggingFaceHead) -> bool:
    engine = Engine.from_file(str(path))
    for texts in (_PROBES[:1], _PROBES):
        row = engine.encode(*texts)
        wanted = expected_row([engine.encode(text, add_special_tokens=False).ids for text in texts], told)
        if (row.ids, row.type_ids if told.typed else wanted[1]) != wanted:
            return False
    return True


def expected_row(texts: Sequence[Sequence[int]], told: HuggingFaceHead) -> tuple[list[int], list[int]]:
    """Tokens and token types of the head's row of texts given as tokens."""
    tokens, types = list(told.prefix), [0] * len(told.prefix)
    for number, ids in enumerate(texts):
        tokens += [*ids, *told.suffix]
        types += [number if told.typed else 0] * (len(ids) + len(told.suffix))
    return tokens, types


def _with_template(present: Any, tokenizer: Tokenizer, told: HuggingFaceHead) -> dict[str, Any]:
    special = {index: tokenizer.token(index) for index in (*told.prefix, *told.suffix)}

    def piece(index: int, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": special[index], "type_id": type_id}}

    row: list[dict[str, Any]] = [piece(index, 0) for index in told.prefix]
    shapes = []
    for number, name in enumerate("AB"):
        type_id = number if told.typed else 0
        row = [*row, {"Sequence": {"id": name, "type_id": type_id}}, *(piece(index, type_id) for index in told.suffix)]
        shapes.append(row)
    template = {
        "type": "TemplateProcessing",
        "single": shapes[0],
        "pair": shapes[1],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]} for index, name in special.items()},
    }
    offsets = _byte_level(present)
    return template if offsets is None else {"type": "Sequence", "processors": [offsets, template]}


def _byte_level(present: Any) -> dict[str, Any] | None:
    """What a byte-level tokenizer's post-processor does to offsets."""
    if not isinstance(present, dict):
        return None
    if present.get("type") == "Sequence":
        return next(filter(None, map(_byte_level, present.get("processors", []))), None)
    if present.get("type") == "ByteLevel":
        return present
    if present.get("type") == "RobertaProcessing":
        keys = ("add_prefix_space", "trim_offsets")
        return {"type": "ByteLevel", **{key: present.get(key, True) for key in keys}, "use_regex": True}
    return None
