"""What ``megalm data prepare`` is asked to do with documents, and what it says it did."""

from __future__ import annotations

from typing import Any

import typer
from pydantic import ValidationError

from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.manifest import Manifest
from megalm.errors import DataError


def cleaning_from(**values: Any) -> Cleaning:
    """A :class:`Cleaning` from options. DataError, naming the option, where one is out of range."""
    try:
        return Cleaning(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise DataError(f"--{option} {first['input']}: {first['msg'].lower()}") from None


def left_out(manifest: Manifest) -> list[tuple[str, int]]:
    """What was left out or replaced, and how often."""
    record = manifest.preparation
    found = [(f"documents removed: {reason}", count) for reason, count in record.removed.items()]
    found += [(f"documents skipped: {reason}", count) for reason, count in record.skipped.items()]
    found += [(f"replaced: {kind}", count) for kind, count in record.scrubbed.items()]
    if manifest.dropped_documents:
        found.append(("documents without a token", manifest.dropped_documents))
    return found


def show_prepared(manifest: Manifest) -> None:
    """Print the parts of a new store and what was left out of it."""
    for name, part in manifest.parts.items():
        typer.echo(
            f"{name}: {part.tokens:,} tokens, {part.sentences:,} sentences, {part.documents:,} documents "
            f"({part.tokens / part.documents:.1f} tokens each)"
        )
    for what, count in left_out(manifest):
        typer.echo(f"{count:,} {what}")
    if skipped := manifest.preparation.skipped_files:
        typer.echo(f"{len(skipped):,} files or folders were not read; megalm data inspect lists them")
