from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from megalm.config.jsonschema import config_schema
from megalm.config.load import load_config
from megalm.config.schema import Config
from megalm.errors import ConfigError

GOOD = """\
[run]
dir = "runs/a"

[model]
architecture = "llama"
hidden_size = 32

[data]
path = "data"

[train]
objective = "mlm+nsp"
steps = 10
sequence_length = 16
global_batch = 4
micro_batch = 2
lr = 1

[objective.mlm]
mask_prob = 0.3
"""


@pytest.fixture
def load(manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(text=GOOD, *overrides, manager=manager):
        Path("run.toml").write_text(text)
        return load_config(Path("run.toml"), list(overrides), manager)

    return run


@pytest.fixture
def problems(load):
    def run(text=GOOD, *overrides, **kwargs):
        with pytest.raises(ConfigError) as info:
            load(text, *overrides, **kwargs)
        return info.value.problems

    return run


def swap(old, new, text=GOOD):
    assert text.count(old) == 1
    return text.replace(old, new)


# what is resolved


def test_defaults_architecture_file_and_overrides_are_laid_over_one_another(load):
    resolved = load(GOOD, "train.lr=3e-4", "model.heads=4")
    model = resolved.config.model
    assert (model.layers, model.hidden_size, model.heads, model.norm) == (3, 32, 4, "rms_norm")
    assert resolved.config.train.lr == 3e-4
    assert resolved.config.train.precision == "float32"
    expected = {
        "run.dir": "run.toml:2",
        "model.hidden_size": "run.toml:6",
        "model.layers": "architecture llama",
        "model.norm_eps": "default",
        "model.heads": "--set",
        "train.lr": "--set",
        "train.objective": "run.toml:12",
        "objective.mlm.mask_prob": "run.toml:20",
        "objective.mlm.style": "default",
        "optimizer.adamw.betas": "default",
        "log.callbacks": "default",
    }
    assert expected.items() <= resolved.origin.items()


def test_settings_of_every_component_that_the_run_uses(load):
    resolved = load(swap("[objective.mlm]", "[log]\ncallbacks = ['board']\n[objective.mlm]"))
    assert (
        set(resolved.sections)
        == set(resolved.components)
        == {
            ("objective", "mlm"),
            ("objective", "nsp"),
            ("optimizer", "adamw"),
            ("lr_schedule", "cosine"),
            ("callback", "board"),
        }
    )
    assert resolved.sections["objective", "mlm"].mask_prob == 0.3
    assert resolved.sections["optimizer", "adamw"].betas == (0.9, 0.95)
    assert resolved.components["objective", "nsp"].target == "cfg_parts:NSP"


def test_written_out_it_loads_as_the_same_configuration(load):
    resolved = load(GOOD, "optimizer.adamw.betas=[0.8, 1]", 'run.dir="a\\" b"')
    again = load(resolved.to_toml())
    assert again.as_dict() == resolved.as_dict()
    assert again.config.model == resolved.config.model
    assert again.sections == resolved.sections
    assert json.loads(json.dumps(resolved.as_dict())) == resolved.as_dict()
    assert resolved.as_dict()["optimizer"] == {"adamw": {"betas": [0.8, 1.0], "eps": 1e-8}}
    assert set(resolved.origin.values()) <= {"default", "--set", "architecture llama"} | {
        f"run.toml:{n}" for n in range(1, 21)
    }
    assert not set(again.origin.values()) & {"architecture llama", "--set"}


def test_unused_sections_are_checked_and_left_out(load, problems):
    text = GOOD + "[objective.strict]\nneeded = 3\n"
    assert "strict" not in load(text).as_dict()["objective"]
    assert problems(text, "objective.strict.needed=0") == [
        "--set objective.strict.needed=0: objective.strict.needed: expected an integer of at least 1, "
        "found the integer 0 (owner: plugin core (parts 1.2))"
    ]


def test_models_may_use_enums_tuples_and_tables(load, problems):
    text = swap('"mlm+nsp"', '"fussy"') + '[objective.fussy]\ncolour = "blue"\nweights = {}\n'
    settings = load(text).sections["objective", "fussy"]
    assert settings.colour.value == "blue"
    assert settings.weights == {}
    assert load(load(text).to_toml()).sections["objective", "fussy"] == settings
    owner = "(owner: plugin core (parts 1.2))"
    assert problems(text, "objective.fussy.colour=green", "optimizer.adamw.betas=[1]") == [
        '--set objective.fussy.colour=green: objective.fussy.colour: expected one of "red", "blue", '
        f'found the text "green" {owner}',
        "--set optimizer.adamw.betas=[1]: optimizer.adamw.betas: expected a list of 2: a number, a number, "
        f"found the list [1] {owner}",
    ]
    assert problems(text, "objective.fussy.low=5") == [
        f"run.toml:21: objective.fussy: low must not be above high {owner}"
    ]
    (problem,) = problems(text, "objective.fussy.low=77", "objective.fussy.high=99")
    assert "its validation failed: KeyError: 'seventy-seven'" in problem


# what is wrong


def test_everything_that_is_wrong_in_one_report_and_in_order(problems):
    text = """\
[run]
dir = 5
sed = 1
lr = 0.1

[trian]
steps = 1

[model]
architecture = "lama"

[train]
objective = "mln"
steps = 0
sequence_length = "abc"
global_batch = 4.5
lr = true
optimizer = "adamw"
precision = "float23"

[launch]
threads = "many"

[optimizer.adamw]
betas = [0.9, "x"]
ep = 1.0

[objective.mlm]
mask_prob = 1.5
style = "spam"

[objective.mlx]
a = 1

[lr_schedule]
cosine = 3
"""
    assert problems(text, "eval.every=-1", "log.callbacks=['bord', 7]", "oops") == [
        "--set oops: expected key=value, such as train.lr=3e-4"
    ]
    plugin = "(owner: plugin core (parts 1.2))"
    found = problems(text, "eval.every=-1", "log.callbacks=['bord', 7]")
    found = [re.sub("(?<=not loaded: ).*(?= .see)", "LEFT", line) for line in found]
    assert [re.sub(r" and at most (67108864|4096)", "", line) for line in found] == [
        "run.toml:2: run.dir: expected text, found the integer 5; for text, quote it: '\"5\"' (owner: megalm)",
        'run.toml:3: run.sed: unknown key; did you mean "seed"? (owner: megalm)',
        'run.toml:4: run.lr: unknown key; did you mean "train.lr"? (owner: megalm)',
        'run.toml:6: trian: unknown section; did you mean "train"? (owner: megalm)',
        'run.toml:10: model.architecture: unknown architecture "lama"; did you mean "llama"? available: llama, odd; '
        "installed but not loaded: LEFT (see --plugins) (owner: megalm)",
        "run.toml:12: train.micro_batch: required key is missing; add it (an integer of at least 1) under [train] "
        "(owner: megalm)",
        'run.toml:13: train.objective: unknown objective "mln"; did you mean "mlm"? available: broken, clm, fussy, '
        "mlm, nsp, strict; installed but not loaded: LEFT (see --plugins) (owner: megalm)",
        "run.toml:14: train.steps: expected an integer of at least 1, found the integer 0 (owner: megalm)",
        'run.toml:15: train.sequence_length: expected an integer of at least 2, found the text "abc" (owner: megalm)',
        "run.toml:16: train.global_batch: expected an integer of at least 1, found the number 4.5 (owner: megalm)",
        "run.toml:17: train.lr: expected a number greater than 0, found true (owner: megalm)",
        'run.toml:19: train.precision: expected one of "float32", "bfloat16", "float64", found the text "float23" '
        "(owner: megalm)",
        'run.toml:22: launch.threads: expected an integer of at least 1 or "auto", found the text "many" '
        "(owner: megalm)",
        f'run.toml:25: optimizer.adamw.betas[1]: expected a number, found the text "x" {plugin}',
        f'run.toml:26: optimizer.adamw.ep: unknown key; did you mean "eps"? {plugin}',
        f"run.toml:29: objective.mlm.mask_prob: expected a number greater than 0 and at most 1, "
        f"found the number 1.5 {plugin}",
        f'run.toml:30: objective.mlm.style: expected one of "bert", "span", found the text "spam" {plugin}',
        'run.toml:32: objective.mlx: unknown objective "mlx"; did you mean "mlm"? available: broken, clm, fussy, '
        "mlm, nsp, strict; installed but not loaded: LEFT (see --plugins) (owner: megalm)",
        "run.toml:36: lr_schedule.cosine: expected a table, found the integer 3 (owner: megalm)",
        "run.toml: data: names no store; add path (text), or several as blend, under [data] (owner: megalm)",
        "--set eval.every=-1: eval.every: expected an integer of at least 0, found the integer -1 (owner: megalm)",
        '--set log.callbacks=[\'bord\', 7]: log.callbacks[0]: unknown callback "bord"; did you mean "board"? '
        "available: board; installed but not loaded: LEFT (see --plugins) (owner: megalm)",
        "--set log.callbacks=['bord', 7]: log.callbacks[1]: expected text, found the integer 7; for text, quote it: "
        "'\"7\"' (owner: megalm)",
    ]


def test_missing_required_settings_of_a_used_plugin(problems):
    assert problems(swap("mlm+nsp", "strict")) == [
        "run.toml:12: objective.strict.needed: required key is missing; add it (an integer of at least 1) under "
        "[objective.strict] (owner: plugin core (parts 1.2))"
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("mlm+", 'unknown objective ""'),
        ("mlm+mlm", 'names "mlm" twice'),
        ("mlm+core:mlm", '"core:mlm" and "mlm" are the same'),
        ("", 'unknown objective ""'),
    ],
)
def test_joint_objectives_that_are_not(problems, value, text):
    (problem,) = problems(swap("mlm+nsp", value))
    assert problem.startswith("run.toml:12: train.objective: ")
    assert text in problem


