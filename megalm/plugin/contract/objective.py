"""The objective contract: written once, it knows nothing of ranks.

The engine asks an objective for examples and for *counts* (how many items each term scores, from data alone), sums the
counts over every microbatch and rank of the step, scales each term by weight / count before backward, and from then on
only adds. So an objective returns *sums*, never means, and the loss is the same under every layout.

Everything that depends on the layout lives in the context that :meth:`Objective.loss` receives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from megalm.config.settings import Settings
from megalm.plugin.contract.modules import ModuleBuilder

if TYPE_CHECKING:
    import torch

    from megalm.plugin.contract.tokenizer import Tokenizer

Example = dict[str, Any]
"""One row before collation; keys and values are the objective's own (numpy arrays, ints)."""
Batch = dict[str, np.ndarray]
"""A collated microbatch: the tensors declared in :class:`Needs`, as numpy arrays."""
Attention = Literal["causal", "bidirectional", "prefix"]
Coupling = Literal["token", "example", "cell"]
IGNORE = -100
"""Label of a position that is not scored."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the batch: its dimensions by name, its type, and which pipeline stages read it.

    Dimension names that the engine knows: ``batch`` (split over data-parallel ranks and microbatches) and ``seq``
    (split over context-parallel ranks). Others are kept whole.
    """

    dims: tuple[str, ...] = ("batch", "seq")
    dtype: str = "int64"
    to: Literal["first", "last", "all"] = "first"


@dataclass(frozen=True)
class HeadSpec:
    """A classifier over hidden vectors, owned by the engine: ``outputs`` logits, on BERT's pooler where ``pooled``."""

    name: str
    outputs: int
    pooled: bool = False


@dataclass(frozen=True)
class AuxModel:
    """A smaller model that stands beside the backbone on the pipeline's first stage, and has its embedding.

    It is of the model's architecture and attention. The embedding's vectors are brought to its own width, go through
    its layers, are brought back, and meet the embedding's matrix: a language model over the same vocabulary. Its
    parameters are trained with the backbone's, and checkpoints call them ``auxiliary.NAME.``...
    """

    width: float = 0.25
    """Share of the model's hidden size, heads and inner size that it has."""
    layers: int | None = None
    """None: as many as the model."""
    heads: int | None = None
    """None: the share that ``width`` says, at least one."""


@dataclass(frozen=True)
class Prepares:
    """What :meth:`Objective.prepare` gives."""

    tensors: tuple[str, ...] = ()
    """Tensors of the batch that it replaces."""
    terms: tuple[str, ...] = ()
    """Terms of :meth:`Objective.weights` that it computes, and ``loss`` does not."""


