"""What ``megalm eval``, ``predict`` and ``quantize`` share: options, a checkpoint's head, and records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from megalm.data.labelled.records import Records
    from megalm.plugin.contract.head import Head
    from megalm.train.stored import Stored

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run's folder.")]
Data = Annotated[
    list[Path],
    typer.Option("--data", metavar="FILE", help="TSV, CSV, JSONL, CoNLL or SQuAD-like JSON; may be repeated."),
]
Format = Annotated[
    str | None, typer.Option("--format", help="tsv, csv, jsonl, conll or squad; default: as names tell.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=COLUMN", help="Where a field is, by name or number; may be repeated."),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="COLUMN=VALUE", help="Read only rows that have it; may be repeated."),
]
Header = Annotated[
    bool | None,
    typer.Option(
        "--header/--no-header", help="Whether a table's first row names its columns; default: as columns are given."
    ),
]
Skip = Annotated[bool, typer.Option("--skip", help="Leave out and count rows that cannot be read.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Records at a time; changes no prediction.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="float32, bfloat16 or float64; default: as it was trained.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
TokenizerSpec = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="SPEC", help="Where it is not beside the checkpoint or its run."),
]


@dataclass(frozen=True)
class Opened:
    """A checkpoint's head, and records for it."""

    stored: Stored
    name: str
    head: Head
    records: Records

    def predict(
        self,
        *,
        batch: int,
        precision: str | None,
        device: str,
        labelled: bool,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[list[Any], int]:
        """Predictions, and how many records were cut to the head's length. ``weights``: whole logical tensors, to
        compute with instead of the checkpoint's.
        """
        from megalm import launch
        from megalm.errors import UsageError
        from megalm.nn.module import fill_from_logical
        from megalm.optim.weights import DTYPES
        from megalm.parallel.bootstrap import Place
        from megalm.parallel.mesh import single_rank
        from megalm.train.scoring import predict_and_count

        precision = precision or self.stored.resolved.config.train.precision
        if precision not in DTYPES:
            raise UsageError(f"--precision {precision}: expected one of {', '.join(DTYPES)}")
        alone = single_rank(launch.choose_device(device, Place.from_environment()))
        model = self.stored.model(alone, precision)
        if weights is not None:
            fill_from_logical(model, alone, weights)
        return predict_and_count(model, self.name, self.head, self.records, micro_batch=batch, labelled=labelled)


def open_both(
    checkpoint: Path,
    data: list[Path],
    *,
    format: str | None,
    columns: list[str] | None,
    only: list[str] | None,
    header: bool | None,
    skip: bool,
    labelled: bool,
    tokenizer: str | None,
    plugins: list[str] | None,
) -> Opened:
    """The head of a checkpoint and the records of files; UsageError where either will not do."""
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.data.labelled.read import FORMATS, read_records
    from megalm.errors import UsageError
    from megalm.plugin.manager import PluginManager
    from megalm.train.scoring import stored_head

    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    manager = PluginManager.for_launch(plugins)
    stored = open_checkpoint(checkpoint, manager, tokenizer, required=True)
    name, head = stored_head(stored)
    records = read_records(
        data,
        head.fields(),
        format=format,  # type: ignore[arg-type]  # looked at above
        columns=_pairs("--column", columns),
        only=_pairs("--only", only),
        header=header,
        labelled=labelled,
        skip=skip,
    )
    return Opened(stored, name, head, records)


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    from megalm.errors import UsageError

    found: dict[str, str] = {}
    for text in given or []:
        key, sign, value = text.partition("=")
        if not sign or not key or key in found:
            raise UsageError(f"{option} {text}: expected NAME=VALUE, each name once")
        found[key] = value
    return found


def say_left_out(records: Records, cut: int | None, length: int) -> None:
    """Say on standard error what of the data was skipped, mended or cut."""
    told = [f"{count} skipped: {why}" for why, count in sorted(records.skipped.items())]
    told += [
        f"{count} {what}: the nearest place with the same text was taken" for what, count in records.mended.items()
    ]
    if cut:
        told.append(f"{cut} of {len(records)} records are longer than {length} tokens and were cut")
    for line in told:
        typer.echo(f"megalm: {line}", err=True)
