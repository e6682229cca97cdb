"""``megalm data``: text to token stores, tokenizers to train, and a look at what came out."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megalm.cli.options import Overrides, Plugins, names
from megalm.data.manifest import Manifest
from megalm.data.readers import DOCUMENTS
from megalm.data.tokenizer import Resolve, tokenizer_from_spec
from megalm.errors import DataError

app = typer.Typer(
    name="data",
    help="Prepare and inspect data, and train tokenizers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Inputs = Annotated[
    list[Path],
    typer.Argument(metavar="INPUT...", help="Text or JSONL files (.jsonl, .ndjson, .json), gzip of either."),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder to write.")]
Cut = Annotated[
    str,
    typer.Option(
        "--documents",
        metavar="HOW",
        help="What is a document in a text file: blank-line (text between empty lines), line, or file. "
        "A JSONL row always is one.",
    ),
]
TextKey = Annotated[str, typer.Option("--text-key", metavar="KEY", help="Key of the text in JSONL rows.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run of this command wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Store = Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by megalm data prepare.")]
Prefix = Annotated[
    Path, typer.Argument(metavar="PREFIX", help="Of PREFIX.bin and PREFIX.idx, a dataset of Megatron-LM.")
]


@app.command()
def prepare(
    inputs: Inputs,
    out: Out,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="SPEC",
            help="byte, sentencepiece:FILE.model, hf:tokenizer.json, or a folder of train-tokenizer.",
        ),
    ] = "byte",
    validation: Annotated[
        float, typer.Option("--validation", metavar="SHARE", help="Share of documents held out, chosen by their hash.")
    ] = 0.1,
    documents: Cut = "blank-line",
    text_key: TextKey = "text",
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Tokenise text into a memory-mapped store with a train and a validation part."""
    from megalm.data.prepare import prepare as run

    how = _documents(documents)
    component, loaded = tokenizer_from_spec(tokenizer, resolver(plugins))
    with _progress("preparing") as progress:
        manifest = run(
            inputs,
            loaded,
            out,
            component=component,
            validation=validation,
            documents=how,
            text_key=text_key,
            overwrite=overwrite,
            progress=progress,
        )
    _echo_parts(manifest)
    typer.echo(f"wrote {out}")


@app.command("train-tokenizer")
def train_tokenizer(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Tokenizer component: sentencepiece, hf, ...")],
    inputs: Inputs,
    out: Out,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Setting of the tokenizer, such as vocab_size=8000; repeatable."
        ),
    ] = None,
    documents: Cut = "blank-line",
    text_key: TextKey = "text",
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Train a tokenizer; name its folder as --tokenizer of prepare."""
    from megalm.data.learn import train_tokenizer as run
    from megalm.data.learn import training_settings
    from megalm.plugin.manager import PluginManager

    how = _documents(documents)
    manager = PluginManager.for_launch(names(plugins))
    cls = manager.load_class("tokenizers", kind)
    owner = f"plugin {manager.get('tokenizers', kind).plugin}"
    cfg = training_settings(cls.Config, kind, owner, sets or [])
    with _progress("reading") as progress:
        tokenizer = run(
            cls,
            cfg,
            inputs,
            out,
            component=kind,
            documents=how,
            text_key=text_key,
            overwrite=overwrite,
            progress=progress,
        )
    special = ", ".join(f"{name} {index}" for name, index in asdict(tokenizer.special).items() if index is not None)
    typer.echo(f"{kind}: vocabulary {tokenizer.vocab_size:,}, special tokens: {special or 'none'}")
    typer.echo(f"identity {tokenizer.identity}")
    typer.echo(f"wrote {out}")


@app.command("import-megatron")
def import_megatron(
    prefix: Prefix,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="SPEC", help="The tokenizer that the dataset was made with.")
    ],
    out: Out,
    validation: Annotated[
        float, typer.Option("--validation", metavar="SHARE", help="Share of documents held out: the last ones.")
    ] = 0.01,
    validation_prefix: Annotated[
        Path | None,
        typer.Option("--validation-prefix", metavar="PREFIX", help="Dataset for the validation part, instead."),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the ids; else they are read where they are, and must stay there.")
    ] = False,
    ignore_modes: Annotated[
        bool, typer.Option("--ignore-modes", help="Take every sequence of a multimodal dataset for text.")
    ] = False,
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Make a store over a dataset of Megatron-LM, PREFIX.bin and PREFIX.idx, to train on it in place."""
    from megalm.data.megatron.importing import import_megatron as run

    component, loaded = tokenizer_from_spec(tokenizer, resolver(plugins))
    with _progress("reading") as progress:
        manifest, remarks = run(
            prefix,
            loaded,
            out,
            component=component,
            validation=validation,
            validation_prefix=validation_prefix,
            copy=copy,
            ignore_modes=ignore_modes,
            overwrite=overwrite,
            progress=progress,
        )
    _echo_parts(manifest)
    for remark in remarks:
        typer.echo(remark)
    typer.echo(f"wrote {out}")


