"""Settings of one component from ``key=value`` pairs, where no configuration file has a section for it."""

from __future__ import annotations

from collections.abc import Sequence

from megalm.config.settings import Settings
from megalm.config.source import Source
from megalm.config.validate import validate
from megalm.errors import ConfigError


def settings_from_pairs(model: type[Settings], section: tuple[str, str], owner: str, pairs: Sequence[str]) -> Settings:
    """A validated ``model``. ``section``: the kind and the name of the component, as a file would say them; ``owner``:
    who answers for the model (``plugin tokenizers (megalm 1.0)``).

    Raises ConfigError with all that is wrong, each key in full (``tokenizer.hf.vocab_size``).
    """
    source = Source("--set", {})
    problems = source.apply(pairs)
    settings, wrong = validate(model, source.data, prefix=section, owner=owner)
    problems += [problem.line(source.place(problem.path[len(section) :])) for problem in wrong]
    if problems or settings is None:
        raise ConfigError(problems)
    return settings
