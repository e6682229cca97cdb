"""The run's objective: one plugin, or several on shared examples (``mlm+nsp``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megalm.errors import ConfigError, ObjectiveError
from megalm.parallel import rng
from megalm.plugin.contract.modules import ModuleBuilder
from megalm.plugin.contract.objective import (
    IGNORE,
    Attention,
    AuxModel,
    Batch,
    Corpus,
    Coupling,
    Example,
    HeadSpec,
    LossContext,
    Needs,
    Objective,
    PrepareContext,
    PreparedBatch,
    Prepares,
    TensorSpec,
    Term,
)

if TYPE_CHECKING:
    import torch

Sample = tuple[Corpus, int, tuple[int | str, ...]]
"""A corpus, the number of a sample in it, and the address of its draws but for that number."""
_PREFIX = TensorSpec(("batch",), to="all")
_COUPLINGS: tuple[Coupling, ...] = ("token", "example", "cell")


class _LastStage(dict[str, Any]):
    """The tensors of the last stage, and why one is not among them."""

    def __init__(self, tensors: dict[str, Any], objective: TrainingObjective) -> None:
        super().__init__(tensors)
        self._objective = objective

    def __missing__(self, name: str) -> Any:
        objective = self._objective
        if name in objective.needs.tensors:
            raise ObjectiveError(
                f"objective {objective.name}: loss() reads the tensor {name!r}, which needs() sends to the first "
                'stage; give its TensorSpec to="all"'
            )
        raise ObjectiveError(
            f"objective {objective.name}: loss() reads the tensor {name!r}, but needs() declares "
            f"{', '.join(sorted(objective.needs.tensors))}"
        )


class TrainingObjective:
    """One or more objectives that score the same rows.

    The first that can only build rows builds them (or the first, where all can extend); the others extend them in the
    order of their names, so that ``a+b`` and ``b+a`` are the same objective. Every random draw is addressed by (seed,
    split, part, epoch, sample).
    """

    def __init__(self, parts: Mapping[str, Objective], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        ordered = dict(sorted(parts.items()))
        builders = [n for n, part in ordered.items() if type(part).extend_example is Objective.extend_example]
        if len(builders) > 1:
            raise ConfigError([f"train.objective: {' and '.join(builders)} both build rows; join at most one of them"])
        if not (able := [name for name in (*builders, *ordered) if not ordered[name].joins]):
            known = " or ".join(dict.fromkeys(each for part in ordered.values() for each in part.joins))
            name = "+".join(ordered)
            raise ConfigError([f"train.objective: {name} scores rows that another builds; join it with {known}"])
        first = able[0]
        self.name = "+".join(ordered)
        self.parts: dict[str, Objective] = {first: ordered.pop(first), **ordered}
        self._builder = self.parts[first]
        self.builds_batches = len(self.parts) == 1 and _builds_batches(type(self._builder))
        """Rows of a batch may be built in one go."""
        self.needs = self._join_needs()
        self.weights = self._join_weights()
        self._members: tuple[TrainingObjective, ...] = (self,)

    @property
    def members(self) -> Sequence[TrainingObjective]:
        """The objectives that a step's rows belong to, by :attr:`megalm.train.feed.Rows.member`: only this one, unless
        several are mixed."""
        return self._members

    def weights_of(self, rows: Mapping[int, int]) -> dict[str, float]:
        """Weight of each loss term in a total over rows of which each member has so many; only terms of members that
        have any. A member's weights count as much as its share of the rows."""
        return self.weights

    @property
    def versions(self) -> dict[str, int]:
        """Version of each part; stored in checkpoints."""
        return {name: part.version for name, part in sorted(self.parts.items())}

    def check_corpus(self, corpus: Corpus) -> None:
        """DataError where a part cannot use the corpus."""
        for part in self.parts.values():
            part.check_corpus(corpus)

    def num_samples(self, corpus: Corpus) -> int:
        """Samples of an epoch."""
        return self._builder.num_samples(corpus)

    def build(self, sample: int, corpus: Corpus, address: tuple[int | str, ...]) -> Example:
        """One row; ``address`` is (seed, split, epoch)."""
        (first, builder), *rest = self.parts.items()
        example = builder.build_example(sample, corpus, rng.reused_generator("example", first, *address, sample))
        for name, part in rest:
            example = part.extend_example(example, rng.reused_generator("example", name, *address, sample))
        return example

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """:meth:`collate` of :meth:`build` of each, by the part's own way for many rows where it has one."""
        return self._at_once(samples) or self.collate([self.build(at, corpus, where) for corpus, at, where in samples])

    def _at_once(self, samples: Sequence[Sample]) -> Batch | None:
        if not self.builds_batches:
            return None
        places: dict[int, list[int]] = {}
        for place, (corpus, _, _) in enumerate(samples):
            places.setdefault(id(corpus), []).append(place)
        joined: dict[str, np.ndarray] = {}
        for here in places.values():
            numbers = np.array([samples[place][1] for place in here], dtype=np.int64)
            batch = self._builder.build_batch(numbers, samples[here[0]][0])
            if batch is None:
                return None
            if len(places) == 1:
                return self.checked(batch)
            for name, array in batch.items():
                rows = (-1, len(array) // len(here), *array.shape[1:])  # an example may give several
                into = joined.setdefault(name, np.empty((len(samples) * rows[1], *rows[2:]), array.dtype))
                into.reshape(rows)[here] = array.reshape(rows)
        return self.checked(joined)

    def collate(self, examples: list[Example]) -> Batch:
        """Stack rows into the declared tensors; ObjectiveError where they are not as declared."""
        batch: dict[str, np.ndarray] = {}
        for part in self.parts.values():
            batch.update(part.collate(examples))
        return self.checked(batch)

    def checked(self, batch: Batch) -> Batch:
        """The batch; ObjectiveError where its tensors are not as declared."""
        if set(batch) != set(self.needs.tensors):
            raise ObjectiveError(
                f"objective {self.name}: collate gives {', '.join(sorted(batch))}, "
                f"but needs() declares {', '.join(sorted(self.needs.tensors))}"
            )
        for name, spec in self.needs.tensors.items():
            self._check_tensor(name, spec, batch[name], batch["tokens"].shape)
        return batch

    def _check_tensor(self, name: str, spec: TensorSpec, array: np.ndarray, tokens: tuple[int, ...]) -> None:
        known = dict(zip(("batch", "seq"), tokens, strict=True))
        expected = [known.get(dim, size) for dim, size in zip(spec.dims, array.shape, strict=False)]
        if array.dtype != spec.dtype or array.ndim != len(spec.dims) or list(array.shape) != expected:
            raise ObjectiveError(
                f"objective {self.name}: the tensor {name!r} is {array.dtype}{list(array.shape)}, "
                f"but is declared {spec.dtype} ({', '.join(spec.dims)}) with {known}"
            )
        if (name == "tokens" or (name == "labels" and self.needs.lm_head)) and array.size:
            ids = array if name == "tokens" or array.min() >= 0 else array[array != IGNORE]
            if ids.size and not (ids.min() >= 0 and ids.max() < self._vocab_size):
                raise ObjectiveError(
                    f"objective {self.name}: {name!r} holds ids from {ids.min()} to {ids.max()}, "
                    f"but the vocabulary has {self._vocab_size}"
                )

    def counts(self, batch: Batch) -> dict[str, int]:
        """Items that each term scores."""
        return {term: n for part in self.parts.values() for term, n in part.counts(batch).items()}

    def last_stage(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those tensors of a batch that the last stage has; ObjectiveError for one that only the first has."""
        known = {name: batch[name] for name, spec in self.needs.tensors.items() if spec.to != "first"}
        return _LastStage(known, self)

    def loss(self, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        """Sums of the terms that score something, of the tensors that the last stage has."""
        last = self.last_stage(batch)
        terms: dict[str, Term] = {}
        for part_name, part in self.parts.items():
            found = part.loss(hidden, last, ctx)
            if extra := sorted(set(found) - set(part.weights())):
                raise ObjectiveError(f"objective {part_name}: loss() gives {extra[0]!r}, which weights() does not name")
            if extra := sorted(set(found) & set(self.needs.prepares.terms)):
                raise ObjectiveError(
                    f"objective {part_name}: loss() gives {extra[0]!r}, which needs() says that prepare() gives"
                )
            _check_sums(part_name, found)
            terms.update(found)
        return terms

    def prepare(self, batch: Mapping[str, torch.Tensor], ctx: PrepareContext) -> PreparedBatch:
        """What the parts make of a batch before the backbone sees it; ObjectiveError where it is not as declared."""
        tensors: dict[str, torch.Tensor] = {}
        terms: dict[str, Term] = {}
        for name, part in self.parts.items():
            declared = self._prepares[name]
            if not (declared.tensors or declared.terms):
                continue
            found = part.prepare(batch, ctx)
            if extra := sorted({*found.tensors} ^ {*declared.tensors} | {*found.terms} - {*declared.terms}):
                raise ObjectiveError(
                    f"objective {name}: prepare() gives {_told(found.tensors, found.terms)}, but needs() declares "
                    f"{_told(declared.tensors, declared.terms)}: {extra[0]!r} is in one of them"
                )
            for key, tensor in found.tensors.items():
                if (tensor.shape, tensor.dtype) != (batch[key].shape, batch[key].dtype):
                    raise ObjectiveError(
                        f"objective {name}: prepare() makes the tensor {key!r} {tensor.dtype}{list(tensor.shape)}, "
                        f"but in the batch it is {batch[key].dtype}{list(batch[key].shape)}"
                    )
                tensors[key] = tensor.detach()
            _check_sums(name, found.terms)
            terms.update(found.terms)
        return PreparedBatch(tensors, terms)

    def check_terms(
        self, terms: Mapping[str, Term], counts: Mapping[str, int], *, prepared: bool = False
    ) -> None:
        """ObjectiveError where a term scored something by its counts but has no sum. ``prepared``: of those that
        prepare() gives; else of the others."""
        mine = (name for name in counts if (name in self.needs.prepares.terms) == prepared)
        if missing := sorted(name for name in mine if counts[name] and name not in terms):
            raise ObjectiveError(
                f"objective {self.name}: counts() says that {missing[0]!r} scores {counts[missing[0]]} items, "
                f"but {'prepare' if prepared else 'loss'}() gives no such term"
            )

    def _join_needs(self) -> Needs:
        tensors: dict[str, TensorSpec] = {}
        needs = {name: part.needs() for name, part in self.parts.items()}
        for name, need in needs.items():
            tokens = need.tensors.get("tokens")
            if tokens is None or tokens.dims != ("batch", "seq"):
                raise ObjectiveError(f"objective {name}: needs() must declare 'tokens' with dimensions (batch, seq)")
            if need.tensors.get("prefix") != (_PREFIX if need.attention == "prefix" else None):
                raise ObjectiveError(
                    f"objective {name}: needs() must declare the tensor 'prefix', int64 (batch), to all stages, where "
                    'attention is "prefix", and no tensor of that name elsewhere'
                )
        said = {n.attention for n in needs.values() if n.attention is not None}
        if not said:
            raise ConfigError([f"train.objective: no part of {self.name} says which attention it needs"])
        if len(said) > 1:
            raise ConfigError(
                ["train.objective: " + ", ".join(f"{k} needs {n.attention} attention" for k, n in needs.items())]
            )
        for name, need in needs.items():
            for key, spec in need.tensors.items():
                if tensors.setdefault(key, spec) != spec:
                    raise ConfigError([f"train.objective: {name} declares the tensor {key!r} unlike another part"])
            self._check_prepares(name, need, needs)
        teachers = [need.teacher for need in needs.values() if need.teacher is not None]
        if len(teachers) > 1:
            raise ConfigError([f"train.objective: the parts of {self.name} name {len(teachers)} teachers, not one"])
        self.attention: Attention = next(iter(said))
        """What the parts agree on."""
        self._prepares = {name: need.prepares for name, need in needs.items()}
        return union_of(needs, self.attention, tensors)

    def _check_prepares(self, name: str, need: Needs, everyone: Mapping[str, Needs]) -> None:
        if unknown := sorted({*need.prepares.tensors} - {*need.tensors}):
            raise ObjectiveError(f"objective {name}: prepares a tensor {unknown[0]!r} that needs() does not declare")
        if unknown := sorted({*need.prepares.terms} - {*self.parts[name].weights()}):
            raise ObjectiveError(f"objective {name}: prepares a term {unknown[0]!r} that weights() does not name")
        for other, its in everyone.items():
            if other != name and (both := sorted({*its.prepares.tensors} & {*need.prepares.tensors})):
                raise ConfigError([f"train.objective: {name} and {other} both prepare the tensor {both[0]!r}"])

    def _join_weights(self) -> dict[str, float]:
        weights: dict[str, float] = {}
        for name, part in self.parts.items():
            for term, weight in part.weights().items():
                if term in weights:
                    raise ConfigError([f"train.objective: {name} has a loss term {term!r} that another part has too"])
                weights[term] = weight
        return weights


def union_of(needs: Mapping[str, Needs], attention: Attention, tensors: Mapping[str, TensorSpec]) -> Needs:
    """What several objectives ask of one backbone; ConfigError for names that mean two things."""
    heads: dict[str, HeadSpec] = {}
    modules: dict[str, ModuleBuilder] = {}
    aux_models: dict[str, AuxModel] = {}
    for name, need in needs.items():
        for head in need.heads:
            if heads.setdefault(head.name, head) != head:
                raise ConfigError([f"train.objective: {name} declares the head {head.name!r} unlike another part"])
        for key, build in need.modules.items():
            if modules.setdefault(key, build) is not build:
                raise ConfigError([f"train.objective: {name} has a module {key!r}, as another part has"])
        for key, model in need.aux_models.items():
            if aux_models.setdefault(key, model) is not model:
                raise ConfigError([f"train.objective: {name} has an auxiliary model {key!r}, as another part has"])
    return Needs(
        attention=attention,
        tensors=tensors,
        lm_head=any(n.lm_head for n in needs.values()),
        heads=tuple(heads.values()),
        token_types=max(n.token_types for n in needs.values()),
        coupling=max((n.coupling for n in needs.values()), key=_COUPLINGS.index),
        modules=modules,
        aux_models=aux_models,
        teacher=next((n.teacher for n in needs.values() if n.teacher is not None), None),
        prepares=Prepares(
            tuple(key for need in needs.values() for key in need.prepares.tensors),
            tuple(key for need in needs.values() for key in need.prepares.terms),
        ),
    )


def _told(tensors: Iterable[str], terms: Iterable[str]) -> str:
    return f"the tensors [{', '.join(sorted(tensors))}] and the terms [{', '.join(sorted(terms))}]"


def _check_sums(part: str, terms: Mapping[str, Term]) -> None:
    for name, term in terms.items():
        if term.sum.dim() != 0:
            raise ObjectiveError(
                f"objective {part}: the term {name!r} has shape {list(term.sum.shape)}; "
                "a term is the sum of its items, one number"
            )


def _builds_batches(kind: type[Objective]) -> bool:
    """Whether it has ``build_batch``, and no class derived from the one that has it builds other rows."""
    places = {name: n for n, cls in reversed([*enumerate(kind.__mro__)]) for name in vars(cls)}
    return places["build_batch"] <= min(places["build_example"], places["collate"])
