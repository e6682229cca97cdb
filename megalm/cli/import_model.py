"""``megalm import``: models from elsewhere as checkpoints to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.options import NoVerify, Overwrite, Plugins, Tolerance, names

if TYPE_CHECKING:
    from megalm.plugin.contract.tokenizer import Tokenizer
    from megalm.plugin.manager import PluginManager

app = typer.Typer(
    name="import", help="Make a checkpoint of a model from elsewhere.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Make a checkpoint of a model from elsewhere."""


@app.command()
def hf(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face folder with safetensors weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New checkpoint folder.")],
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="What it is to be trained on with. Default: causal_lm for decoders; mlm for encoders, or mlm+nsp "
            "where the folder has weights for it.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="SPEC", help="Instead of the folder's own: as for data prepare."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights that the folder lacks.")] = 0,
    no_verify: NoVerify = False,
    tolerance: Tolerance = None,
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Make a checkpoint of a Hugging Face model: GPT-2, LLaMA, Mistral, Qwen2, Qwen3, BERT or RoBERTa.

    Logits are compared with transformers' before anything is written."""
    from megalm.hf.compare import TOLERANCE
    from megalm.hf.importing import RUN, import_hf
    from megalm.plugin.manager import PluginManager

    manager = PluginManager.for_launch(names(plugins))
    made = import_hf(
        source,
        out,
        manager,
        tokenizer=_tokenizer(source, tokenizer, manager),
        objective=objective,
        seed=seed,
        verify=not no_verify,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        overwrite=overwrite,
        tell=lambda text: typer.echo(f"megalm: {text}"),
    )
    for agreement in made.agreements:
        typer.echo(f"verified: {agreement}")
    typer.echo(f"checkpoint  {out}\ntrain on    torchrun -m megalm.launch {out / RUN}")


def _tokenizer(source: Path, spec: str | None, manager: PluginManager) -> tuple[str, Tokenizer] | None:
    """The tokenizer that was named, or the folder's own."""
    from megalm.data.tokenizer import tokenizer_from_spec
    from megalm.hf.files import TOKENIZER

    def resolve(name: str) -> type[Tokenizer]:
        found: type[Tokenizer] = manager.load_class("tokenizers", name)
        return found

    if spec is not None:
        return tokenizer_from_spec(spec, resolve)
    if (source / TOKENIZER).is_file():
        return tokenizer_from_spec(f"hf:{source / TOKENIZER}", resolve)
    return None
