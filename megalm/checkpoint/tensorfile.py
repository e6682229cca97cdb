"""One safetensors file: written while it is hashed, and read in ranges straight into where they belong.

The format is that of safetensors (an 8-byte length, a JSON header, the values), and any of its readers reads these
files. The library itself writes whole dictionaries without a hash and makes new tensors when it reads; a checkpoint
wants one pass over the bytes on the way out, and on the way in no copy but the one into the live tensor. A header is
taken at its word only where every number in it fits the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self, TypeGuard

import numpy as np
import torch

from megalm.checkpoint.hashing import BLOCK, HASHES
from megalm.errors import CheckpointError
from megalm.native.helpers import helpers

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of types, and torch's."""
_CODES = {name: code for code, name in _NAMES.items()}
_MOST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
_LEAST_ROW = 256
"""Bytes below which a row has hardly a cache line of its own."""
_MOST_AT_ONCE = 1 << 30
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_RAW_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``; CheckpointError for a type that the format lacks."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise CheckpointError(f"tensors of type {name} cannot be saved; safetensors has {', '.join(sorted(_CODES))}")
    return name


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], algorithm: str, moved: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Write a new file and sync it; its size in bytes and its hash.

    Tensors may lie on any device and have any strides. ``moved`` is told the bytes of each block once it is written.
    CheckpointError where the file cannot be written.
    """
    entries: dict[str, object] = {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        code = _CODES[dtype_name(tensor.dtype)]
        entries[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    found, size = HASHES[algorithm](), 8 + len(header) + end
    try:
        # As the folder has it for other files: safetensors' own are for their owner alone.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _reserve(handle, size)
            first = memoryview(struct.pack("<Q", len(header)) + header)
            # A generator: of a device's tensors only one lies on the host at a time.
            for block in chain([first], map(_bytes, tensors.values())):
                for start in range(0, len(block), BLOCK):
                    part = block[start : start + BLOCK]
                    found.update(part)
                    done = 0
                    while done < len(part):
                        done += os.write(handle, part[done:])
                    if moved is not None:
                        moved(len(part))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); is the disk full?") from error
    return size, found.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    host = tensor.detach().to("cpu").contiguous()
    if not host.numel():
        return memoryview(b"")
    # Dimensions of one element may have any stride, and torch would not take that for bytes.
    return host.as_strided((host.numel(),), (1,)).view(torch.uint8).numpy().data


def _reserve(handle: int, size: int) -> None:
    """Take the file's blocks from the file system at once: it is a third faster, and a full disk shows before the
    writing.

    The system call, not its namesake of POSIX, which writes every block where a file system cannot reserve them.
    """
    if sys.platform != "linux" or not size:
        return
    with contextlib.suppress(AttributeError):
        reserve = ctypes.CDLL(None, use_errno=True).fallocate
        reserve.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        while reserve(handle, 0, 0, size):
            number = ctypes.get_errno()
            if number in _NO_ROOM:
                raise OSError(number, os.strerror(number))
            if number != errno.EINTR:
                return


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what the header says of it, checked against the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte in the file at which its values begin."""


class TensorFile:
    """A safetensors file that is open for reading. CheckpointError, naming file and tensor, for whatever does not
    fit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("rb", buffering=0))
                size = os.fstat(self._file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors file")
                self._map = stack.enter_context(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
            self.entries = self._header(size)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # What failed may have left a view of the mapping behind in its traceback, and is what the caller has to hear.
        with contextlib.suppress(*(() if kind is None else (BufferError,))):
            self._stack.close()

    def _header(self, size: int) -> dict[str, Entry]:
        (length,) = struct.unpack("<Q", self._map[:8])
        if length > min(size - 8, _MOST_HEADER):
            raise CheckpointError(f"{self.path}: header: {length} bytes are announced, the file has {size}")
        try:
            header = json.loads(self._map[8 : 8 + length].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: header: not JSON ({error})") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: header: expected a JSON object, found {type(header).__name__}")
        header.pop("__metadata__", None)
        return {key: self._entry(key, value, 8 + length, size) for key, value in header.items()}

    def _entry(self, key: str, value: object, first: int, size: int) -> Entry:
        def refuse(field: str, found: object) -> CheckpointError:
            return CheckpointError(f"{self.path}: tensor {key!r}: {field} {found!r} is not one that fits this file")

        record = value if isinstance(value, dict) else {}
        code, shape, offsets = (record.get(field) for field in ("dtype", "shape", "data_offsets"))
        if not isinstance(code, str) or code not in _NAMES:
            raise refuse("dtype", code)
        if not _naturals(shape):
            raise refuse("shape", shape)
        if not _naturals(offsets) or len(offsets) != 2:
            raise refuse("data_offsets", offsets)
        bytes_ = math.prod(shape) * getattr(torch, _NAMES[code]).itemsize
        if offsets[1] - offsets[0] != bytes_ or first + offsets[1] > size:
            raise refuse("data_offsets", offsets)
        return Entry(_NAMES[code], tuple(shape), first + offsets[0])

    def copy(self, key: str, box: tuple[slice, ...], target: torch.Tensor) -> None:
        """Copy a range of a tensor into ``target``, which has its shape and type; only that range is read."""
        entry = self.entries[key]
        count = math.prod(entry.shape)
        if not count:
            return
        run = target.device.type == "cpu" and target.is_contiguous() and _is_run(box, entry.shape)
        if run and isinstance(helpers(), str):
            self._read(entry.start + _offset(box, entry.shape) * target.element_size(), target)
            return
        # Of rows in part, the kernel brings just the pages that are touched. Bits are bits to numpy.
        raw = _RAW[target.element_size()]
        values = np.frombuffer(self._map, raw, count, entry.start).reshape(entry.shape)[box]
        if target.device.type == "cpu":
            _copy(_as_raw(target), values)
            return
        with torch.cuda.device(target.device):  # whose context the pinned memory is to belong to
            host = torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
            _copy(_as_raw(host), values)
            target.copy_(host)

    def _read(self, start: int, target: torch.Tensor) -> None:
        """Bytes from ``start`` on, straight into a contiguous tensor on the host."""
        left = _bytes(target)
        try:
            while left:
                if not (count := os.preadv(self._file.fileno(), [left[:_MOST_AT_ONCE]], start)):
                    raise CheckpointError(f"{self.path}: ends at byte {start}: truncated while it was read")
                left, start = left[count:], start + count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error


def _is_run(box: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    """Whether a range is one piece of the file: all of every dimension but the first."""
    return all(part.start == 0 and part.stop == size for part, size in zip(box[1:], shape[1:], strict=True))


def _offset(box: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """Values before a run."""
    return int(box[0].start) * math.prod(shape[1:]) if box else 0


def _copy(to: np.ndarray, values: np.ndarray) -> None:
    """``to[...] = values``, without torch's threads, in whichever thread this is. Rows that are long enough by the
    helper, which spares the memory a third of the traffic: what a system call that reads into ``to`` cannot do."""
    rows = to.ndim > 0 and to.strides[-1] == to.itemsize and to.shape[-1] * to.itemsize >= _LEAST_ROW
    native = helpers() if rows else ""
    if isinstance(native, str):
        np.copyto(to, values)
    else:
        native.copy_rows(to, values)


def _as_raw(tensor: torch.Tensor) -> np.ndarray:
    """A host tensor's memory as unsigned integers of the same width."""
    width = tensor.element_size()
    return tensor.detach().view(_RAW_TORCH[width]).numpy().view(_RAW[width])


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
