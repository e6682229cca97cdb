"""The public API for plugins: everything that a plugin may import from megalm, and nothing else is promised.

Names are resolved on first use (PEP 562), so that ``import megalm.api`` costs next to nothing and never imports
torch: a plugin's module is imported wherever plugins are listed. A test compares this surface with a snapshot; adding
a name raises the minor of :data:`API_VERSION`, removing or changing one raises the major.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalm.config.settings import Settings
    from megalm.data.masking import TokenMasking
    from megalm.data.pack import Piece, packed_row, packed_rows
    from megalm.data.windows import stream_windows
    from megalm.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LayoutError,
        MegalmError,
        PluginError,
        ScheduleError,
        TokenizerError,
        UsageError,
    )
    from megalm.metrics.measures.measures import MeasureKind, Measures
    from megalm.metrics.measures.tags import marks_spans
    from megalm.plugin.component import Component, PluginInfo
    from megalm.plugin.contract.callback import Callback, RunInfo
    from megalm.plugin.contract.head import Head, HeadEnv
    from megalm.plugin.contract.hugging_face import HuggingFaceHead
    from megalm.plugin.contract.kernels import KernelProvider, KernelRequest
    from megalm.plugin.contract.modules import BuildContext, ModuleBuilder
    from megalm.plugin.contract.objective import (
        IGNORE,
        AuxModel,
        Batch,
        Corpus,
        Example,
        HeadSpec,
        LossContext,
        Needs,
        Objective,
        ObjectiveEnv,
        PrepareContext,
        PreparedBatch,
        Prepares,
        Teacher,
        TensorSpec,
        Term,
    )
    from megalm.plugin.contract.optim import Architecture, LogicalTensors, LRSchedule, OptimizerPlugin
    from megalm.plugin.contract.pipeline import (
        Action,
        ActionKind,
        BubbleFormula,
        Costs,
        PipelineOrder,
        PipelineSchedule,
        PipelineShape,
        loop_placement,
        v_placement,
    )
    from megalm.plugin.contract.pipeline_csv import order_from_csv, order_to_csv
    from megalm.plugin.contract.records import FieldSpec, Record
    from megalm.plugin.contract.source import AddressedSource, DataSource, StreamSource
    from megalm.plugin.contract.tokenizer import SpecialTokens, Tokenizer, begins_word
    from megalm.plugin.hookspecs import API_VERSION, hookimpl

_HOMES = {
    "megalm.config.settings": ("Settings",),
    "megalm.data.masking": ("TokenMasking",),
    "megalm.data.pack": ("Piece", "packed_row", "packed_rows"),
    "megalm.data.windows": ("stream_windows",),
    "megalm.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "LayoutError",
        "MegalmError",
        "PluginError",
        "ScheduleError",
        "TokenizerError",
        "UsageError",
    ),
    "megalm.metrics.measures.measures": ("MeasureKind", "Measures"),
    "megalm.metrics.measures.tags": ("marks_spans",),
    "megalm.plugin.component": ("Component", "PluginInfo"),
    "megalm.plugin.contract.callback": ("Callback", "RunInfo"),
    "megalm.plugin.contract.head": ("Head", "HeadEnv"),
    "megalm.plugin.contract.hugging_face": ("HuggingFaceHead",),
    "megalm.plugin.contract.kernels": ("KernelProvider", "KernelRequest"),
    "megalm.plugin.contract.modules": ("BuildContext", "ModuleBuilder"),
    "megalm.plugin.contract.objective": (
        "IGNORE",
        "AuxModel",
        "Batch",
        "Corpus",
        "Example",
        "HeadSpec",
        "LossContext",
        "Needs",
        "Objective",
        "ObjectiveEnv",
        "PrepareContext",
        "PreparedBatch",
        "Prepares",
        "Teacher",
        "TensorSpec",
        "Term",
    ),
    "megalm.plugin.contract.optim": ("Architecture", "LRSchedule", "LogicalTensors", "OptimizerPlugin"),
    "megalm.plugin.contract.pipeline": (
        "Action",
        "ActionKind",
        "BubbleFormula",
        "Costs",
        "PipelineOrder",
        "PipelineSchedule",
        "PipelineShape",
        "loop_placement",
        "v_placement",
    ),
    "megalm.plugin.contract.pipeline_csv": ("order_from_csv", "order_to_csv"),
    "megalm.plugin.contract.records": ("FieldSpec", "Record"),
    "megalm.plugin.contract.source": ("AddressedSource", "DataSource", "StreamSource"),
    "megalm.plugin.contract.tokenizer": ("SpecialTokens", "Tokenizer", "begins_word"),
    "megalm.plugin.hookspecs": ("API_VERSION", "hookimpl"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "API_VERSION",
    "IGNORE",
    "Action",
    "ActionKind",
    "AddressedSource",
    "Architecture",
    "AuxModel",
    "Batch",
    "BubbleFormula",
    "BuildContext",
    "Callback",
    "CheckpointError",
    "Component",
    "ConfigError",
    "Corpus",
    "Costs",
    "DataError",
    "DataSource",
    "Example",
    "FieldSpec",
    "Head",
    "HeadEnv",
    "HeadSpec",
    "HuggingFaceHead",
    "KernelProvider",
    "KernelRequest",
    "LRSchedule",
    "LayoutError",
    "LogicalTensors",
    "LossContext",
    "MeasureKind",
    "Measures",
    "MegalmError",
    "ModuleBuilder",
    "Needs",
    "Objective",
    "ObjectiveEnv",
    "OptimizerPlugin",
    "Piece",
    "PipelineOrder",
    "PipelineSchedule",
    "PipelineShape",
    "PluginError",
    "PluginInfo",
    "PrepareContext",
    "PreparedBatch",
    "Prepares",
    "Record",
    "RunInfo",
    "ScheduleError",
    "Settings",
    "SpecialTokens",
    "StreamSource",
    "Teacher",
    "TensorSpec",
    "Term",
    "TokenMasking",
    "Tokenizer",
    "TokenizerError",
    "UsageError",
    "begins_word",
    "hookimpl",
    "loop_placement",
    "marks_spans",
    "order_from_csv",
    "order_to_csv",
    "packed_row",
    "packed_rows",
    "stream_windows",
    "v_placement",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"megalm.api has no {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
