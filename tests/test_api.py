"""The surface of megalm.api. A change here is a change of the promise to plugins: raise API_VERSION with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megalm.api

SURFACE = {
    (1, 0): """
        API_VERSION Architecture Batch Callback CheckpointError Component ConfigError Corpus DataError Example HeadSpec
        IGNORE LRSchedule LayoutError LossContext MegalmError Needs Objective ObjectiveEnv OptimizerPlugin PluginError
        PluginInfo RunInfo Settings SpecialTokens TensorSpec Term Tokenizer TokenizerError UsageError hookimpl
    """,
    (1, 1): """
        API_VERSION Architecture Batch BuildContext Callback CheckpointError Component ConfigError Corpus DataError
        Example FieldSpec Head HeadEnv HeadSpec IGNORE LRSchedule LayoutError LossContext MegalmError ModuleBuilder
        Needs Objective ObjectiveEnv OptimizerPlugin PluginError PluginInfo Record RunInfo Settings
        SpecialTokens TensorSpec Term Tokenizer TokenizerError UsageError hookimpl
    """,
    (1, 2): """
        API_VERSION Action ActionKind Architecture Batch BubbleFormula BuildContext Callback CheckpointError Component
        ConfigError Corpus Costs DataError Example FieldSpec Head HeadEnv HeadSpec IGNORE LRSchedule LayoutError
        LossContext MegalmError ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin PipelineOrder
        PipelineSchedule PipelineShape PluginError PluginInfo Record RunInfo ScheduleError Settings SpecialTokens
        TensorSpec Term Tokenizer TokenizerError UsageError hookimpl loop_placement order_from_csv order_to_csv
        v_placement
    """,
    (1, 3): """
        API_VERSION Action ActionKind Architecture Batch BubbleFormula BuildContext Callback CheckpointError Component
        ConfigError Corpus Costs DataError Example FieldSpec Head HeadEnv HeadSpec IGNORE KernelProvider KernelRequest
        LRSchedule LayoutError LossContext MegalmError ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin
        PipelineOrder PipelineSchedule PipelineShape PluginError PluginInfo Record RunInfo ScheduleError Settings
        SpecialTokens TensorSpec Term Tokenizer TokenizerError UsageError hookimpl loop_placement order_from_csv
        order_to_csv v_placement
    """,
    (1, 4): """
        API_VERSION Action ActionKind AddressedSource Architecture Batch BubbleFormula BuildContext Callback
        CheckpointError Component ConfigError Corpus Costs DataError DataSource Example FieldSpec Head HeadEnv
        HeadSpec IGNORE KernelProvider KernelRequest LRSchedule LayoutError LossContext MegalmError
        ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin Piece PipelineOrder PipelineSchedule
        PipelineShape PluginError PluginInfo Record RunInfo ScheduleError Settings SpecialTokens StreamSource
        TensorSpec Term TokenMasking Tokenizer TokenizerError UsageError begins_word hookimpl loop_placement
        order_from_csv order_to_csv packed_row packed_rows stream_windows v_placement
    """,
    (1, 5): """
        API_VERSION Action ActionKind AddressedSource Architecture Batch BubbleFormula BuildContext Callback
        CheckpointError Component ConfigError Corpus Costs DataError DataSource Example FieldSpec Head HeadEnv
        HeadSpec IGNORE KernelProvider KernelRequest LRSchedule LayoutError LossContext MeasureKind Measures MegalmError
        ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin Piece PipelineOrder PipelineSchedule
        PipelineShape PluginError PluginInfo Record RunInfo ScheduleError Settings SpecialTokens StreamSource
        TensorSpec Term TokenMasking Tokenizer TokenizerError UsageError begins_word hookimpl loop_placement marks_spans
        order_from_csv order_to_csv packed_row packed_rows stream_windows v_placement
    """,
    (1, 6): """
        API_VERSION Action ActionKind AddressedSource Architecture AuxModel Batch BubbleFormula BuildContext Callback
        CheckpointError Component ConfigError Corpus Costs DataError DataSource Example FieldSpec Head HeadEnv
        HeadSpec IGNORE KernelProvider KernelRequest LRSchedule LayoutError LossContext MeasureKind Measures
        MegalmError ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin Piece PipelineOrder PipelineSchedule
        PipelineShape PluginError PluginInfo PrepareContext PreparedBatch Prepares Record RunInfo ScheduleError
        Settings SpecialTokens StreamSource TensorSpec Term TokenMasking Tokenizer TokenizerError UsageError
        begins_word hookimpl loop_placement marks_spans order_from_csv order_to_csv packed_row packed_rows
        stream_windows v_placement
    """,
    (1, 7): """
        API_VERSION Action ActionKind AddressedSource Architecture AuxModel Batch BubbleFormula BuildContext Callback
        CheckpointError Component ConfigError Corpus Costs DataError DataSource Example FieldSpec Head HeadEnv
        HeadSpec HuggingFaceHead IGNORE KernelProvider KernelRequest LRSchedule LayoutError LossContext MeasureKind
        Measures MegalmError ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin Piece PipelineOrder
        PipelineSchedule PipelineShape PluginError PluginInfo PrepareContext PreparedBatch Prepares Record RunInfo
        ScheduleError Settings SpecialTokens StreamSource TensorSpec Term TokenMasking Tokenizer TokenizerError
        UsageError begins_word hookimpl loop_placement marks_spans order_from_csv order_to_csv packed_row packed_rows
        stream_windows v_placement
    """,
    (1, 8): """
        API_VERSION Action ActionKind AddressedSource Architecture AuxModel Batch BubbleFormula BuildContext Callback
        CheckpointError Component ConfigError Corpus Costs DataError DataSource Example FieldSpec Head HeadEnv HeadSpec
        HuggingFaceHead IGNORE KernelProvider KernelRequest LRSchedule LayoutError LossContext MeasureKind Measures
        MegalmError ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin Piece PipelineOrder PipelineSchedule
        PipelineShape PluginError PluginInfo PrepareContext PreparedBatch Prepares Record RunInfo ScheduleError Settings
        SpecialTokens StreamSource Teacher TensorSpec Term TokenMasking Tokenizer TokenizerError UsageError begins_word
        hookimpl loop_placement marks_spans order_from_csv order_to_csv packed_row packed_rows stream_windows
        v_placement
    """,
    (1, 9): """
        API_VERSION Action ActionKind AddressedSource Architecture AuxModel Batch BubbleFormula BuildContext
        Callback CheckpointError Component ConfigError Corpus Costs DataError DataSource Example FieldSpec Head
        HeadEnv HeadSpec HuggingFaceHead IGNORE KernelProvider KernelRequest LRSchedule LayoutError LogicalTensors
        LossContext MeasureKind Measures MegalmError ModuleBuilder Needs Objective ObjectiveEnv OptimizerPlugin
        Piece PipelineOrder PipelineSchedule PipelineShape PluginError PluginInfo PrepareContext PreparedBatch
        Prepares Record RunInfo ScheduleError Settings SpecialTokens StreamSource Teacher TensorSpec Term
        TokenMasking Tokenizer TokenizerError UsageError begins_word hookimpl loop_placement marks_spans
        order_from_csv order_to_csv packed_row packed_rows stream_windows v_placement
    """,
}


def test_the_surface_is_the_snapshot():
    assert sorted(SURFACE[megalm.api.API_VERSION].split()) == sorted(megalm.api.__all__) == dir(megalm.api)


def test_every_name_resolves_and_nothing_else_does():
    for name in megalm.api.__all__:
        assert getattr(megalm.api, name) is not None
    with pytest.raises(AttributeError, match=r"megalm\.api has no 'Objectiv'"):
        _ = megalm.api.Objectiv
    with pytest.raises(ImportError):
        from megalm.api import nothing_like_this  # noqa: F401


def test_importing_it_and_all_its_names_needs_no_torch():
    root = Path(__file__).resolve().parents[1]
    for code in (
        "import megalm.api, sys; sys.exit(not {'torch', 'numpy', 'pydantic'}.isdisjoint(sys.modules))",
        "from megalm.api import *; import sys; sys.exit('torch' in sys.modules)",
    ):
        result = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
