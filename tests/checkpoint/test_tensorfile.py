"""Files that safetensors reads as they were meant, and ranges read back into tensors of any strides."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalm.checkpoint import tensorfile
from megalm.checkpoint.hashing import HASHES, hash_file, hash_files
from megalm.checkpoint.tensorfile import TensorFile, write_tensors
from megalm.errors import CheckpointError

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    out = {
        f"{dtype} {shape}": (torch.randn(shape, generator=made) * 50).to(dtype)
        for dtype in TYPES
        for shape in ((), (0, 3), (7,), (5, 6), (3, 4, 5))
    }
    out["strided"] = torch.randn(6, 8, generator=made).t()[1:7:2]
    out["long rows"] = torch.randn(2, 3, 300, generator=made)
    out["larger than a block"] = torch.randn(1 << 19, generator=made)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().equal(b.contiguous())


@pytest.mark.parametrize("algorithm", HASHES)
def test_safetensors_reads_what_is_written(tmp_path: Path, algorithm: str) -> None:
    path, expected, moved = tmp_path / "a", tensors(1), []
    size, found = write_tensors(path, expected, algorithm, moved.append)
    assert size == path.stat().st_size == sum(moved)
    assert found == HASHES[algorithm](path.read_bytes()).hexdigest()  # type: ignore[call-arg]
    assert [hash_file(path, algorithm)] * 3 == hash_files([path] * 3, algorithm) * 1 == [found] * 3
    loaded = load_file(path)
    assert loaded.keys() == expected.keys()
    assert all(same(loaded[key], expected[key]) for key in expected)
    with safe_open(path, "pt") as file:
        assert file.metadata() is None


def test_ranges_of_what_safetensors_wrote(tmp_path: Path, campaign_seed: int) -> None:
    path, expected = tmp_path / "a", {key: t.contiguous() for key, t in tensors(2).items()}
    save_file(expected, path, metadata={"by": "safetensors"})
    draw = random.Random(f"{campaign_seed} ranges")
    with TensorFile(path) as file:
        assert file.entries.keys() == expected.keys()
        for key, tensor in expected.items():
            for number in range(8):
                box = tuple(slice(a := draw.randint(0, n), draw.randint(a, n)) for n in tensor.shape)
                if number % 2:  # one run of the file
                    box = (*box[:1], *(slice(0, n) for n in tensor.shape[1:]))
                wanted = tensor[box].contiguous()
                wide = torch.zeros(*wanted.shape, 2, dtype=tensor.dtype)
                for target in (torch.empty_like(wanted), wide[..., 1]):
                    file.copy(key, box, target)
                    assert same(target, wanted), (key, box)
                assert not wide[..., 0].any()


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="File exists"):
        write_tensors(tmp_path / "a", {}, "xxh3_128")
    assert (tmp_path / "a").read_text() == "mine"


def test_types_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex64"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex64)}, "xxh3_128")


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{"])
def test_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError, match=str(tmp_path / "a")):
        TensorFile(tmp_path / "a")


def test_what_fails_while_rows_are_copied_is_what_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of the mapping in its traceback once hid it behind an error of closing the file."""
    save_file({"a": torch.ones(8, 100)}, tmp_path / "a")

    def fail(to: np.ndarray, values: np.ndarray) -> None:
        raise ValueError(f"{values.shape}")

    monkeypatch.setattr(tensorfile, "_copy", fail)
    with pytest.raises(ValueError, match="50"), TensorFile(tmp_path / "a") as file:
        file.copy("a", (slice(0, 8), slice(0, 50)), torch.empty(8, 50))