@dataclass(frozen=True)
class Teacher:
    """A model that the run's model learns from, in the run's own layout. It has its tokenizer."""

    path: str
    """A checkpoint, or a run's folder, of which the newest is taken."""
    hidden_size: int | None = None
    """The width that it must have; None: any."""


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the backbone.

    ``coupling``: what one item's loss depends on. ``token``: positions of its row, through the backbone alone;
    ``example``: its whole row; ``cell``: the rows of a cell, ``train.cell`` consecutive slots of the step's global
    batch, which :meth:`LossContext.gather` brings together. A cell spans the data-parallel ranks: micro_batch * dp
    equals it.

    Batch tensors with a meaning to the backbone: ``tokens``, ``token_types``, ``attention_mask`` (bool, true where
    a position may be attended to; leave it out where rows have no padding) and ``documents`` (int64, to all stages:
    positions of a row attend to each other only where they stand in one run of equal numbers, and positions count from
    the run's start; leave it out where a row is one text). ``lm_head`` asks for the vocabulary projection.

    ``attention``: ``causal`` and ``bidirectional`` say it of every row. ``prefix`` is causal, but for the first tokens
    of each row, which every position attends to: how many is said by the tensor ``prefix``, int64 ("batch",), to all
    stages. With 0 or 1 a row is causal, with its length bidirectional, so that one backbone serves both. None: as the
    objectives say that this one is joined with.
    """

    attention: Attention | None
    tensors: Mapping[str, TensorSpec]
    lm_head: bool = True
    heads: tuple[HeadSpec, ...] = ()
    token_types: int = 0
    coupling: Coupling = "token"
    modules: Mapping[str, ModuleBuilder] = field(default_factory=dict)
    """Modules of the objective's own, made by the engine; ``LossContext.module`` gives them, and checkpoints call their
    parameters ``plugins.NAME.``..."""
    aux_models: Mapping[str, AuxModel] = field(default_factory=dict)
    """Smaller models that :meth:`Objective.prepare` uses."""
    teacher: Teacher | None = None
    """A model that is not trained, and says for every batch what :meth:`LossContext.distill_loss` and
    :meth:`LossContext.teacher_hidden` give."""
    prepares: Prepares = field(default_factory=Prepares)
    """What :meth:`Objective.prepare` gives; where it says nothing, that is not called."""


@dataclass(frozen=True)
class Term:
    """One loss term of a microbatch: the *sum* over its scored items (a 0-d tensor).

    Scope ``token``: the items are split over sequence shards; ``example``: they are whole rows, the same on each shard.
    """

    sum: torch.Tensor
    scope: Literal["token", "example"] = "token"


@dataclass(frozen=True)
class PreparedBatch:
    """What :meth:`Objective.prepare` makes of a batch: all that :class:`Prepares` names, no more."""

    tensors: Mapping[str, torch.Tensor]
    """Each of the shape and type that it has in the batch."""
    terms: Mapping[str, Term] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveEnv:
    """What an objective may know of the run."""

    tokenizer: Tokenizer
    sequence_length: int
    packing: int = 0
    """Rows are to hold whole documents kept apart (``packed_row``), so many rows packed together; 0: as the objective
    likes. Only where :attr:`Objective.packs`."""


class Corpus(Protocol):
    """Read access to a tokenised corpus: a stream of documents, each ended by the tokenizer's end-of-document token
    (where it has one), each a run of sentences. Positions are token offsets into the stream."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_sentences(self) -> int: ...

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int64; IndexError outside of it."""
        ...

    def document(self, index: int) -> tuple[int, int]:
        """Token range [start, stop) of a document, its end-of-document token included."""
        ...

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of the token offsets of documents, int64; the last entry is the stream's length."""
        ...

    def document_sentences(self, index: int) -> tuple[int, int]:
        """Range [first, last) of the numbers of a document's sentences; never empty."""
        ...

    def sentence(self, index: int) -> tuple[int, int]:
        """Token range [start, stop) of a sentence, without the end-of-document token."""
        ...

    def document_at(self, position: int) -> int:
        """Number of the document that holds a token position."""
        ...

    def sentence_at(self, position: int) -> int:
        """Number of the sentence that holds a token position (an end-of-document token belongs to the last one)."""
        ...


class LossContext(Protocol):
    """The only thing that communicates. Everything it returns is the same on every tensor-parallel rank.

    ``hidden`` is the backbone's output for the microbatch, an opaque tensor: hand it to these functions only.
    """

    def lm_loss(self, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy of the vocabulary for each scored position.

        ``labels`` (batch, seq) int64, ``IGNORE`` where not scored. With ``where`` (batch, seq) bool, only those
        positions go through the head. Returns a 1-d tensor of nats (0 at ignored labels), in row-major order of the
        positions.
        """
        ...

    def vocabulary_loss(self, x: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy of the vocabulary for vectors (batch, n, hidden) from the functions below or from a module of
        the objective's own: what :meth:`lm_loss` is to positions.

        They meet the vocabulary's matrix and bias as they are, without the head's transform before. ``labels`` and
        ``where``: (batch, n). Returns as :meth:`lm_loss` does. Such items belong to whole rows: scope ``example``.
        """
        ...

    def pick(self, hidden: torch.Tensor, position: int) -> torch.Tensor:
        """The hidden vector of one position of each row: (batch, hidden)."""
        ...

    def take(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden vectors at ``positions`` (batch, n) int64: (batch, n, hidden)."""
        ...

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the positions where ``mask`` (batch, seq) is true: (batch, hidden)."""
        ...

    def full_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        """All hidden vectors: (batch, seq, hidden)."""
        ...

    def distill_loss(
        self, hidden: torch.Tensor, where: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """temperature^2 KL(teacher || model) of softmax(logits / temperature) at each position where ``where`` (batch,
        seq) is true: (n,) nats, in row-major order. The teacher is that of :attr:`Needs.teacher`."""
        ...

    def teacher_hidden(self, where: torch.Tensor) -> torch.Tensor:
        """The teacher's last hidden vectors of the positions where ``where`` (batch, seq) is true: (n, its width), in
        row-major order, without gradients. :meth:`select` gives the model's own."""
        ...

    def select(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """The hidden vectors of the positions where ``where`` (batch, seq) is true: (n, hidden), in row-major order.

        For losses of each position. Where rows are split over ranks, those of this rank's positions.
        """
        ...

    def gather(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The vectors of every row of the cell, for objectives whose coupling is ``cell``.

        ``x`` (rows, ...) holds a vector for each row of this microbatch, any fixed number for each example. Returns
        those of the whole cell in the order of their slots, and the place of this microbatch's first row among them.
        Gradients flow back to whoever computed a row. Call it once for each tensor, also where a microbatch has nothing
        to score: every data-parallel rank takes part.
        """
        ...

    def contrastive_loss(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        targets: torch.Tensor,
        temperature: float | torch.Tensor,
        excluded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """-log softmax(queries keys^T / temperature)[target] of each query: (n,) in nats, 0 where the target is
        ``IGNORE``. Their products are never all in memory.

        ``queries`` (n, features), ``keys`` (m, features), such as :meth:`gather` gives; ``targets`` (n,) int64 are rows
        of ``keys``. ``excluded`` (n,) int64 names a key for each query that is not among its choices, -1: none.
        """
        ...

    def head(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., outputs) of a head of :attr:`Needs.heads` for vectors (..., hidden) from the functions above.

        They are float32, or float64 where the run is: write losses without casts, or the proofs see the rounding.
        """
        ...

    def module(self, name: str) -> torch.nn.Module:
        """A module of :attr:`Needs.modules`, for vectors from the functions above."""
        ...

    def dropout(self, x: torch.Tensor, p: float, site: str) -> torch.Tensor:
        """Dropout of vectors (batch, hidden) or (batch, n, hidden) that the functions above gave; identity in
        evaluation.

        The mask is a function of (seed, step, site, row, place in the row, feature), so it is the same under every
        layout. ``site`` is a name of the caller's choice; two calls with one name draw one mask.
        """
        ...

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as float32, or float64 where the run is: what losses of a module's outputs are computed in."""
        ...


class PrepareContext(Protocol):
    """What :meth:`Objective.prepare` reaches auxiliary models through; ``name`` is theirs in :attr:`Needs.aux_models`.

    Everything it returns but hidden vectors is the same on every tensor-parallel rank.
    """

    def hidden(self, name: str) -> torch.Tensor:
        """The model's hidden vectors for the batch's ``tokens``: an opaque tensor, for the functions below."""
        ...

    def lm_loss(
        self, name: str, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As :meth:`LossContext.lm_loss`."""
        ...

    def sample(
        self, name: str, hidden: torch.Tensor, where: torch.Tensor, *, temperature: float = 1.0, size: int | None = None
    ) -> torch.Tensor:
        """A token for each position where ``where`` (batch, seq) is true, drawn from softmax(logits / temperature): ids
        (n,) int64, in row-major order, without gradients.

        The draw is a function of (seed, step, row, position, name), whoever computes it. ``size``: only ids below it
        are drawn, such as the tokenizer's where the model's vocabulary is padded.
        """
        ...


class Objective(ABC):
    """A pretraining objective. Subclass, set ``Config``, and yield a ``Component`` from ``megalm_objectives``."""

    Config: ClassVar[type[Settings]] = Settings
    """Validated model of ``[objective.NAME]``."""
    packs: ClassVar[bool] = False
    """Can do as :attr:`ObjectiveEnv.packing` asks: rows of documents, numbered in the tensor ``documents``."""
    joins: ClassVar[tuple[str, ...]] = ()
    """Objectives whose rows it can score, where it builds none itself: it is then joined with one of these, or with
    another that gives the same tensors. The proof kit takes the first."""
    perplexities: ClassVar[tuple[str, ...]] = ()
    """Terms whose items are predicted tokens, so that the exponential of their mean is a perplexity: a model's own,
    where each token is predicted from all before it, else a pseudo-perplexity."""
    checkpoints: ClassVar[tuple[str, ...]] = ()
    """Settings that name a checkpoint of a model which the run does not train. Where they are left out, the proof kit
    puts a small model there that it has trained for a step, with the objective's tokenizer and kind of attention."""
    version: ClassVar[int] = 1
    """Raise on any change of meaning; stored in checkpoints and compared on resume."""

    def __init__(self, cfg: Any, env: ObjectiveEnv) -> None:
        """Raise :class:`megalm.errors.ConfigError` for what the configuration cannot do with this tokenizer or
        length.
        """
        self.cfg = cfg
        self.env = env

    @abstractmethod
    def needs(self) -> Needs:
        """What the backbone must provide."""

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss term in the total."""

    def check_corpus(self, corpus: Corpus) -> None:  # noqa: B027
        """Raise :class:`megalm.errors.DataError` where the corpus cannot serve (NSP needs two documents, say)."""

    @abstractmethod
    def num_samples(self, corpus: Corpus) -> int:
        """Samples of one epoch; :meth:`build_example` takes numbers below it."""

    @abstractmethod
    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        """One row. ``rng`` is addressed by (seed, objective, epoch, sample): draw from nothing else."""

    def build_batch(self, samples: np.ndarray, corpus: Corpus) -> Batch | None:
        """What :meth:`collate` gives of the examples of ``samples``, int64 (rows,), of one corpus: in one go, where
        nothing is drawn and it is worth the code. None, the default: each row is to be built."""
        return None

    def rates(self) -> Mapping[str, float]:
        """Declared probabilities of what :meth:`build_example` or :meth:`extend_example` draws; none by default.

        Each is a name and a probability that :meth:`observe` counts. The proof kit compares the two.
        """
        return {}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        """(hits, trials) of each declared rate in one finished row; trials are independent draws."""
        return {}

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        """For joint objectives: add to (or corrupt) the row that another objective built.

        ``example`` holds at least ``tokens`` (seq,) and ``special`` (seq,) bool, true where a token is padding or a
        special token that must stay. Objectives that can only build rows leave this out.
        """
        raise NotImplementedError(f"{type(self).__name__} only builds rows")

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Stack rows into exactly the tensors of :meth:`needs`. Labels are shifted HERE, never in the loss: a neighbour
        may live on another rank. Where each example gives several rows (views), row r is view r % views of example
        r // views.
        """

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Items that each term scores in this batch, from data alone."""

    def prepare(self, batch: Mapping[str, torch.Tensor], ctx: PrepareContext) -> PreparedBatch:
        """Before the backbone sees a batch: replace some of its tensors by what auxiliary models make of it, and score
        those models.

        Called where :attr:`Needs.prepares` says something, on the ranks with the pipeline's first stage, with all
        tensors of the batch. The other ranks get the tensors that it returns; no gradient flows through them.
        """
        raise NotImplementedError(f"{type(self).__name__} says in Needs.prepares what prepare() gives, but has none")

    @abstractmethod
    def loss(self, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        """Sums of each term of :meth:`weights` over the batch, but for those of :meth:`prepare`; a term that scores
        nothing in it may be left out.

        ``batch`` holds the tensors whose spec says ``to="last"`` or ``"all"``.
        """