@pytest.mark.parametrize("key", ["model.layers", "model.hidden_size", "train.global_batch", "launch.threads"])
def test_sizes_that_no_machine_has(problems, key):
    (problem,) = problems(GOOD, f"{key}=1000000000000")
    assert re.search(r"expected an integer of at least 1 and at most \d+.*, found the integer 1000000000000", problem)


def test_a_component_that_cannot_be_imported(problems):
    (problem,) = problems(swap("mlm+nsp", "broken"))
    assert problem.startswith("run.toml:12: train.objective: ")
    assert "ModuleNotFoundError: No module named 'cfg_missing'" in problem
    assert "(owner: plugin core (parts 1.2))" in problem


def test_a_wrong_default_is_its_architectures_fault(problems):
    found = problems(swap('"llama"', '"odd"'), "model.layers=1", "model.heads=1")
    assert len(found) == 2
    assert all('default of architecture "odd": ' in p and "(owner: plugin core (parts 1.2))" in p for p in found)


def test_sections_in_place_of_names(problems):
    (problem,) = problems('objective = "mlm"\n' + GOOD.replace("[objective.mlm]\nmask_prob = 0.3\n", ""))
    assert problem == (
        'run.toml:1: objective: expected a table, found the text "mlm"; train.objective chooses, '
        "and settings go under [objective.NAME] (owner: megalm)"
    )


