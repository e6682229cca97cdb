"""A head's layers under the names that a family of transformers gives them, and the class that has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megalm.errors import ConfigError
from megalm.model.hf.names import Entry, TensorMap
from megalm.plugin.contract.hugging_face import HuggingFaceHead

CLASSES = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "sentence_embedding": "Model",
}
"""What follows the family's name, and ``AutoModel``."""
_FAMILIES = {
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "bert": "Bert",
    "roberta": "Roberta",
}
_ENCODERS = ("bert", "roberta")
_QA_PREFIXES = {"llama": "transformer.", "qwen2": "transformer.", "qwen3": "transformer."}
"""Of the backbone, where question answering has another one than the family's other classes."""


@dataclass(frozen=True)
class ModelHead:
    """A head in a model."""

    told: HuggingFaceHead
    module: str
    """Its name under ``plugins`` in logical names."""

    def layer(self, path: str) -> str:
        """Logical name of a layer."""
        return f"plugins.{self.module}.{path}".rstrip(".")

    def own_file(self) -> list[str]:
        """Logical names of tensors that are written beside the model's."""
        if self.told.task != "sentence_embedding" or self.told.output is None:
            return []
        return [f"{self.layer(self.told.output)}.{leaf}" for leaf in ("weight", "bias")]


def head_class(family: str, head: ModelHead) -> str:
    """The class of transformers."""
    return f"{_FAMILIES[family]}{CLASSES[head.told.task]}"


def auto_class(head: ModelHead) -> str:
    """The class that finds it."""
    name = CLASSES[head.told.task]
    return f"Auto{name}" if name == "Model" else f"AutoModel{name}"


def with_head(names: TensorMap, family: str, head: ModelHead, shapes: Mapping[str, tuple[int, ...]]) -> TensorMap:
    """A family's map with the tensors of a head, whose logical ``shapes`` are given.

    ConfigError says which setting of the head the family cannot express.
    """
    check_head(family, head, shapes)
    if head.told.task == "sentence_embedding":  # its layer is a file of its own
        return names
    entries = []
    for hf, path in _layers(family, head.told).items():
        for leaf in ("weight", "bias"):
            name = f"{head.layer(path)}.{leaf}"
            if name in shapes:
                entries.append(Entry(f"{hf}.{leaf}", ((name, shapes[name]),)))
    prefix = _QA_PREFIXES.get(family, names.prefix) if head.told.task == "question_answering" else names.prefix
    own = tuple(replace(entry, hf=prefix + entry.hf.removeprefix(names.prefix)) for entry in names.entries)
    return replace(names, entries=(*own, *entries), prefix=prefix)


def check_head(family: str, head: ModelHead, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ConfigError that says which setting of a head the family cannot express."""
    told, name = head.told, head_class(family, head)
    if told.task != "sequence_classification":
        return
    pooling, biased = ("pooler", True) if family in _ENCODERS else ("last", False)
    problems = []
    if told.pooling != pooling:
        problems.append(f'pooling = "{told.pooling}": {name} reads what pooling = "{pooling}" does')
    if (f"{head.layer(told.output or '')}.bias" in shapes) != biased:
        has, word = ("a", "true") if biased else ("no", "false")
        problems.append(f"{name} has {has} bias in its last layer; train the head with bias = {word}")
    if problems:
        raise ConfigError([f"head {head.module}: {problem}" for problem in problems])


def _layers(family: str, told: HuggingFaceHead) -> dict[str, str]:
    """The paths of the head's layers, by the family's names of them."""
    output, pooler = told.output or "", told.pooler
    if told.task == "question_answering":
        return {"qa_outputs": output}
    if told.task == "token_classification":
        return {"classifier" if family in (*_ENCODERS, "gpt2") else "score": output}
    if pooler is None:
        return {"score": output}
    if family == "roberta":
        return {"classifier.dense": pooler, "classifier.out_proj": output}
    return {"bert.pooler.dense": pooler, "classifier": output}
