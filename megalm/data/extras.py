"""Libraries that only some inputs need, with an error that names the extra where one is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import IO, Any

from megalm.errors import DataError


def load_extra(names: tuple[str, ...], what: str, extra: str = "data") -> Any:
    """The first of these modules that can be imported. DataError, saying what needs it, where none can."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise DataError(f"{what} needs the Python module {names[-1]}; install it with: pip install 'megalm[{extra}]'")


def parquet_file(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``. DataError where it cannot be read."""
    parquet = load_extra(("pyarrow.parquet",), f"{path}: Parquet")
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from None


def zstd_stream(path: Path, source: IO[bytes]) -> tuple[IO[bytes], type[Exception]]:
    """A stream of the decompressed bytes, and the library's error."""
    zstd = load_extra(("compression.zstd", "backports.zstd"), f"{path}: Zstandard")
    return zstd.ZstdFile(source, "rb"), zstd.ZstdError