def test_missing_keys_of_an_unknown_architecture_are_not_reported(problems):
    (problem,) = problems(swap('"llama"', '"nope"'))
    assert 'unknown architecture "nope"' in problem


@pytest.mark.parametrize("text", [swap('architecture = "llama"\n', ""), GOOD.replace("[model]", "[unknown]")])
def test_a_missing_architecture_is_reported(problems, text):
    assert any(
        p.startswith("run.toml") and ": model.architecture: required key is missing" in p for p in problems(text)
    )


@pytest.mark.parametrize("name", ["", "a\\u0000b"])
def test_folders_have_names(problems, name):
    (problem,) = problems(GOOD, f'run.dir="{name}"')
    assert "run.dir: expected the name of a folder, not empty and without NUL characters" in problem


def test_lines_of_dotted_keys_and_inline_tables(problems):
    text = GOOD.replace("lr = 1\n", "") + "[eval]\n[x]\n"
    text = 'log = { every = 0, callbacks = [\n"board", 3] }\n' + text
    assert [p.split(": ")[:2] for p in problems(text)] == [
        ["run.toml:1", "log.every"],
        ["run.toml:2", "log.callbacks[1]"],
        ["run.toml:13", "train.lr"],
        ["run.toml:23", "x"],
    ]


def test_inf_and_nan_are_no_settings(problems):
    for value in ("inf", "nan"):
        (problem,) = problems(GOOD, f"train.lr={value}")
        assert problem.startswith(
            f"--set train.lr={value}: train.lr: expected a number greater than 0, found the number"
        )


