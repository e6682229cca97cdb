"""The ``megalm`` command: its sub-commands, and how errors leave it.

What the user can mend is one message on standard error and exit status 2, without a traceback. Anything else is a
defect and shows all it has.
"""

from __future__ import annotations

import atexit
import gc
import io
import sys

import typer

from megalm.cli.check_plugin import check_plugin
from megalm.cli.config import config
from megalm.cli.doctor import doctor
from megalm.cli.evaluate import evaluate
from megalm.cli.generate import generate
from megalm.cli.lazy import lazy_group
from megalm.cli.merge import merge
from megalm.cli.new_plugin import new_plugin
from megalm.cli.plan import plan
from megalm.cli.plugins import plugins
from megalm.cli.predict import predict
from megalm.cli.prune import prune
from megalm.cli.quantize import quantize
from megalm.cli.schedule import schedule
from megalm.errors import UsageError

app = typer.Typer(
    name="megalm",
    help="Train language models with plugins. A run itself starts with: torchrun -m megalm.launch RUN.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(plugins)
app.command()(check_plugin)
app.command()(new_plugin)
app.command()(config)
app.command()(plan)
app.command()(schedule)
app.command()(doctor)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(merge)
app.command()(prune)
app.command()(quantize)
app.add_typer(
    typer.Typer(
        name="data",
        cls=lazy_group("megalm.cli.data"),
        help="Prepare and inspect data, and train tokenizers.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
)
for verb, summary in (
    ("import", "Make a checkpoint of a model from elsewhere."),
    ("export", "Write a checkpoint as others read it."),
):
    app.add_typer(
        typer.Typer(
            name=verb,
            cls=lazy_group(f"megalm.cli.{verb}_model"),
            help=summary,
            no_args_is_help=True,
            rich_markup_mode=None,
        )
    )


def show_error(error: UsageError) -> None:
    """Print an error and its notes to standard error."""
    sys.stderr.write("\n".join([f"megalm: {error}", *getattr(error, "__notes__", ())]) + "\n")


def main() -> None:
    """Entry point of the ``megalm`` command. Exits with status 2 after a UsageError."""
    gc.set_threshold(20_000, 20, 20)  # imports and vocabularies are many objects and no garbage,
    atexit.register(gc.freeze)  # and the interpreter would look for some at its end, several times
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a narrow encoding cannot show is escaped, and no failure
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UsageError as error:
        show_error(error)
        sys.exit(2)