@app.command("export-megatron")
def export_megatron(
    store: Store,
    prefix: Prefix,
    part: Annotated[str, typer.Option("--part", metavar="PART", help="train or validation.")] = "train",
    sequences: Annotated[
        str,
        typer.Option(
            "--sequences", metavar="WHAT", help="A sequence for each of the documents (GPT), or sentences (BERT)."
        ),
    ] = "documents",
    overwrite: Overwrite = False,
) -> None:
    """Write a part of a store as a dataset of Megatron-LM, PREFIX.bin and PREFIX.idx."""
    from megalm.data.megatron.export import export_megatron as run
    from megalm.data.store import TokenStore

    source = TokenStore.open(store, part)
    with _progress("writing") as progress:
        written = run(source, prefix, sequences=sequences, overwrite=overwrite, progress=progress)
    typer.echo(f"{part}: {source.num_tokens:,} tokens, {source.num_documents:,} documents")
    typer.echo(f"wrote {written[0]} and {written[1]}")


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(metavar="DIR|RUN.toml", help="A token store, or a run's configuration.")],
    part: Annotated[str, typer.Option("--part", metavar="PART", help="train or validation.")] = "train",
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=0, help="Documents to decode.")] = 3,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare all hashes first.")] = False,
    overrides: Overrides = None,
    plugins: Plugins = None,
) -> None:
    """Show a store's manifest, decoded documents, and how long documents are.

    Given a run's configuration instead, show the rows of its first step as its objective builds them: [input->label]
    where a masked token is to be recovered.
    """
    if store.suffix == ".toml":
        from megalm.cli.show_examples import show_examples

        show_examples(store, overrides or [], max(1, samples), names(plugins))
        return
    from megalm.cli.show_store import show_store

    show_store(store, part, samples, verify, resolver(plugins))


@app.command()
def baselines(store: Store, json: Json = False) -> None:
    """Cross-entropies of a unigram and a smoothed bigram model: fitted on train, scored on validation."""
    from megalm.data.ngram import baselines as score
    from megalm.data.store import TokenStore

    train, validation = TokenStore.open(store, "train"), TokenStore.open(store, "validation")
    found = score(train, validation, train.vocab_size)
    if json:
        typer.echo(jsonlib.dumps(asdict(found)))
        return
    typer.echo(f"unigram {found.unigram:.4f} nats per token")
    typer.echo(f"bigram  {found.bigram:.4f} nats per token")
    typer.echo(f"over {found.tokens:,} tokens of the validation part")


def _echo_parts(manifest: Manifest) -> None:
    for name, part in manifest.parts.items():
        typer.echo(
            f"{name}: {part.tokens:,} tokens, {part.sentences:,} sentences, {part.documents:,} documents "
            f"({part.tokens / part.documents:.1f} tokens each)"
        )
    if manifest.dropped_documents:
        typer.echo(f"dropped {manifest.dropped_documents:,} documents that have no tokens")


def resolver(plugins: str | None) -> Resolve:
    """Tokenizer classes by component name, from the installed plugins or exactly those of ``--plugins``."""
    from megalm.plugin.manager import PluginManager

    manager = PluginManager.for_launch(names(plugins))

    def resolve(name: str) -> Any:
        return manager.load_class("tokenizers", name)

    return resolve


def _documents(text: str) -> Any:
    if text not in DOCUMENTS:
        raise DataError(f"--documents {text}: expected one of {', '.join(DOCUMENTS)}")
    return text


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
