"""``megalm data``: text to token stores, tokenizers to train, and a look at what came out."""

from __future__ import annotations

import json as jsonlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megalm.cli.options import Overrides, Overwrite, Plugins, names
from megalm.cli.show_progress import show_progress
from megalm.data.reading.options import DOCUMENTS, MAX_DOCUMENT
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
    typer.Argument(
        metavar="INPUT...",
        help="Files, patterns, folders: text, JSONL (.jsonl, .ndjson, .json), gzip or Zstandard of either, Parquet.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder to write.")]
Cut = Annotated[
    str,
    typer.Option(
        "--documents",
        metavar="HOW",
        help="What is a document in a text file: blank-line (text between empty lines), line, or file. "
        "A row of JSONL or Parquet always is one.",
    ),
]
TextKey = Annotated[
    str, typer.Option("--text-key", metavar="KEY", help="Key of the text in rows of JSONL, column of Parquet.")
]
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
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Processes; 0: as many as there are cores for them.")
    ] = 0,
    normalize: Annotated[str, typer.Option("--normalize", help="Unicode normalisation: none, NFC or NFKC.")] = "none",
    strip_control: Annotated[
        bool, typer.Option("--strip-control", help="Remove control characters and invisible ones that order text.")
    ] = False,
    languages: Annotated[
        str, typer.Option("--languages", metavar="A,B", help="Keep documents in these languages, as in en,zh.")
    ] = "",
    min_characters: Annotated[
        int, typer.Option("--min-characters", metavar="N", help="Leave out shorter documents.")
    ] = 0,
    max_characters: Annotated[
        int, typer.Option("--max-characters", metavar="N", help="Leave out longer documents; 0: no limit.")
    ] = 0,
    max_repetition: Annotated[
        float,
        typer.Option("--max-repetition", metavar="SHARE", help="Leave out documents that repeat more of themselves."),
    ] = 1.0,
    scrub: Annotated[
        str, typer.Option("--scrub", metavar="A,B", help="Replace personal data: email, ip, phone, card, iban.")
    ] = "",
    dedup: Annotated[
        str, typer.Option("--dedup", metavar="HOW", help="Leave out repeated documents: none, exact or near.")
    ] = "none",
    similarity: Annotated[
        float, typer.Option("--similarity", metavar="SHARE", help="From which documents are near duplicates.")
    ] = 0.8,
    sentences: Annotated[
        bool, typer.Option("--sentences/--no-sentences", help="Find sentences, or let each document count as one.")
    ] = True,
    on_error: Annotated[
        str, typer.Option("--on-error", metavar="HOW", help="What cannot be used: stop, or skip and count it.")
    ] = "stop",
    max_document_bytes: Annotated[
        int, typer.Option("--max-document-bytes", metavar="N", help="A longer document cannot be used.")
    ] = MAX_DOCUMENT,
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Tokenise text into a memory-mapped store with a train and a validation part.

    A run that was killed goes on where it was when it is started again with the same arguments.
    """
    from megalm.cli.show_prepared import cleaning_from, show_prepared
    from megalm.data.prepare import prepare as run

    how = _documents(documents)
    if on_error not in ("stop", "skip"):
        raise DataError(f"--on-error {on_error}: expected stop or skip")
    cleaning = cleaning_from(
        normalize=normalize,
        strip_control=strip_control,
        languages=tuple(names(languages) or ()),
        min_characters=min_characters,
        max_characters=max_characters,
        max_repetition=max_repetition,
        scrub=tuple(names(scrub) or ()),
        dedup=dedup,
        similarity=similarity,
    )
    component, loaded = tokenizer_from_spec(tokenizer, resolver(plugins))
    with show_progress("preparing") as progress:
        manifest = run(
            inputs,
            loaded,
            out,
            component=component,
            validation=validation,
            documents=how,
            text_key=text_key,
            cleaning=cleaning,
            sentences=sentences,
            skip=on_error == "skip",
            max_document=max_document_bytes,
            workers=workers or len(os.sched_getaffinity(0)),
            overwrite=overwrite,
            progress=progress,
        )
    show_prepared(manifest)
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
    with show_progress("reading") as progress:
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
    from megalm.cli.show_prepared import show_prepared
    from megalm.data.megatron.importing import import_megatron as run

    component, loaded = tokenizer_from_spec(tokenizer, resolver(plugins))
    with show_progress("reading") as progress:
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
    show_prepared(manifest)
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
    with show_progress("writing") as progress:
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
    where a masked token is to be recovered, | between documents that share a row.
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
