"""The same tensors under Hugging Face's names and under megalm's, written once for both directions.

A Hugging Face tensor is one logical tensor, or several stacked along its output features (GPT-2's fused query, key and
value); where its layer stores (in, out), as GPT-2's Conv1D does, it is transposed. Both steps are linear, so gradients
map as the weights do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megalm.errors import CheckpointError
from megalm.model.hf.config import MODEL_TYPES
from megalm.model.spec import ModelSpec

_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor and the logical tensors inside it."""

    hf: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    """Logical names and shapes, in the order in which they are stacked along dimension 0."""
    transposed: bool = False
    """The Hugging Face tensor is the transpose."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        stacked = (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])
        return stacked[::-1] if self.transposed else stacked

    def to_logical(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logical tensors, as views of ``tensor``. CheckpointError where the shape is another one."""
        if tuple(tensor.shape) != self.shape:
            raise CheckpointError(f"{self.hf}: shape {list(tensor.shape)}, but this model's is {list(self.shape)}")
        stacked = tensor.t() if self.transposed else tensor
        views = stacked.split([shape[0] for _, shape in self.parts])
        return {name: view for (name, _), view in zip(self.parts, views, strict=True)}

    def to_hf(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The Hugging Face tensor, contiguous. CheckpointError where a part is missing or has another shape."""
        for name, shape in self.parts:
            if name not in tensors:
                raise CheckpointError(f"{name}: missing; {self.hf} needs it")
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(f"{name}: shape {list(tensors[name].shape)}, but this model's is {list(shape)}")
        stacked = torch.cat([tensors[name] for name, _ in self.parts])
        return (stacked.t() if self.transposed else stacked).contiguous()


@dataclass(frozen=True)
class TensorMap:
    """All tensors of one model."""

    entries: tuple[Entry, ...]
    prefix: str
    """Files of a bare backbone (``GPT2Model``) leave it out."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Second names of a tensor, which files may have as well: other name to :attr:`Entry.hf`."""
    unused: tuple[str, ...] = ()
    """Patterns of names that are known and not read: buffers, and heads that this model does not have."""

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(entry.hf for entry in self.entries)

    @property
    def logical_names(self) -> set[str]:
        """Of all tensors that the map has."""
        return {name for entry in self.entries for name, _ in entry.parts}

    def to_logical(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A whole Hugging Face state (or its gradients) under logical names.

        CheckpointError lists tensors that are missing, unexpected or of another shape, or tied ones that differ.
        """
        known = self._known
        given: dict[str, torch.Tensor] = {}
        unexpected = []
        for file_name, tensor in tensors.items():
            name = self.canonical(file_name)
            if name is None:
                unexpected.append(file_name)
            elif name in known:
                first = given.setdefault(name, tensor)
                if first is not tensor and not torch.equal(first, tensor):
                    raise CheckpointError(f"{file_name}: differs from {name}, to which this model ties it")
        missing = [entry.hf for entry in self.entries if entry.hf not in given]
        if missing or unexpected:
            raise CheckpointError(
                "the tensors are not those of this model: " + "; ".join(_describe(missing, unexpected))
            )
        return {name: t for entry in self.entries for name, t in entry.to_logical(given[entry.hf]).items()}

    def to_hf(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Logical tensors under Hugging Face's names, tied ones once.

        CheckpointError where one is missing, unexpected or of another shape.
        """
        known = self.logical_names
        if unexpected := [name for name in tensors if name not in known]:
            raise CheckpointError("; ".join(_describe([], unexpected)) + ": the Hugging Face model has no such tensor")
        return {entry.hf: entry.to_hf(tensors) for entry in self.entries}

    def canonical(self, name: str) -> str | None:
        """The name of the entry that a file's tensor is; its full name where it is not read; none where unknown."""
        known = self._known
        # Files written for TensorFlow's BERT call the norm's weight gamma and its bias beta.
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        for candidate in (name, self.prefix + name):
            candidate = self.tied.get(candidate, candidate)
            if candidate in known or any(re.fullmatch(pattern, candidate) for pattern in self.unused):
                return candidate
        return None


def tensor_map(model_type: str, spec: ModelSpec, *, pooler: bool | None = None) -> TensorMap:
    """The map of a family (``model_type`` of ``config.json``) for a model of these sizes.

    ``pooler``: whether an encoder has one; default: where a head of the model stands on it. CheckpointError where the
    family is unknown.
    """
    if model_type == "gpt2":
        return _gpt2(spec)
    if model_type in ("bert", "roberta"):
        return _bert(spec, model_type, any(head.pooled for head in spec.heads) if pooler is None else pooler)
    if model_type in MODEL_TYPES:
        return _llama(spec)
    raise CheckpointError(f"model_type = {model_type!r} is not supported; expected one of {', '.join(MODEL_TYPES)}")


def _describe(missing: list[str], unexpected: list[str]) -> Iterator[str]:
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{word} {', '.join(names[:_SHOWN])}{more}"


class _Entries(list[Entry]):
    """Appends the entries of whole layers."""

    def one(self, hf: str, name: str, shape: tuple[int, ...]) -> None:
        self.append(Entry(hf, ((name, shape),)))

    def linear(
        self,
        hf: str,
        names: tuple[str, ...],
        rows: tuple[int, ...],
        width: int,
        *,
        bias: bool,
        transposed: bool = False,
    ) -> None:
        """``NAME.weight`` (out, in), and ``NAME.bias`` (out) where there is one."""
        both = tuple(zip(names, rows, strict=True))
        self.append(Entry(f"{hf}.weight", tuple((f"{n}.weight", (r, width)) for n, r in both), transposed))
        if bias:
            self.append(Entry(f"{hf}.bias", tuple((f"{n}.bias", (r,)) for n, r in both)))

    def norm(self, hf: str, name: str, width: int, *, bias: bool = True) -> None:
        for leaf in ("weight", "bias") if bias else ("weight",):
            self.one(f"{hf}.{leaf}", f"{name}.{leaf}", (width,))


def _gpt2(spec: ModelSpec) -> TensorMap:
    h, inner, out = spec.cfg.hidden_size, spec.ffn_size, _Entries()
    out.one("transformer.wte.weight", "backbone.embedding.tokens.weight", (spec.vocab_size, h))
    out.one("transformer.wpe.weight", "backbone.embedding.positions.weight", (spec.max_positions, h))
    for n in range(spec.cfg.layers):
        hf, name = f"transformer.h.{n}", f"backbone.layers.{n}"
        qkv = tuple(f"{name}.attention.{part}" for part in "qkv")
        out.norm(f"{hf}.ln_1", f"{name}.attention_norm", h)
        out.linear(f"{hf}.attn.c_attn", qkv, (h, h, h), h, bias=True, transposed=True)
        out.linear(f"{hf}.attn.c_proj", (f"{name}.attention.out",), (h,), h, bias=True, transposed=True)
        out.norm(f"{hf}.ln_2", f"{name}.mlp_norm", h)
        out.linear(f"{hf}.mlp.c_fc", (f"{name}.mlp.up",), (inner,), h, bias=True, transposed=True)
        out.linear(f"{hf}.mlp.c_proj", (f"{name}.mlp.down",), (h,), inner, bias=True, transposed=True)
    out.norm("transformer.ln_f", "backbone.final_norm", h)
    buffers = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    return _with_lm_head(spec, out, "transformer.", "transformer.wte.weight", "lm_head.weight", (buffers,))


def _llama(spec: ModelSpec) -> TensorMap:
    c, h, inner, out = spec.cfg, spec.cfg.hidden_size, spec.ffn_size, _Entries()
    q, kv = c.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out.one("model.embed_tokens.weight", "backbone.embedding.tokens.weight", (spec.vocab_size, h))
    for n in range(c.layers):
        hf, name = f"model.layers.{n}", f"backbone.layers.{n}"
        out.norm(f"{hf}.input_layernorm", f"{name}.attention_norm", h, bias=False)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            out.linear(f"{hf}.self_attn.{part}_proj", (f"{name}.attention.{part}",), (rows,), h, bias=c.qkv_bias)
            if c.qk_norm and part != "v":
                out.one(
                    f"{hf}.self_attn.{part}_norm.weight", f"{name}.attention.{part}_norm.weight", (spec.head_dim,)
                )
        out.linear(f"{hf}.self_attn.o_proj", (f"{name}.attention.out",), (h,), q, bias=c.attention_bias)
        out.norm(f"{hf}.post_attention_layernorm", f"{name}.mlp_norm", h, bias=False)
        for part in ("gate", "up"):
            out.linear(f"{hf}.mlp.{part}_proj", (f"{name}.mlp.{part}",), (inner,), h, bias=c.mlp_bias)
        out.linear(f"{hf}.mlp.down_proj", (f"{name}.mlp.down",), (h,), inner, bias=c.mlp_bias)
    out.norm("model.norm", "backbone.final_norm", h, bias=False)
    buffers = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    return _with_lm_head(spec, out, "model.", "model.embed_tokens.weight", "lm_head.weight", (buffers,))


def _with_lm_head(
    spec: ModelSpec, out: _Entries, prefix: str, embedding: str, head: str, unused: tuple[str, ...]
) -> TensorMap:
    """Add a head that is a matrix, its own or the embedding's."""
    if spec.cfg.tie_embeddings:
        return TensorMap(tuple(out), prefix, {head: embedding}, unused)
    if spec.lm_head:
        out.one(head, "lm_head.weight", (spec.vocab_size, spec.cfg.hidden_size))
        return TensorMap(tuple(out), prefix, {}, unused)
    return TensorMap(tuple(out), prefix, {}, (*unused, re.escape(head)))


@dataclass(frozen=True)
class _EncoderHead:
    """What a family of encoders calls the parts of its language-modelling head."""

    dense: str
    norm: str
    matrix: str
    bias: str
    second_bias: str
    everything: str
    """A pattern."""


_ENCODER_HEADS = {
    "bert": _EncoderHead(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
        r"cls\.predictions\..*",
    ),
    "roberta": _EncoderHead(
        "lm_head.dense",
        "lm_head.layer_norm",
        "lm_head.decoder.weight",
        "lm_head.bias",
        "lm_head.decoder.bias",
        r"lm_head\..*",
    ),
}


def _bert(spec: ModelSpec, family: str, pooler: bool) -> TensorMap:
    c, h, inner, out = spec.cfg, spec.cfg.hidden_size, spec.ffn_size, _Entries()
    embeddings, tokens = f"{family}.embeddings", f"{family}.embeddings.word_embeddings.weight"
    out.one(tokens, "backbone.embedding.tokens.weight", (spec.vocab_size, h))
    out.one(f"{embeddings}.position_embeddings.weight", "backbone.embedding.positions.weight", (spec.max_positions, h))
    out.one(f"{embeddings}.token_type_embeddings.weight", "backbone.embedding.types.weight", (spec.token_types, h))
    out.norm(f"{embeddings}.LayerNorm", "backbone.embedding.norm", h)
    for n in range(c.layers):
        hf, name = f"{family}.encoder.layer.{n}", f"backbone.layers.{n}"
        for part, word in (("q", "query"), ("k", "key"), ("v", "value")):
            out.linear(f"{hf}.attention.self.{word}", (f"{name}.attention.{part}",), (h,), h, bias=True)
        out.linear(f"{hf}.attention.output.dense", (f"{name}.attention.out",), (h,), h, bias=True)
        out.norm(f"{hf}.attention.output.LayerNorm", f"{name}.attention_norm", h)
        out.linear(f"{hf}.intermediate.dense", (f"{name}.mlp.up",), (inner,), h, bias=True)
        out.linear(f"{hf}.output.dense", (f"{name}.mlp.down",), (h,), inner, bias=True)
        out.norm(f"{hf}.output.LayerNorm", f"{name}.mlp_norm", h)
    unused = [rf"{family}\.embeddings\.(position|token_type)_ids"]
    tied: dict[str, str] = {}
    head = _ENCODER_HEADS[family]
    if spec.lm_head:
        out.linear(head.dense, ("lm_head.transform.dense",), (h,), h, bias=True)
        out.norm(head.norm, "lm_head.transform.norm", h)
        bias, second = head.bias, head.second_bias
        if c.tie_embeddings:
            tied = {head.matrix: tokens, second: bias}
        else:
            # Untied, transformers adds the decoder's own bias and never reads the other.
            out.one(head.matrix, "lm_head.weight", (spec.vocab_size, h))
            bias, second = second, bias
            unused.append(re.escape(second))
        out.one(bias, "lm_head.bias", (spec.vocab_size,))
    else:
        unused.append(head.everything)
    if pooler:
        out.linear(f"{family}.pooler.dense", ("classifiers.pooler",), (h,), h, bias=True)
    else:
        unused.append(rf"{family}\.pooler\.dense\..*")
    outputs = {each.name: each.outputs for each in spec.heads}
    if "nsp" in outputs:
        out.linear("cls.seq_relationship", ("classifiers.heads.nsp",), (outputs["nsp"],), h, bias=True)
    else:
        unused.append(r"cls\.seq_relationship\..*")
    return TensorMap(tuple(out), f"{family}.", tied, tuple(unused))
