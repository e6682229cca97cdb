"""Training a tokenizer on the documents of input files, into a folder that appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megalm.config.pairs import settings_from_pairs
from megalm.config.settings import Settings
from megalm.data.folder import new_folder
from megalm.data.progress import Progress, ticking
from megalm.data.reading.documents import read_documents
from megalm.data.reading.inputs import find_inputs
from megalm.data.reading.options import Documents, Reading
from megalm.data.tokenizer import DESCRIPTOR, save_tokenizer
from megalm.plugin.contract.tokenizer import Tokenizer


def train_tokenizer(
    cls: type[Tokenizer],
    cfg: Settings,
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    component: str,
    documents: Documents = "blank-line",
    text_key: str = "text",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Tokenizer:
    """Train ``cls``, the plugin component ``component``, on the documents of ``inputs`` and save it in the new folder
    ``out``.

    Raises DataError for unusable input or output, TokenizerError where nothing can be learnt.
    """
    files = find_inputs(inputs).files
    reading = Reading(documents, text_key)
    tick = ticking(progress, sum(file.size for file in files))

    def texts() -> Iterator[str]:
        for file in files:
            yield from read_documents(file.path, reading, tick)

    with new_folder(Path(out), overwrite=overwrite, is_ours=is_tokenizer, what="tokenizer") as folder:
        tokenizer = cls.train(texts(), cfg)
        save_tokenizer(tokenizer, component, folder)
    return tokenizer


def training_settings(model: type[Settings], component: str, owner: str, pairs: Sequence[str]) -> Settings:
    """Settings of a tokenizer's training from ``key=value`` pairs of the command line.

    ``component`` is the tokenizer's name, ``owner`` who answers for ``model`` (``plugin tokenizers (megalm 1.0)``).
    Raises ConfigError with all that is wrong, each key in full (``tokenizer.hf.vocab_size``).
    """
    return settings_from_pairs(model, ("tokenizer", component), owner, pairs)


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a saved tokenizer: may ``overwrite`` replace it?"""
    return (folder / DESCRIPTOR).is_file()
