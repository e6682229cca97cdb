"""Fine-tuning as a property of the model: what is added to it, what of it trains, and how fast each depth moves.

Everything here goes by the names that parameters have in the whole model, so that every rank of every layout says the
same of what it holds. Depth counts from 0 (embeddings) through the layers to what stands on the last one.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megalm.config.schema import FinetuneConfig
from megalm.nn.lora import A, B, LoraSpec

_LAYER = re.compile(r"backbone\.layers\.(\d+)\.")
_LORA = (f".{A}", f".{B}")
_ADAPTER = re.compile(r"\.(attention|mlp)_adapter\.(down|up)\.(weight|bias)$")


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned; the default: all of it trains, and nothing is added."""

    method: str = "none"
    frozen_layers: int | None = None
    """``frozen``: embeddings and so many layers; none: the whole backbone."""
    lora: LoraSpec | None = None
    adapter_size: int | None = None
    also_train: tuple[str, ...] = ()
    """Patterns of parameters that train besides."""
    layer_decay: float = 1.0
    keep_zeros: bool = False

    @classmethod
    def of(cls, cfg: FinetuneConfig) -> Tuning:
        """What ``[finetune]`` says."""
        lora = LoraSpec(cfg.lora_rank, cfg.lora_alpha, frozenset(cfg.lora_targets)) if cfg.method == "lora" else None
        return cls(
            method=cfg.method,
            frozen_layers=cfg.frozen_layers,
            lora=lora,
            adapter_size=cfg.adapter_size if cfg.method == "adapter" else None,
            also_train=tuple(cfg.also_train),
            layer_decay=cfg.layer_decay,
            keep_zeros=cfg.keep_zeros,
        )

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` moves.

        Heads always do, but for the vocabulary's, which is the language model's own, where only what was added is to
        move (``lora``, ``adapter``).
        """
        if self.method in ("none", "full") or self.adds(name):
            return True
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.also_train):
            return True
        if not name.startswith("backbone."):
            return self.method == "frozen" or not name.startswith("lm_head.")
        if self.method == "frozen" and self.frozen_layers is not None:
            layer = _LAYER.match(name)
            if layer is None:
                return not name.startswith("backbone.embedding.")
            return int(layer[1]) >= self.frozen_layers
        return False

    @staticmethod
    def adds(name: str) -> bool:
        """Whether a parameter or logical tensor is one that tuning adds to a model."""
        return name.endswith(_LORA) or _ADAPTER.search(name) is not None

    def rate_scale(self, name: str, layers: int) -> float:
        """What the learning rate of a parameter is multiplied by, in a model of so many layers: ``layer_decay`` to the
        power of how many depths lie above it. (Howard and Ruder, "Universal Language Model Fine-tuning", 2018.)"""
        depth = 0 if name.startswith("backbone.embedding.") else layers + 1
        if (layer := _LAYER.match(name)) is not None:
            depth = int(layer[1]) + 1
        return self.layer_decay ** (layers + 1 - depth)

    def problems(self, names: Iterable[str], layers: int, projections: Iterable[str]) -> list[str]:
        """Why this cannot be done to a model whose parameters have these names, and whose layers these ``projections``;
        empty where it can."""
        names, found = list(names), []
        if self.frozen_layers is not None and self.frozen_layers > layers:
            found.append(f"finetune.frozen_layers = {self.frozen_layers} is more than model.layers = {layers}")
        for pattern in self.also_train:
            if not fnmatch.filter(names, pattern):
                found.append(f"finetune.also_train: no parameter of this model is called {pattern}")
        if self.lora is not None:
            has = list(projections)
            found += [
                f"finetune.lora_targets: this model's layers have no projection {target}, but {', '.join(has)}"
                for target in sorted(self.lora.targets - set(has))
            ]
        if self.keep_zeros and self.method not in ("full", "frozen"):
            found.append(
                f'finetune.keep_zeros goes with finetune.method = "full" or "frozen"; found "{self.method}", which '
                "leaves the weights as they are"
            )
        if not any(map(self.trains, names)):
            found.append(
                f'finetune.method = "{self.method}" leaves nothing of this model to train; choose another, lower '
                "finetune.frozen_layers, or name parameters in finetune.also_train"
            )
        return found


NO_TUNING = Tuning()


def added_parameters(
    tuning: Tuning, sizes: Mapping[str, tuple[int, int]], *, layers: int, hidden_size: int
) -> int:
    """Elements that tuning adds. ``sizes``: (out, in) of each projection of a layer."""
    total = 0
    if tuning.lora is not None:
        total += sum(tuning.lora.rank * sum(size) for name, size in sizes.items() if name in tuning.lora.targets)
    if tuning.adapter_size is not None:
        total += 2 * (2 * tuning.adapter_size * hidden_size + tuning.adapter_size + hidden_size)
    return layers * total
