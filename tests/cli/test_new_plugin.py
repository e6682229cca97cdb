"""``megalm new-plugin``: what it writes is built, installed and held to everything that a plugin is held to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest

from megalm.cli.app import main
from megalm.cli.scaffold import SUMMARIES, dist_name, module_name, write_plugin
from megalm.plugin.registry import singular

ROOT = Path(__file__).resolve().parents[2]
KINDS = tuple(map(singular, SUMMARIES))
CODE = "from megalm.cli.app import main; main()"


def run(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the entry point."""
    monkeypatch.setattr(sys, "argv", ["megalm", "new-plugin", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit:
        return (exit.code or 0, *capsys.readouterr())
    return (0, *capsys.readouterr())


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=KINDS)
def package(request, tmp_path_factory):
    """(kind, folder of the package, folder of site-packages it was installed to by pip)."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    source, site = folder / "source", folder / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["megalm", "new-plugin", f"my_{kind}2", "--kind", kind, "--out", str(source)])
        with pytest.raises(SystemExit, match="0"):
            main()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    shutil.copytree(source, folder / "build")  # pip builds inside the source tree
    command += ["--disable-pip-version-check", "--target", str(site), str(folder / "build")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return kind, source, site


def environment(site: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)]), "MEGALM_SEED": "3"}


def test_it_is_a_package_that_pip_installs(package):
    kind, source, site = package
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"megalm-my-{kind}2"
    assert project["entry-points"] == {"megalm": {f"my_{kind}2": f"megalm_my_{kind}2"}}
    assert (site / f"megalm_my_{kind}2" / "py.typed").exists()
    assert (source / "tests" / f"test_my_{kind}2.py").exists()
    assert not any("$" in text.decode() for text in written(source).values())
    commands = "\n".join((source / "README.md").read_text().split("```")[1::2])
    for command in ("pip install -e .", "megalm plugins", f"megalm check-plugin my_{kind}2", "pytest"):
        assert command in commands
    listed = subprocess.run(
        [sys.executable, "-c", CODE, "plugins"], capture_output=True, text=True, env=environment(site), check=True
    )
    assert f"megalm_my_{kind}2" not in listed.stdout  # the table names components and plugins
    assert f"my_{kind}2" in listed.stdout


@pytest.mark.slow
def test_its_own_tests_pass(package):
    """Three lines, which are every check of its kind; so this is ``megalm check-plugin`` too."""
    _, source, site = package
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=source,
        capture_output=True,
        text=True,
        env=environment(site),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "failed" not in done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 10


def test_the_command_finds_it(package):
    kind, _, site = package
    shared = [
        "import sys",
        f"import megalm.testing.{kind}.checks as checks",
        "checks.CHECKS = tuple(c for c in checks.CHECKS if c.name in ('component', 'bad_configuration'))",
        f"sys.argv = ['megalm', 'check-plugin', 'my_{kind}2', '--kind', {kind!r}]",
        CODE,
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(shared)], capture_output=True, text=True, env=environment(site), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind} my_{kind}2 of plugin my_{kind}2 (megalm-my-{kind}2 0.1.0)" in done.stdout
    assert "3 checks in" in done.stdout


def test_it_is_clean_for_linters(package):
    _, source, _ = package
    tool = pytest.importorskip("ruff", reason="a development tool")
    command = [sys.executable, "-m", tool.__name__, "check", "--isolated", "--no-cache"]
    command += ["--select", "E,W,F,I,UP,B,SIM,C4,PIE", "--line-length", "100"]
    done = subprocess.run([*command, "."], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_all_are_typed(tmp_path):
    """With mypy --strict and megalm's own types, whose analysis ``make lint`` has left behind."""
    pytest.importorskip("mypy", reason="a development tool")
    links = ROOT / ".mypy_cache" / "sources"
    links.mkdir(parents=True, exist_ok=True)
    if not (links / "megalm").exists():
        (links / "megalm").symlink_to(ROOT / "megalm", target_is_directory=True)
    command = [sys.executable, "-m", "mypy", f"--config-file={ROOT / 'pyproject.toml'}"]
    command += [f"--cache-dir={ROOT / '.mypy_cache'}"]
    for kind in SUMMARIES:
        write_plugin(tmp_path / kind, f"typed_{kind}", kind)
        command += ["-p", module_name(f"typed_{kind}")]
    path = os.pathsep.join(map(str, [links, *(tmp_path / kind for kind in SUMMARIES)]))
    env = os.environ | {"MYPYPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=links, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_folder_has_a_name_where_none_is_given(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(monkeypatch, capsys, "three_words_here", "--kind", "tokenizer")
    assert (status, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["megalm-three-words-here"]
    for name in written(tmp_path / "megalm-three-words-here"):
        assert name in out
    assert "pip install -e megalm-three-words-here && megalm check-plugin three_words_here" in out
    source = (tmp_path / "megalm-three-words-here/megalm_three_words_here/tokenizer.py").read_text()
    assert "class ThreeWordsHereTokenizer(Tokenizer)" in source


@pytest.mark.parametrize("name", ["settings", "objective", "tokenizer", "term", "component", "a", "x_", "n2_n"])
def test_names_that_are_those_of_things_in_the_template(name, monkeypatch, capsys, tmp_path):
    for kind in KINDS:
        out = tmp_path / kind
        status, _, err = run(monkeypatch, capsys, name, "--kind", kind, "--out", out)
        assert status == 0, err
        for path in out.rglob("*.py"):
            compile(path.read_text(), str(path), "exec")
            assert "class (" not in path.read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Foo-Bar", '"Foo-Bar" cannot name a plugin: .*; "foo_bar" would do'),
        ("9lives", "cannot name a plugin"),
        ("", "cannot name a plugin"),
        ("_x", '"x" would do'),
        ("class", "no word of Python"),
        ("größe", "cannot name a plugin"),
        ("../up", '"up" would do'),
        ("x" * 51, "up to 50"),
        ("a b", '"a_b" would do'),
        ("mlm", "taken: objective mlm of plugin objectives .* is installed"),
        ("objectives", "taken: plugin objectives .* is installed"),
        ("plugins", "the Python module megalm_plugins is installed"),
        ("megalm", "taken: the distribution megalm .* is installed"),
        ("megalm_plugins", "taken: the Python module megalm_plugins of megalm is installed"),
        ("numpy", r"taken: the distribution numpy [\d.]+ is installed"),
    ],
)
def test_names_that_are_refused(name, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(monkeypatch, capsys, name, "--kind", "objective")
    assert (status, out) == (2, "")
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_a_distribution_of_that_name_is_enough(monkeypatch, capsys, tmp_path, fake_dist):
    fake_dist("megalm-some-thing", {}, {})
    status, _, err = run(monkeypatch, capsys, "some_thing", "--kind", "objective", "--out", tmp_path / "new")
    assert status == 2
    assert "the distribution megalm-some-thing 1.0 is installed" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("good_things", "the distribution Good.Things 1.0"), ("gthings", "module gthings of Good.Things")],
)
def test_a_distribution_that_is_no_plugin_takes_its_names(name, said, monkeypatch, capsys, tmp_path, fake_dist):
    root = fake_dist("Good.Things", {}, {"gthings/__init__.py": ""})
    (next(root.glob("*.dist-info")) / "top_level.txt").write_text("gthings\n")
    status, _, err = run(monkeypatch, capsys, name, "--kind", "head", "--out", tmp_path / "new")
    assert status == 2
    assert f'the name "{name}" is taken: ' in err
    assert said in err
    assert not (tmp_path / "new").exists()


