"""The model as it will be built: configuration, tokenizer and objective put together, every size a number.

All reasons why a layout does not fit are found here, before any process group exists, and reported together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megalm.config.schema import Config, ModelConfig
from megalm.errors import ConfigError, LayoutError
from megalm.model.modules import module_parameters
from megalm.model.tuning import NO_TUNING, Tuning, added_parameters
from megalm.ops.kernels import PLAIN, Kernels
from megalm.ops.rope import RopeScaling
from megalm.parallel.mesh import layout_sizes
from megalm.plugin.contract.modules import ModuleBuilder
from megalm.plugin.contract.objective import AuxModel, Coupling, HeadSpec, Needs

_GATED_ROUNDING = 64


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one backbone with its heads. ``cfg`` has the choices that need no resolving."""

    cfg: ModelConfig
    vocab_size: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    token_types: int
    causal: bool
    """Positions attend to those before them, and where a batch has a ``prefix``, to that too."""
    lm_head: bool
    heads: tuple[HeadSpec, ...]
    coupling: Coupling = "token"
    recompute: bool = False
    """Layers keep their input alone, and are computed again in backward."""
    modules: Mapping[str, ModuleBuilder] = field(default_factory=dict)
    tuning: Tuning = NO_TUNING
    """What fine-tuning adds to the model, and what of it trains."""
    auxiliary: Mapping[str, ModelSpec] = field(default_factory=dict)
    """Smaller models beside the backbone, which have its embedding."""
    kernels: Kernels = field(default=PLAIN, compare=False)
    """What it computes with."""

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """How rotary frequencies are stretched, if they are."""
        c = self.cfg
        if c.rope_scaling == "none":
            return None
        low, high = c.rope_low_frequency_factor, c.rope_high_frequency_factor
        return RopeScaling(c.rope_scaling, c.rope_factor, low, high, c.rope_original_positions or 1)

    def parameter_count(self) -> int:
        """Elements of all logical tensors."""
        c, h, norm = self.cfg, self.cfg.hidden_size, self._norm_parameters(self.cfg.hidden_size)
        total = self._layer_parameters() + self.vocab_size * h
        total += self.max_positions * h if c.position == "learned" else 0
        total += self.token_types * h + c.embedding_norm * norm
        if self.lm_head:
            total += (not c.tie_embeddings) * self.vocab_size * h + c.lm_head_bias * self.vocab_size
            total += c.lm_head_transform * (h * h + h + norm)
        total += any(head.pooled for head in self.heads) * (h * h + h)
        total += sum(head.outputs * (h + 1) for head in self.heads)
        for each in self.auxiliary.values():
            own = each.cfg.hidden_size  # from the embedding's width to this, and back before the vocabulary's bias
            total += each._layer_parameters() + (h * own + own) + (own * h + h + norm) + self.vocab_size
        total += added_parameters(self.tuning, self.projections(), layers=c.layers, hidden_size=h)
        return total + module_parameters(c, self.modules)

    def _norm_parameters(self, width: int) -> int:
        return 2 * width if self.cfg.norm == "layer_norm" else width

    def _layer_parameters(self) -> int:
        """Of all layers, and of the norm after them."""
        c, h, norm = self.cfg, self.cfg.hidden_size, self._norm_parameters(self.cfg.hidden_size)
        q, kv = c.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = (2 if c.gated else 1) * self.ffn_size
        layer = h * (q + 2 * kv) + c.qkv_bias * (q + 2 * kv) + q * h + c.attention_bias * h
        layer += h * inner + self.ffn_size * h + c.mlp_bias * (inner + h) + 2 * norm
        layer += c.qk_norm * 2 * self.head_dim
        return c.layers * layer + c.final_norm * norm

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the projections of a layer."""
        h, q, kv = self.cfg.hidden_size, self.cfg.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = (self.ffn_size, h)
        sizes = {"q": (q, h), "k": (kv, h), "v": (kv, h), "out": (h, q), "up": inner, "down": (h, self.ffn_size)}
        return sizes | ({"gate": inner} if self.cfg.gated else {})


def resolve_model(config: Config, needs: Needs, vocab_size: int) -> ModelSpec:
    """Put configuration, the objective's needs and the tokenizer's vocabulary together.

    Raises ConfigError with every contradiction found.
    """
    c, problems = config.model, []
    kv_heads = c.kv_heads or c.heads
    if c.heads % kv_heads:
        problems.append(f"model.kv_heads = {kv_heads} must divide model.heads = {c.heads}")
    if c.head_dim is None and c.hidden_size % c.heads:
        problems.append(
            f"model.hidden_size = {c.hidden_size} is not a multiple of model.heads = {c.heads}; "
            "choose other sizes or give model.head_dim"
        )
    head_dim = c.head_dim or c.hidden_size // c.heads or 1
    if c.position == "rope" and head_dim % 2:
        problems.append(f"rotary positions need an even head size, found {head_dim}; change model.head_dim")
    if c.ffn_size is not None:
        ffn = c.ffn_size
    elif c.gated:
        ffn = -(-(8 * c.hidden_size) // (3 * _GATED_ROUNDING)) * _GATED_ROUNDING
    else:
        ffn = 4 * c.hidden_size
    vocab = c.vocab_size or vocab_size
    if vocab < vocab_size:
        problems.append(f"model.vocab_size = {vocab} is smaller than the tokenizer's {vocab_size}")
    needed = config.train.sequence_length + c.position_offset
    positions = c.max_positions or needed
    if c.position == "learned" and positions < needed:
        offset = f" + model.position_offset = {needed}" if c.position_offset else ""
        problems.append(
            f"model.max_positions = {positions} is less than train.sequence_length = "
            f"{config.train.sequence_length}{offset}"
        )
    if c.rope_scaling == "llama3":
        if c.rope_original_positions is None:
            problems.append('model.rope_scaling = "llama3" needs model.rope_original_positions')
        if c.rope_high_frequency_factor <= c.rope_low_frequency_factor:
            problems.append(
                f"model.rope_high_frequency_factor = {c.rope_high_frequency_factor} must be above "
                f"model.rope_low_frequency_factor = {c.rope_low_frequency_factor}"
            )
    if problems:
        raise ConfigError(problems)
    return ModelSpec(
        cfg=c,
        vocab_size=vocab,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        max_positions=positions,
        token_types=max(c.token_types, needs.token_types),
        causal=needs.attention != "bidirectional",
        lm_head=needs.lm_head,
        heads=needs.heads,
        coupling=needs.coupling,
        recompute=config.train.recompute == "full",
        modules=needs.modules,
        tuning=Tuning.of(config.finetune),
        auxiliary={name: _auxiliary(name, aux, config, needs, vocab) for name, aux in needs.aux_models.items()},
    )


def _auxiliary(name: str, aux: AuxModel, config: Config, needs: Needs, vocab: int) -> ModelSpec:
    """A smaller model of the same kind. ConfigError where the model's sizes have no such share."""
    c = config.model
    heads = aux.heads or max(1, round(c.heads * aux.width))
    share = {
        "layers": aux.layers or c.layers,
        "heads": heads,
        "kv_heads": None if c.kv_heads is None else max(1, round(c.kv_heads * heads / c.heads)),
        "hidden_size": max(1, round(c.hidden_size * aux.width)),
        "ffn_size": None if c.ffn_size is None else max(1, round(c.ffn_size * aux.width)),
        # Vectors meet the embedding's matrix, which has another width.
        "tie_embeddings": True,
        "lm_head_transform": True,
        "lm_head_bias": True,
    }
    smaller = config.model_copy(update={"model": c.model_copy(update=share)})
    try:
        return replace(resolve_model(smaller, Needs(needs.attention, needs.tensors), vocab), tuning=NO_TUNING)
    except ConfigError as error:
        sizes = ", ".join(f"{key} = {share[key]}" for key in ("hidden_size", "heads", "kv_heads", "ffn_size"))
        raise ConfigError(
            [f"the auxiliary model {name!r} would have {sizes}: {problem}" for problem in error.problems]
        ) from None


