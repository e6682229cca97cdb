from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from megalm.cli import data
from megalm.data.store import TokenStore
from megalm.errors import ConfigError, DataError, TokenizerError


@pytest.fixture
def run(monkeypatch, resolve):
    monkeypatch.setattr(data, "resolver", lambda plugins: resolve)

    def call(*arguments):
        result = CliRunner().invoke(data.app, [str(a) for a in arguments])
        if result.exception is not None:
            raise result.exception
        return result.output

    return call


def test_a_whole_session(run, tmp_path, random_documents, text_file):
    path = text_file("\n\n".join(random_documents(1, 300)))
    out = run("train-tokenizer", "sentencepiece", path, "--out", tmp_path / "sp", "--set", "vocab_size=325")
    assert "vocabulary 325" in out
    out = run("prepare", path, "--tokenizer", tmp_path / "sp", "--out", tmp_path / "store", "--validation", "0.2")
    store = TokenStore.open(tmp_path / "store", "train")
    assert f"train: {store.num_tokens:,} tokens" in out
    assert store.manifest.tokenizer.component == "sentencepiece"
    out = run("inspect", tmp_path / "store", "--part", "validation", "--samples", 2, "--verify")
    assert out.count("validation document ") == 2
    assert "median" in out
    assert "█" in out
    found = json.loads(run("baselines", tmp_path / "store", "--json"))
    assert 0 < found["bigram"] < found["unigram"]
    assert f"{found['bigram']:.4f}" in run("baselines", tmp_path / "store")


def test_inspect_shows_what_was_read_and_disarms_control_characters(run, tmp_path, text_file):
    path = text_file("First one. Second one!\n\nred \x1b[31m text\n\n[bold]markup[/bold]")
    run("prepare", path, "--out", tmp_path / "s", "--validation", 0)
    out = run("inspect", tmp_path / "s", "--samples", 9)
    assert "| First one.\n|  Second one!" in out
    assert "\x1b" not in out
    assert "red \\x1b[31m text" in out
    assert "[bold]markup[/bold]" in out


def test_errors_are_the_users(run, tmp_path, text_file):
    path = text_file("a\n\nb")
    with pytest.raises(DataError, match="--documents page: expected one of blank-line, line, file"):
        run("prepare", path, "--out", tmp_path / "s", "--documents", "page")
    with pytest.raises(TokenizerError, match="nonsense"):
        run("prepare", path, "--out", tmp_path / "s", "--tokenizer", "nonsense")
    with pytest.raises(ConfigError) as caught:
        run("train-tokenizer", "hf", path, "--out", tmp_path / "s", "--set", "vocab_siz=300", "--set", "model=x")
    assert len(caught.value.problems) == 2
    assert "vocab_size" in str(caught.value)
    assert "wordpiece" in str(caught.value)
    with pytest.raises(ConfigError, match=r"--set vocab_size\.x=1: vocab_size is a value, not a table"):
        run(
            "train-tokenizer", "hf", path, "--out", tmp_path / "s", "--set", "vocab_size=300", "--set", "vocab_size.x=1"
        )
    with pytest.raises(ConfigError, match="at most 16777216, found the integer 10000000000000"):
        run("train-tokenizer", "hf", path, "--out", tmp_path / "s", "--set", "vocab_size=10000000000000")
    with pytest.raises(DataError, match="no token store here, it is missing"):
        run("inspect", tmp_path / ("x" * 300))
    with pytest.raises(DataError, match="is a file"):
        run("inspect", path)
    with pytest.raises(DataError, match="no token store"):
        run("baselines", tmp_path / "nowhere")
    run("prepare", path, "--out", tmp_path / "s")
    (tmp_path / "s" / "tokenizer" / "megalm_tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="cannot be read"):
        run("inspect", tmp_path / "s")
