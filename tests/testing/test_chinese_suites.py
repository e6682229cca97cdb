"""First-party objectives and heads on Chinese: text without spaces, a token to a character, sentences that end in 。"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megalm.parallel import rng
from megalm.plugin.contract.records import Record
from megalm.testing import HeadSuite, ObjectiveSuite
from megalm.testing.head.records import make_records
from megalm.testing.head.subject import HeadSubject
from megalm.testing.objective.subject import ObjectiveSubject

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]")
CHARACTERS = "天地人你我他山水火木金土日月星云风雨雪花草虫鱼鸟马牛羊大小多少上下左右来去出入长短高低红黄蓝白黑的"
_FOLDER = tempfile.TemporaryDirectory(prefix="megalm-chinese-")


@cache
def chinese() -> tuple[str, Path]:
    """A tokenizer of WordPiece with a token for each character, as ``--tokenizer`` names it, and a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: n for n, token in enumerate((*SPECIAL, *CHARACTERS, *"，。！？"))}
    engine = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens(list(SPECIAL))
    path, text = Path(_FOLDER.name) / "tokenizer.json", Path(_FOLDER.name) / "text.txt"
    engine.save(str(path))
    draw = rng.generator("chinese text")

    def sentence() -> str:
        words = "".join(draw.choice(list(CHARACTERS), size=int(draw.integers(3, 14))))
        return f"{words[:3]}，{words[3:]}{draw.choice(list('。。！？'))}" if len(words) > 5 else f"{words}。"

    pages = ["".join(sentence() for _ in range(int(draw.integers(1, 7)))) for _ in range(150)]
    text.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    return f"hf:{path}", text


@pytest.fixture(autouse=True, scope="class")
def chosen(request: pytest.FixtureRequest, full: bool, campaign_seed: int) -> None:
    """Five of the suites, drawn; with the full counts all."""
    own = sorted(name for name in globals() if name.startswith("Test"))
    if not full and request.cls.__name__ not in random.Random(campaign_seed).sample(own, 5):
        pytest.skip("runs with the full counts")


class ChineseObjective(ObjectiveSuite):
    sample = 1

    @classmethod
    def subject(cls) -> ObjectiveSubject:
        cls.tokenizer, cls.text = chinese()
        return super().subject()


class ChineseHead(HeadSuite):
    """The made-up records, each letter a character and nothing between words: spans keep their places."""

    sample = 1

    @classmethod
    def subject(cls) -> HeadSubject:
        cls.tokenizer, _ = chinese()
        with super().subject() as made:
            fields, labels = made.head.fields(), made.labels
        cls.records = [translated(record) for record in make_records(fields, labels, 40, seed=3)]
        return super().subject()


def translated(record: Mapping[str, Any]) -> Record:
    def character(letter: str) -> str:
        return "的" if letter == " " else CHARACTERS[ord(letter) % len(CHARACTERS)]

    def value(name: str, found: Any) -> Any:
        if name in ("tags", "label", "labels") or isinstance(found, (int, float)):
            return found
        if isinstance(found, str):
            return "".join(map(character, found))
        return [value(name, each) for each in found]

    return {name: value(name, found) for name, found in record.items()}


class TestCausalLM(ChineseObjective):
    objective = "causal_lm"


class TestMaskedLMAndOrder(ChineseObjective):
    objective = "mlm+sop"
    settings = ("objective.mlm.whole_word=true",)


class TestSpans(ChineseObjective):
    objective = "nsp+span_mlm"


class TestDenoise(ChineseObjective):
    objective = "denoise"


class TestReplacedTokens(ChineseObjective):
    objective = "rtd"


class TestContrastive(ChineseObjective):
    objective = "contrastive"
    settings = ('objective.contrastive.positives="document"',)


class TestSequenceClassification(ChineseHead):
    head = "sequence_classification"
    settings = ("pair=true",)


class TestMultiLabel(ChineseHead):
    head = "multi_label_classification"


class TestTagsWithACRF(ChineseHead):
    head = "token_classification"
    settings = ("crf=true", 'separator=""')


class TestAnswers(ChineseHead):
    head = "extractive_qa"


class TestRelations(ChineseHead):
    head = "relation_classification"
    settings = ('marks=["天", "地"]',)


class TestEmbedding(ChineseHead):
    head = "embedding"


class TestRegression(ChineseHead):
    head = "regression"