def layout_problems(config: Config, spec: ModelSpec, world_size: int) -> list[str]:
    """Why this layout cannot run; empty where it can."""
    problems = []
    t, p = config.train, config.parallel
    try:
        dp = layout_sizes(world_size, p.tp, p.dp, p.pp)
    except LayoutError as error:
        if p.dp is None:
            return [str(error)]
        problems.append(str(error))
        dp = p.dp
    if t.global_batch % (t.micro_batch * dp):
        problems.append(
            f"train.global_batch = {t.global_batch} is not a multiple of train.micro_batch * dp = "
            f"{t.micro_batch} * {dp} = {t.micro_batch * dp}"
        )
    problems += _cell_problems(config, spec, dp)
    problems += tensor_parallel_problems(spec, p.tp)
    if p.sp and t.sequence_length % p.tp:
        problems.append(
            f"parallel.sp divides a row's tokens over parallel.tp = {p.tp}, "
            f"which does not divide train.sequence_length = {t.sequence_length}"
        )
    return problems


def tensor_parallel_problems(spec: ModelSpec, tp: int) -> list[str]:
    """Why this model cannot be divided over so many tensor-parallel ranks; empty where it can."""
    problems = [
        f"the auxiliary model {name!r}: {problem}"
        for name, each in spec.auxiliary.items()
        for problem in tensor_parallel_problems(each, tp)
    ]
    sizes = {
        "model.heads": spec.cfg.heads,
        "the MLP's inner size (model.ffn_size)": spec.ffn_size,
        "the vocabulary (model.vocab_size)": spec.vocab_size,
    }
    return problems + [
        f"parallel.tp = {tp} is more than {name} = {size}: some ranks would hold nothing"
        for name, size in sizes.items()
        if size < tp
    ]


