from __future__ import annotations

import pytest

from megalm.plugin.manager import PluginManager

HEAD = "from megalm.api import Component, hookimpl\nMEGALM_API = (1, 0)\n"
PLUGIN = (
    HEAD
    + """
@hookimpl
def megalm_objectives():
    for name in ("clm", "mlm", "nsp", "strict", "fussy"):
        yield Component(name, f"cfg_parts:{name.upper()}")
    yield Component("broken", "cfg_missing:Obj")

@hookimpl
def megalm_optimizers():
    yield Component("adamw", "cfg_parts:AdamW")

@hookimpl
def megalm_lr_schedules():
    yield Component("cosine", "cfg_parts:Cosine")

@hookimpl
def megalm_callbacks():
    yield Component("board", "cfg_parts:Board")

@hookimpl
def megalm_architectures():
    yield Component("llama", "cfg_parts:Llama")
    yield Component("odd", "cfg_parts:Odd")
"""
)
PARTS = """
from enum import Enum
from typing import Literal
from pydantic import Field, model_validator
from megalm.api import (Architecture, Callback, LRSchedule, Objective, OptimizerPlugin, Settings)

class Empty(Settings): ...
class MlmConfig(Settings):
    mask_prob: float = Field(default=0.15, gt=0, le=1)
    style: Literal["bert", "span"] = "bert"
    most: int | None = None
class StrictConfig(Settings):
    needed: int = Field(ge=1)
class Colour(Enum):
    RED = "red"
    BLUE = "blue"
class FussyConfig(Settings):
    low: int = 0
    high: int = 1
    colour: Colour = Colour.RED
    weights: dict[str, float] = {"a": 1.0}
    @model_validator(mode="after")
    def order(self):
        if self.low > self.high:
            raise ValueError("low must not be above high")
        if self.low == 77:
            raise KeyError("seventy-seven")
        return self
class AdamConfig(Settings):
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

class CLM(Objective): Config = Empty
class MLM(Objective): Config = MlmConfig
class NSP(Objective): Config = Empty
class STRICT(Objective): Config = StrictConfig
class FUSSY(Objective): Config = FussyConfig
class AdamW(OptimizerPlugin): Config = AdamConfig
class Cosine(LRSchedule): ...
class Board(Callback): ...
class Llama(Architecture): defaults = {"norm": "rms_norm", "layers": 3, "hidden_size": 16, "heads": 2, "kv_heads": None}
class Odd(Architecture): defaults = {"norm": "banana", "layer": 3}
"""
OTHER = HEAD + "@hookimpl\ndef megalm_objectives():\n    yield Component('mlm', 'other_mlm:MLM')\n"


@pytest.fixture
def core(fake_dist) -> None:
    fake_dist("parts", {"core": "cfg_plugin"}, {"cfg_plugin.py": PLUGIN, "cfg_parts.py": PARTS}, version="1.2")


@pytest.fixture
def manager(core) -> PluginManager:
    return PluginManager.for_launch(["core"])


@pytest.fixture
def two_plugins(core, fake_dist) -> PluginManager:
    source = (
        "from megalm.api import Objective, Settings\nclass C(Settings):\n    other: int = 3\n"
        "class MLM(Objective): Config = C\n"
    )
    fake_dist("other", {"other": "cfg_other"}, {"cfg_other.py": OTHER, "other_mlm.py": source})
    return PluginManager.for_launch(["core", "other"])