def test_a_module_of_python_itself_is_in_nobodys_way(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, capsys, "json", "--kind", "tokenizer", "--out", tmp_path / "new")[0] == 0


def test_a_folder_that_happens_to_be_on_the_path_takes_no_name(monkeypatch, capsys, tmp_path):
    (tmp_path / "corpus").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert run(monkeypatch, capsys, "corpus", "--kind", "tokenizer", "--out", tmp_path / "new")[0] == 0


def test_a_component_of_another_kind_may_have_the_name(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, capsys, "mlm", "--kind", "tokenizer", "--out", tmp_path / "new")[0] == 0


@pytest.mark.parametrize("what", ["full", "empty", "file", "link"])
def test_what_exists_is_left_as_it_is(what, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if what == "full":
            (out / "mine.txt").write_text("mine")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    status, _, err = run(monkeypatch, capsys, "mine", "--kind", "objective", "--out", out)
    assert status == 2
    assert "exists, and is left as it is" in err
    assert {path: path.lstat() for path in tmp_path.rglob("*")} == before


def test_nothing_is_left_where_writing_fails(monkeypatch, capsys, tmp_path):
    written = []

    def fail(self, *args, **kwargs):
        written.append(self)
        if len(written) > 3:
            raise OSError(28, "No space left on device", str(self))
        return original(self, *args, **kwargs)

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", fail)
    status, _, err = run(monkeypatch, capsys, "mine", "--kind", "objective", "--out", tmp_path / "deep" / "out")
    assert status == 2
    assert "cannot write the plugin: No space left on device" in err
    assert len(written) > 3
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name != "deep"] == []


def test_a_kind_without_a_template_is_refused(monkeypatch, capsys, tmp_path):
    status, _, err = run(monkeypatch, capsys, "mine", "--kind", "optimizer", "--out", tmp_path / "new")
    assert status == 2
    assert "--kind optimizer: expected objective, tokenizer or head" in err
    status, _, err = run(monkeypatch, capsys, "mine", "--kind", "pipeline_schedule")  # which has checks
    assert (status, "expected objective, tokenizer or head" in err) == (2, True)
    assert run(monkeypatch, capsys, "mine")[0] == 2


def test_names_of_modules_and_distributions():
    assert (module_name("a_b__c"), dist_name("a_b__c")) == ("megalm_a_b__c", "megalm-a-b-c")
    assert find_spec(module_name("surely_not_there")) is None


def test_templates_are_package_data():
    """By the patterns of pyproject.toml, as setuptools reads them."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["megalm"]
    packed = {name for pattern in patterns for name in glob(pattern, root_dir=ROOT / "megalm", recursive=True)}
    templates = {path for path in (ROOT / "megalm" / "cli" / "templates").rglob("*") if path.is_file()}
    assert len(templates) > 10
    assert {str(path.relative_to(ROOT / "megalm")) for path in templates} <= packed
