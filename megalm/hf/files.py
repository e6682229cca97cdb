"""What lies in a Hugging Face folder: configuration, tensors in one or several safetensors files, tokenizer files.

Weights in pickle are refused: reading them can run code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megalm.errors import CheckpointError, ConfigError

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What a tokenizer may be made of; the first is all that megalm reads."""
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError where there is none."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; expected a Hugging Face folder") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; found {type(content).__name__}")
    return content


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its name. CheckpointError names the file that is missing, damaged or pickled."""
    files = {SINGLE: None} if (folder / SINGLE).is_file() else _sharded(folder)
    found: dict[str, torch.Tensor] = {}
    for file, expected in files.items():
        path = folder / file
        try:
            with safe_open(path, framework="pt") as content:
                names = set(content.keys())
                if expected is not None and (lacking := sorted(expected - names)):
                    raise CheckpointError(f"{path}: lacks {lacking[0]}, which {INDEX} says is there")
                for name in sorted(names if expected is None else expected):
                    found[name] = content.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return found


def _sharded(folder: Path) -> dict[str, set[str] | None]:
    """Names by file, from the index."""
    path = folder / INDEX
    if not path.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if _PICKLED.fullmatch(p.name)) if folder.is_dir() else []
        if pickled:
            raise CheckpointError(
                f"{folder / pickled[0]}: weights in pickle are not read, because reading them can run code. Take the "
                "folder's safetensors version where there is one; else, where you trust it, convert it once with "
                "transformers: AutoModel.from_pretrained(...).save_pretrained(NEW, safe_serialization=True)"
            )
        raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}; is it a Hugging Face model folder?")
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f'{path}: "weight_map" must say in which file each tensor is')
    files: dict[str, set[str] | None] = {}
    for name, file in index.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} is said to be in {file!r}, which is no safetensors file beside it")
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    return dict(sorted(files.items()))


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], max_bytes: int) -> list[str]:
    """Write tensors into one file, or into several of at most ``max_bytes`` (but at least one tensor) and an index; the
    files' names."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        write_json(folder / INDEX, index)
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read; the folder says who else may.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
    return names


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write a JSON object or list into a folder that nobody else sees yet."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def present(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Those of the files that are there."""
    return (folder / name for name in names if (folder / name).is_file())


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of the files that are there; their names."""
    copied = []
    for path in present(source, names):
        shutil.copyfile(path, target / path.name)
        copied.append(path.name)
    return copied


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB``, ``2GiB`` or a number; ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise ConfigError([f"{text!r} is no size; write it as 500MB, 5GB or 2GiB"])
    return size
