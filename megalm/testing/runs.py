"""Small runs for tests: a text, its token store, and a configuration ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.config.load import Resolved, load_config
from megalm.data.prepare import prepare
from megalm.data.tokenizer import tokenizer_from_spec
from megalm.parallel import rng
from megalm.plugin.manager import PluginManager
from megalm.train.prepare import Prepared, prepare_run

TEMPLATE = """
[run]
dir = "{run}"
seed = 7
[model]
architecture = "{architecture}"
layers = 2
hidden_size = 24
heads = 6
init_std = 0.3
[data]
path = "{data}"
[train]
objective = "{objective}"
steps = 4
sequence_length = 16
global_batch = 8
micro_batch = 8
lr = 1e-2
precision = "float64"
[launch]
threads = 1
device = "cpu"
"""


def write_text(path: Path, *, documents: int = 60, seed: int = 0) -> Path:
    """Documents of sentences of made-up words, apart by empty lines; the same for equal arguments."""
    draw = rng.generator("test text", seed)
    words = ["".join(draw.choice(list("abcdefghij"), size=int(n))) for n in draw.integers(1, 8, size=200)]
    pages = []
    for _ in range(documents):
        sentences = [
            " ".join(words[int(200 * u**3)] for u in draw.random(int(draw.integers(2, 9)))).capitalize() + "."
            for _ in range(int(draw.integers(1, 7)))
        ]
        pages.append(" ".join(sentences))
    path.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    return path


def make_store(
    folder: Path,
    *,
    documents: int = 60,
    seed: int = 0,
    manager: PluginManager | None = None,
    tokenizer: str = "byte",
    text: Path | None = None,
) -> Path:
    """A token store in ``folder/data`` of ``text``, or else of a made-up one.

    ``tokenizer``: as ``megalm data prepare --tokenizer`` takes it.
    """
    chosen = manager or PluginManager.for_launch(None)
    source = text or write_text(folder / "text.txt", documents=documents, seed=seed)
    component, built = tokenizer_from_spec(tokenizer, chosen.tokenizer_class)
    prepare([source], built, folder / "data", component=component, validation=0.2)
    return folder / "data"


def load_run(
    folder: Path,
    data: Path,
    *,
    objective: str = "causal_lm",
    architecture: str = "gpt2",
    overrides: Sequence[str] = (),
    manager: PluginManager | None = None,
) -> Resolved:
    """The configuration of a tiny model in float64 on the store; ``overrides`` as for ``--set``."""
    path = folder / "run.toml"
    path.write_text(
        TEMPLATE.format(run=folder / "run", architecture=architecture, data=data, objective=objective),
        encoding="utf-8",
    )
    return load_config(path, list(overrides), manager or PluginManager.for_launch(None))


def make_run(
    folder: Path,
    data: Path,
    *,
    objective: str = "causal_lm",
    architecture: str = "gpt2",
    overrides: Sequence[str] = (),
    world_size: int = 1,
    manager: PluginManager | None = None,
) -> Prepared:
    """The same, prepared to train."""
    manager = manager or PluginManager.for_launch(None)
    resolved = load_run(
        folder, data, objective=objective, architecture=architecture, overrides=overrides, manager=manager
    )
    return prepare_run(resolved, manager, world_size, "cpu")