# files and overrides


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a = 1\nb = \n", "run.toml:2:5"),
        ("a = 1\na = 2\n", "run.toml:2:"),
        ('x = """\nabc', "run.toml:2:4"),
        ("[a", "run.toml:1:3"),
    ],
)
def test_syntax_errors_have_line_and_column(problems, text, place):
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads(text)
    (problem,) = problems(text)
    assert problem.startswith(place)
    assert "is not valid TOML" in problem


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("9" * 5000, "run.toml: holds an integer of more than 64 bits"),
        ("0x" + "f" * 5000, "run.toml:2: a.b: is an integer of more than 64 bits"),
        ("[" * 50 + "]" * 50, "run.toml:2: a.b[0][0]: is nested more than 32 levels deep"),
        ("[" * 5000 + "]" * 5000, "run.toml: values are nested too deeply"),
    ],
)
def test_values_that_nothing_can_hold(problems, value, problem):
    assert problems(f"[a]\nb = {value}\n") == [problem]
    assert problems("a." * 2000 + "a = 1")[0].endswith("is nested more than 32 levels deep")


def test_a_byte_order_mark_is_no_syntax_error(load):
    assert load("\ufeff" + GOOD).config.train.lr == 1


def test_files_that_cannot_be_read(manager, tmp_path):
    def problem(path):
        with pytest.raises(ConfigError) as info:
            load_config(path, [], manager)
        return info.value.problems

    assert problem(tmp_path / "no.toml") == [f"{tmp_path}/no.toml: no such file; name the TOML file of the run"]
    assert problem(tmp_path) == [f"{tmp_path}: is a directory; name the TOML file of the run"]
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"a = 1\nb = '\xff'\n")
    assert problem(binary) == [f"{binary}:2: is not UTF-8 text: byte 0xff at offset 11"]


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        ("train.lr", "expected key=value"),
        ("=3", "is not a dotted key"),
        ("a b=3", "is not a dotted key"),
        ("a..b=3", "is not a dotted key"),
        ("a=1\nb=3", None),
        ("run.dir.x=3", "run.dir is a value, not a table that could hold x"),
        ("train.steps=9223372036854775808", "train.steps: is an integer of more than 64 bits"),
        ("train.steps=" + "9" * 5000, "train.steps: is an integer of more than 64 bits"),
        ("train.steps=0x" + "f" * 5000, "train.steps: is an integer of more than 64 bits"),
        ("run.dir=caf\udce9", "run.dir: is text that is not valid UTF-8"),
        ("log.callbacks=" + "[" * 50 + "]" * 50, "is nested more than 32 levels deep"),
        (".".join("a" * 2000) + "=1", "is nested more than 32 levels deep"),
    ],
)
def test_malformed_overrides(problems, pair, text):
    (problem,) = problems(GOOD, pair)
    line = pair.replace("\n", " ")
    assert problem.startswith(f"--set {line if len(line) <= 120 else line[:120] + '...'}: ")
    assert text is None or text in problem