def _cell_problems(config: Config, spec: ModelSpec, dp: int) -> list[str]:
    t = config.train
    mixed = isinstance(t.objective, list)
    if mixed and spec.coupling != "cell":
        return _mixed_cell_problems(config, dp)
    if spec.coupling != "cell":
        if t.cell is None:
            return []
        return [f"train.cell = {t.cell} is for objectives that couple rows, and {t.what} does not; leave it out"]
    if t.cell is None:
        cell = t.micro_batch * dp
        return [f"{t.what} couples the rows of a cell; give train.cell = train.micro_batch * dp = {cell}"]
    problems = []
    if t.micro_batch * dp != t.cell:
        problems.append(
            f"{t.what} couples the rows of a cell, so train.micro_batch * dp = {t.micro_batch} * {dp} must equal "
            f"train.cell = {t.cell}"
        )
    if t.global_batch % t.cell:
        problems.append(f"train.global_batch = {t.global_batch} is not a multiple of train.cell = {t.cell}")
    for key, samples in (("samples", config.eval.samples), ("final_samples", config.eval.final_samples)):
        if samples is not None and samples < t.cell:
            problems.append(f"eval.{key} = {samples} is less than train.cell = {t.cell}, and only whole cells count")
    return problems


def _mixed_cell_problems(config: Config, dp: int) -> list[str]:
    """Each cell has an objective of its own, and a microbatch of all data-parallel ranks one of them."""
    t = config.train
    rows = t.micro_batch * dp
    if t.cell is None:
        return [f"{t.what} has one objective for each cell; give train.cell = {rows} (micro_batch * dp) or a multiple"]
    problems = []
    if t.cell % rows:
        problems.append(
            f"train.cell = {t.cell} is not a multiple of train.micro_batch * dp = {t.micro_batch} * {dp}: a microbatch "
            "would hold rows of two objectives; lower micro_batch, or choose another cell"
        )
    if t.global_batch % t.cell:
        problems.append(f"train.global_batch = {t.global_batch} is not a multiple of train.cell = {t.cell}")
    return problems
