from __future__ import annotations

import json

import pytest

from megalm.data.learn import train_tokenizer
from megalm.data.prepare import prepare
from megalm.data.tokenizer import DESCRIPTOR, load_tokenizer, save_tokenizer, tokenizer_from_spec
from megalm.errors import DataError, PluginError, TokenizerError
from megalm_plugins.tokenizers.byte import ByteTokenizer
from megalm_plugins.tokenizers.hf import HFConfig, HFTokenizer


@pytest.fixture
def trained(tmp_path, random_documents, text_file):
    path = text_file("\n\n".join(random_documents(1, 100)))
    tokenizer = train_tokenizer(HFTokenizer, HFConfig(vocab_size=300), [path], tmp_path / "hf", component="hf")
    return tmp_path / "hf", tokenizer, path


def test_save_and_load(trained, resolve):
    folder, tokenizer, _ = trained
    name, again = load_tokenizer(folder, resolve)
    assert name == "hf"
    assert again.identity == tokenizer.identity
    assert again.special == tokenizer.special
    text = ["Where Come wörld 中文"]
    assert again.encode_batch(text) == tokenizer.encode_batch(text)
    descriptor = json.loads((folder / DESCRIPTOR).read_text())
    assert descriptor["vocab_size"] == tokenizer.vocab_size
    assert descriptor["special"]["eos"] == tokenizer.special.eos


def test_changed_files_are_refused(trained, resolve):
    folder = trained[0]
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"has identity .*, but megalm_tokenizer.json says"):
        load_tokenizer(folder, resolve)
    path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(folder, resolve)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "megalm-tokenizer", "version": 9}',
        '{"format": "megalm-tokenizer", "version": 1}',
    ],
)
def test_damaged_descriptor(tmp_path, resolve, content):
    (tmp_path / DESCRIPTOR).write_text(content)
    with pytest.raises(TokenizerError, match=DESCRIPTOR):
        load_tokenizer(tmp_path, resolve)


def test_missing_component(tmp_path, resolve):
    save_tokenizer(ByteTokenizer(), "other", tmp_path)
    with pytest.raises(PluginError, match="no tokenizer other"):
        load_tokenizer(tmp_path, resolve)


def test_specs(trained, tmp_path, resolve):
    folder, tokenizer, path = trained
    for spec in (str(folder), f"hf:{folder}", f"hf:{folder / 'tokenizer.json'}"):
        name, found = tokenizer_from_spec(spec, resolve)
        assert (name, found.identity) == ("hf", tokenizer.identity)
    assert tokenizer_from_spec("byte", resolve)[1].vocab_size == 262
    prepare([path], tokenizer, tmp_path / "store", component="hf")
    assert tokenizer_from_spec(str(tmp_path / "store"), resolve)[1].identity == tokenizer.identity
    for spec, message in (
        ("hf:missing.json", r"missing\.json: no such file"),
        ("hf", "no text to learn from"),
        ("sentencepiece", "no text to learn from"),
        ("nonsense", "neither a folder.*no tokenizer nonsense"),
        ("a:b:c", "neither a folder"),
        ("", "neither|folder without"),
        (str(tmp_path), "a folder without megalm_tokenizer.json"),
        (f"sentencepiece:{path}", "not a SentencePiece model"),
        (f"hf:{path}", r"not a tokenizer\.json"),
        ("x" * 300, "neither a folder"),
        (f"hf:{'x' * 300}", "no such file"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer_from_spec(spec, resolve)


def test_a_qualified_name_with_and_without_a_path(trained):
    def resolve(name):
        if name == "mine:hf":
            return HFTokenizer
        if name == "mine:byte":
            return ByteTokenizer
        raise PluginError(f"no {name}")

    assert tokenizer_from_spec(f"mine:hf:{trained[0]}", resolve)[0] == "mine:hf"
    assert tokenizer_from_spec("mine:byte", resolve)[0] == "mine:byte"


def test_failed_training_leaves_nothing(tmp_path, text_file):
    path = text_file("too little text")
    with pytest.raises(TokenizerError, match="vocab_size 20 is too small"):
        train_tokenizer(HFTokenizer, HFConfig(vocab_size=20), [path], tmp_path / "out", component="hf")
    with pytest.raises(DataError, match="no such file"):
        train_tokenizer(HFTokenizer, HFConfig(), [tmp_path / "gone"], tmp_path / "out", component="hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt"]