@pytest.mark.parametrize(
    ("pair", "get", "value"),
    [
        ("train.lr = 2", lambda c: c.train.lr, 2.0),
        ("run.dir=plain/text with = sign", lambda c: c.run.dir, "plain/text with = sign"),
        ('run.dir="7"', lambda c: c.run.dir, "7"),
        ("parallel={tp=2, sp=true}", lambda c: (c.parallel.tp, c.parallel.sp), (2, True)),
        ("train={steps=3}", lambda c: (c.train.steps, c.train.lr), (3, 1.0)),
        ("log.callbacks=[]", lambda c: c.log.callbacks, []),
        ('"sample".prompt=""', lambda c: c.sample.prompt, ""),
    ],
)
def test_overrides(load, pair, get, value):
    assert get(load(GOOD, pair).config) == value


def test_the_last_override_counts(load):
    resolved = load(GOOD, "train.steps=3", "train={steps=4}", "train.steps=5")
    assert resolved.config.train.steps == 5


def test_a_wrong_type_shows_the_pair(problems):
    assert problems(GOOD, "train.lr=abc", "run.dir=7") == [
        '--set train.lr=abc: train.lr: expected a number greater than 0, found the text "abc" (owner: megalm)',
        "--set run.dir=7: run.dir: expected text, found the integer 7; for text, quote it: '\"7\"' (owner: megalm)",
    ]


@pytest.mark.parametrize(
    ("pair", "key"),
    [("nope.x=1", "nope"), ("train.objective={x=1}", "train.objective"), ('objective."".x=1', 'objective.""')],
)
def test_a_table_that_only_the_command_line_has_points_there(problems, pair, key):
    assert any(p.startswith(f"--set {pair}: {key}: ") for p in problems(GOOD, pair))


def test_dates_stay_the_text_that_was_written(load):
    assert load(GOOD, "run.dir=2026-01-02 03:04:05").config.run.dir == "2026-01-02 03:04:05"


def test_an_overridden_list_no_longer_points_into_the_file(problems):
    (problem,) = problems(swap("[objective.mlm]", "[log]\ncallbacks = ['board']\n[objective.mlm]"), "log.callbacks=[7]")
    assert problem.startswith("--set log.callbacks=[7]: log.callbacks[0]: expected text")


# several plugins that share a name


def test_an_ambiguous_name_asks_which(problems, two_plugins):
    found = problems(manager=two_plugins)
    assert len(found) == 1
    assert '"core:mlm"' in found[0]
    assert '"other:mlm"' in found[0]


@pytest.mark.parametrize("section", ["[objective.mlm]", '[objective."other:mlm"]'])
def test_a_qualified_name_takes_either_section(load, two_plugins, section):
    text = swap("mlm+nsp", "other:mlm", swap("[objective.mlm]\nmask_prob = 0.3", f"{section}\nother = 9"))
    resolved = load(text, manager=two_plugins)
    assert resolved.sections["objective", "other:mlm"].other == 9
    assert resolved.origin['objective."other:mlm".other'] == "run.toml:20"
    assert load(resolved.to_toml(), manager=two_plugins).as_dict() == resolved.as_dict()


def test_both_sections_are_one_too_many(problems, two_plugins):
    text = swap("mlm+nsp", "core:mlm") + '[objective."core:mlm"]\n'
    (problem,) = problems(text, manager=two_plugins)
    assert problem == 'run.toml:19: objective.mlm: repeats [objective."core:mlm"]; keep one of them (owner: megalm)'


# schema


def test_schema_knows_the_plugins_sections(manager):
    schema, skipped = config_schema(manager)
    assert len(skipped) == 1
    assert "cfg_missing" in skipped[0]
    assert set(schema["properties"]) == set(Config.model_fields)

    def resolve(node):
        return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    mlm = resolve(schema["properties"]["objective"]["properties"]["mlm"])
    assert set(mlm["properties"]) == {"mask_prob", "style", "most"}
    train = resolve(schema["properties"]["train"])
    assert train["properties"]["lr"]["description"] == "Peak learning rate."
    assert resolve(schema["properties"]["model"])["required"] == ["architecture"]
