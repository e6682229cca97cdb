"""Initial values do not depend on the layout: the shards of any number of ranks are slices of one tensor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megalm.config.schema import ModelConfig
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.module import fill_from_logical, layouts, logical_pieces, materialise
from megalm.parallel.comm import Group
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.plugin.contract.objective import HeadSpec

LLAMA = ModelConfig(
    architecture="llama",
    layers=2,
    hidden_size=20,
    heads=6,
    kv_heads=2,
    head_dim=4,
    norm="rms_norm",
    position="rope",
    gated=True,
    tie_embeddings=False,
)
SPEC = ModelSpec(
    cfg=LLAMA,
    vocab_size=37,
    kv_heads=2,
    head_dim=4,
    ffn_size=23,
    max_positions=1,
    token_types=0,
    causal=True,
    lm_head=True,
    heads=(HeadSpec("nsp", 2, pooled=True),),
)


def place(index: int, tp: int) -> ParallelContext:
    """A rank of a layout, without a process group: nothing here communicates."""
    one = single_rank()
    return dataclasses.replace(one, tp=Group("tp", tuple(range(tp)), index, one.device, None))


def built(parallel: ParallelContext, seed: int = 3, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = LanguageModel(SPEC, parallel)
    materialise(model, parallel, seed, dtype)
    return model


def logical(model: LanguageModel, parallel: ParallelContext) -> dict[str, torch.Tensor]:
    return {piece.name: piece.local for _, _, items in logical_pieces(model, parallel) for piece in items}


def test_nothing_is_allocated_before_materialise() -> None:
    assert all(p.is_meta for p in LanguageModel(SPEC, single_rank()).parameters())


def test_parameter_count() -> None:
    assert sum(p.numel() for p in LanguageModel(SPEC, single_rank()).parameters()) == SPEC.parameter_count()


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
def test_shards_are_slices_of_the_whole(tp: int) -> None:
    whole = logical(built(single_rank()), single_rank())
    seen = {name: torch.zeros_like(t, dtype=torch.int) for name, t in whole.items()}
    for index in range(tp):
        parallel = place(index, tp)
        for _, _, items in logical_pieces(built(parallel), parallel):
            for piece in items:
                where = tuple(slice(*r) for r in piece.held)
                assert torch.equal(piece.local, whole[piece.name][where]), f"{piece.name}, rank {index}"
                if piece.owned is not None:
                    seen[piece.name][tuple(slice(*r) for r in piece.owned)] += 1
    assert all((count == 1).all() for count in seen.values())


@pytest.mark.parametrize("tp", [2, 3, 5])
def test_fill_from_logical_gives_every_rank_its_ranges(tp: int) -> None:
    tensors = {name: torch.randn_like(t) for name, t in logical(built(single_rank()), single_rank()).items()}
    for index in range(tp):
        parallel = place(index, tp)
        model = built(parallel)
        fill_from_logical(model, parallel, tensors)
        for _, _, items in logical_pieces(model, parallel):
            for piece in items:
                assert torch.equal(piece.local, tensors[piece.name][tuple(slice(*r) for r in piece.held)])


def test_values_follow_seed_and_name_only() -> None:
    one = single_rank()
    first, again, other = (logical(built(one, seed), one) for seed in (3, 3, 4))
    random = [name for name, t in first.items() if t.std() > 0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in random)
    same_shape = [first[f"backbone.layers.{n}.attention.q.weight"] for n in (0, 1)]
    assert not torch.equal(*same_shape)


def test_float32_is_float64_rounded() -> None:
    one = single_rank()
    wide, narrow = logical(built(one), one), logical(built(one, dtype=torch.float32), one)
    assert all(torch.equal(narrow[name], wide[name].float()) for name in wide)


def test_a_tensor_is_drawn_in_blocks_of_rows_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    one = single_rank()
    whole = logical(built(one), one)
    monkeypatch.setattr("megalm.nn.module._ELEMENTS_AT_ONCE", 50)
    assert all(torch.equal(t, whole[name]) for name, t in logical(built(one), one).items())


def test_standard_deviations() -> None:
    config = LLAMA.model_copy(update={"hidden_size": 120, "init_std": 0.05, "scaled_init": True})
    spec, one = dataclasses.replace(SPEC, cfg=config, ffn_size=90), single_rank()
    model = LanguageModel(spec, one)
    materialise(model, one, 0, torch.float64)
    for name, t in logical(model, one).items():
        if "norm" in name:
            assert t.eq(1.0).all(), name
        elif name.endswith("bias"):
            assert t.eq(0.0).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.05 / math.sqrt(2 * config.layers) if residual else 0.05
            # The standard error of a standard deviation is std / sqrt(2 n).
            assert abs(t.std().item() / std - 1) < 5 / math.sqrt(2 * t.numel()), name


def test_every_parameter_has_a_layout() -> None:
    model = LanguageModel(SPEC, single_rank())
    assert set(layouts(model)) == {name for name, _ in model.named_parameters()}
