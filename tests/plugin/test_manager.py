from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalm.api import Callback, Settings, UsageError, hookimpl
from megalm.errors import PluginError
from megalm.plugin import discovery
from megalm.plugin.component import KINDS, PluginInfo
from megalm.plugin.events import HookError
from megalm.plugin.hookspecs import API_VERSION, hook_docs
from megalm.plugin.manager import CONTRACTS, PluginManager

HEAD = "from megalm.api import Component, hookimpl\nMEGALM_API = (1, 0)\n"
OBJECTIVES = HEAD + "@hookimpl\ndef megalm_objectives():\n    yield Component({!r}, {!r}, 'a summary')\n"


def load(*names: str) -> PluginManager:
    return PluginManager.for_launch(list(names))


def failure(*names: str) -> str:
    with pytest.raises(PluginError) as info:
        load(*names)
    return str(info.value)


# discovery


def test_discovery_is_sorted_and_imports_nothing(fake_dist):
    fake_dist("zeta", {"b": "zeta_b", "a": "zeta_a"}, {"zeta_a.py": "1/0", "zeta_b.py": "1/0"})
    fake_dist("alpha", {"c": "alpha_c"}, {"alpha_c.py": "1/0"}, version="2.5")
    found = [i for i in discovery.discover() if i.dist in ("zeta", "alpha")]
    assert found == [
        PluginInfo("c", "alpha", "2.5", "alpha_c"),
        PluginInfo("a", "zeta", "1.0", "zeta_a"),
        PluginInfo("b", "zeta", "1.0", "zeta_b"),
    ]
    assert not {"zeta_a", "zeta_b", "alpha_c"} & set(sys.modules)


def test_the_first_of_two_installations_counts(fake_dist):
    fake_dist("twice", {"a": "a1"}, version="1.0")
    fake_dist("twice", {"a": "a2"}, version="2.0")  # put before the other on sys.path
    assert [i.version for i in discovery.discover() if i.dist == "twice"] == ["2.0"]


def test_a_name_claimed_twice_names_both_distributions(fake_dist):
    fake_dist("one", {"same": "m1"}, version="1.1")
    fake_dist("two", {"same": "m2"}, version="2.2")
    message = failure("same")
    assert '"same"' in message
    assert "one 1.1" in message
    assert "two 2.2" in message


def test_a_clash_among_plugins_left_out_is_no_error(fake_dist):
    fake_dist("one", {"same": "m1", "good": "good_mod"}, {"good_mod.py": HEAD})
    fake_dist("two", {"same": "m2"})
    assert list(load("good").plugins) == ["good"]


def test_only_loads_exactly_those(fake_dist):
    fake_dist("d", {"yes": "yes_mod", "no": "no_mod"}, {"yes_mod.py": HEAD, "no_mod.py": "1/0"})
    assert list(load("yes").plugins) == ["yes"]
    assert "no_mod" not in sys.modules
    assert load().plugins == {}


def test_an_unknown_name_gets_a_suggestion(fake_dist):
    fake_dist("d", {"simcse": "m"})
    assert 'plugin "simsce" is not installed; did you mean "simcse"?' in failure("simsce")
    message = failure("qqqqqqqqq")
    assert "installed: " in message
    assert "simcse" in message


# loading


def test_every_failure_in_one_report(fake_dist):
    names = ["fine", "imp", "syn", "api", "newer", "noapi", "weird", "hook", "arg", "mark", "gone", "exits"]
    root = fake_dist(
        "broken",
        {name: f"br_{name}" for name in names if name != "fine"},
        {
            "br_imp.py": "\nimport nonexistent_module_x\n",
            "br_syn.py": "x = 1\ndef (:\n",
            "br_api.py": "MEGALM_API = (2, 0)\n",
            "br_newer.py": "MEGALM_API = (1, 99)\n",
            "br_noapi.py": "",
            "br_weird.py": "MEGALM_API = '1.0'\n",
            "br_hook.py": HEAD + "@hookimpl\ndef megalm_objectivs(): ...\n",
            "br_arg.py": HEAD + "@hookimpl\ndef megalm_step_end(run, step, loss): ...\n",
            "br_mark.py": HEAD + "def megalm_log(run): ...\n",
            "br_exits.py": "import sys\nsys.exit(3)\n",
        },
        version="0.3",
    )
    fake_dist("fine", {"fine": "fine_mod"}, {"fine_mod.py": HEAD})
    message = failure(*names)
    assert message.startswith("cannot load 11 plugins:\n")
    lines = {re.match(r"  plugin (\w+) \(broken 0\.3\)", line)[1]: line for line in message.splitlines()[1:]}
    assert set(lines) == set(names) - {"fine"}
    assert f"ModuleNotFoundError: No module named 'nonexistent_module_x' [{root}/br_imp.py:2]" in lines["imp"]
    assert f"SyntaxError: invalid syntax [{root}/br_syn.py:2]" in lines["syn"]
    assert f"written for API 2.0, but this megalm provides API {API_VERSION[0]}.{API_VERSION[1]}" in lines["api"]
    assert "needs API 1.99" in lines["newer"]
    assert "newer megalm" in lines["newer"]
    assert f"add MEGALM_API = {API_VERSION}" in lines["noapi"]
    assert "found '1.0'" in lines["weird"]
    assert 'megalm_objectivs is not a hook; did you mean "megalm_objectives"?' in lines["hook"]
    assert "loss" in lines["arg"]
    assert "megalm_step_end" in lines["arg"]
    assert "megalm_log is named like a hook but lacks @hookimpl" in lines["mark"]
    assert "ModuleNotFoundError: No module named 'br_gone'" in lines["gone"]
    assert "SystemExit: 3" in lines["exits"]


def test_a_failed_plugin_leaves_no_hooks_behind(fake_dist):
    bad = "@hookimpl\ndef megalm_log(): return 1\n@hookimpl\ndef megalm_step_end(run, nope): ...\n"
    fake_dist("d", {"bad": "bad_mod"}, {"bad_mod.py": HEAD + bad})
    manager = PluginManager()
    with pytest.raises(PluginError):
        manager.load([i for i in discovery.discover() if i.dist == "d"])
    assert manager.plugins == {}
    assert manager.hook.megalm_log(run=None, step=0, metrics={}) == []
    manager.check_pending()


def test_an_older_minor_and_fewer_arguments_load(fake_dist):
    source = HEAD.replace("(1, 0)", f"({API_VERSION[0]}, 0)") + "@hookimpl\ndef megalm_step_end(step): return step\n"
    fake_dist("d", {"old": "old_mod"}, {"old_mod.py": source})
    assert load("old").hook.megalm_step_end(run=None, step=7, metrics={}) == [7]


def test_a_function_may_name_its_hook(fake_dist):
    source = HEAD + "@hookimpl(specname='megalm_should_stop')\ndef stop(step): return 'now'\n"
    source += "@hookimpl(optionalhook=True)\ndef megalm_of_a_later_version(): ...\n"
    fake_dist("d", {"named": "named_mod"}, {"named_mod.py": source})
    manager = load("named")
    assert manager.hook.megalm_should_stop(run=None, step=7) == ["now"]
    manager.check_pending()


def test_an_object_as_entry_point(fake_dist):
    source = HEAD + (
        "class P:\n    MEGALM_API = (1, 0)\n    @hookimpl\n"
        "    def megalm_heads(self): yield Component('h', 'm:H')\nplugin = P()\n"
    )
    fake_dist("d", {"obj": "obj_mod:plugin"}, {"obj_mod.py": source})
    assert load("obj").get("heads", "h").plugin == PluginInfo("obj", "d", "1.0", "obj_mod:plugin")


# registry


@pytest.fixture
def two_mlm(fake_dist):
    fake_dist("one", {"p1": "mod_one"}, {"mod_one.py": OBJECTIVES.format("mlm", "heavy_one:Obj")}, version="1.1")
    fake_dist(
        "two",
        {"p2": "mod_two"},
        {
            "mod_two.py": OBJECTIVES.format("mlm", "heavy_two:Obj")
            + "    yield Component('broken', 'heavy_two:Missing')\n    yield Component('fn', 'heavy_two:function')\n",
            "heavy_two.py": "from megalm.api import Objective\nclass Obj(Objective): ...\ndef function(): ...\n",
        },
        version="2.2",
    )


def test_registry_keeps_who_offers_what(two_mlm):
    manager = load("p2", "p1")
    registry = manager.registry("objectives")
    assert list(registry) == ["broken", "fn", "mlm"]
    assert [c.plugin.name for c in registry["mlm"]] == ["p1", "p2"]  # in the order of distributions
    assert registry["mlm"][0].summary == "a summary"
    assert "heavy_two" not in sys.modules
    with pytest.raises(ValueError, match="objectivs"):
        manager.registry("objectivs")


def test_ambiguous_and_qualified_names(two_mlm):
    manager = load("p1", "p2")
    with pytest.raises(PluginError) as info:
        manager.get("objectives", "mlm")
    for part in ("p1 (one 1.1)", "p2 (two 2.2)", '"p1:mlm"', '"p2:mlm"'):
        assert part in str(info.value)
    assert manager.get("objectives", "p2:mlm").target == "heavy_two:Obj"
    with pytest.raises(PluginError, match=re.escape('unknown objective "p3:mlm"; it is offered by p1 (one 1.1)')):
        manager.get("objectives", "p3:mlm")


def test_unknown_names_suggest_and_list(two_mlm):
    with pytest.raises(PluginError) as info:
        load("p1").get("objectives", "mln")
    message = str(info.value)
    assert 'unknown objective "mln"; did you mean "mlm"?' in message
    assert "available: mlm" in message
    assert "installed but not loaded: " in message
    assert "p2" in message


def test_load_component_attributes_what_fails(two_mlm):
    manager = load("p1", "p2")
    assert manager.load_class("objectives", "p2:mlm").__name__ == "Obj"
    with pytest.raises(
        PluginError, match=re.escape('"mlm" of plugin p1 (one 1.1) cannot be loaded from heavy_one:Obj')
    ):
        manager.load_class("objectives", "p1:mlm")
    with pytest.raises(PluginError, match=r"two 2\.2.*AttributeError.*Missing"):
        manager.load_class("objectives", "broken")
    with pytest.raises(PluginError, match=r"must be a subclass of megalm\.api\.Objective; found <function"):
        manager.load_class("objectives", "fn")


def test_contracts_exist():
    import importlib

    for kind, target in CONTRACTS.items():
        module, _, name = target.partition(":")
        assert kind in KINDS
        assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    yield 3\n", "must yield Component records; found 3"),
        ("    yield Component('a+b', 'm:x')\n", "yields the name 'a+b'"),
        ("    yield Component('a:b', 'm:x')\n", "yields the name 'a:b'"),
        ("    yield Component('a', 'm')\n", "target 'm'; expected"),
        ("    yield Component('a', 'm:x')\n    yield Component('a', 'm:y')\n", 'yields "a" twice'),
        ("    raise KeyError('boom')\n", "megalm_objectives failed: KeyError: 'boom' ["),
        ("    return 3\n", "megalm_objectives failed: TypeError"),
    ],
)
def test_nonsense_offers_name_the_plugin(fake_dist, body, message):
    fake_dist("d", {"odd": "odd_mod"}, {"odd_mod.py": HEAD + "@hookimpl\ndef megalm_objectives():\n" + body})
    with pytest.raises(PluginError) as info:
        load("odd").registry("objectives")
    assert "plugin odd (d 1.0)" in str(info.value)
    assert message in str(info.value)


# event hooks


EVENTS = HEAD + (
    "from megalm.api import DataError\n"
    "@hookimpl\ndef megalm_step_end(run, step, metrics):\n    raise ZeroDivisionError('of mine')\n"
    "@hookimpl\ndef megalm_eval_end(run):\n    raise DataError('no text')\n"
    "@hookimpl\ndef megalm_should_stop(run, step):\n    return 'enough' if step == 3 else None\n"
)


def test_an_exception_in_a_hook_names_its_plugin(fake_dist):
    fake_dist("innocent", {"innocent": "in_mod"}, {"in_mod.py": HEAD + "@hookimpl\ndef megalm_step_end(): ...\n"})
    root = fake_dist("guilty", {"guilty": "ev_mod"}, {"ev_mod.py": EVENTS}, version="4")
    manager = load("innocent", "guilty")
    with pytest.raises(HookError) as info:
        manager.hook.megalm_step_end(run=None, step=1, metrics={})
    assert str(info.value) == (
        f"plugin guilty (guilty 4) failed in megalm_step_end: ZeroDivisionError: of mine [{root}/ev_mod.py:6]"
    )
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    with pytest.raises(UsageError) as usage:
        manager.hook.megalm_eval_end(run=None, step=1, metrics={})
    assert str(usage.value) == "no text"
    assert usage.value.__notes__ == ["raised by plugin guilty (guilty 4) in megalm_eval_end"]
    assert manager.hook.megalm_should_stop(run=None, step=2) == []
    assert manager.hook.megalm_should_stop(run=None, step=3) == ["enough"]


def test_the_engines_own_mistakes_are_not_blamed_on_plugins():
    manager = load()
    with pytest.raises(AttributeError, match="megalm_step_ends"):
        manager.hook.megalm_step_ends()


class Recorder(Callback):
    def __init__(self):
        super().__init__(Settings())
        self.seen = []

    @hookimpl
    def megalm_step_end(self, run, step, metrics):
        if step == 9:
            raise RuntimeError("nine")
        self.seen.append((step, metrics["loss"]))


def test_callbacks(fake_dist):
    source = HEAD + "@hookimpl\ndef megalm_callbacks():\n    yield Component('rec', 'nowhere:Recorder')\n"
    fake_dist("d", {"cb": "cb_mod"}, {"cb_mod.py": source})
    manager, first, second = load("cb"), Recorder(), Recorder()
    manager.register_callback(first, "rec")
    manager.register_callback(second, "other")
    manager.hook.megalm_step_end(run=None, step=4, metrics={"loss": 0.5})
    assert first.seen == second.seen == [(4, 0.5)]
    with pytest.raises(PluginError, match='callback "rec": that name is taken'):
        manager.register_callback(Recorder(), "rec")
    alone = load("cb")
    alone.register_callback(Recorder(), "rec")
    with pytest.raises(HookError, match=re.escape('callback "rec" of plugin cb (d 1.0) failed in megalm_step_end')):
        alone.hook.megalm_step_end(run=None, step=9, metrics={})


def test_useless_callbacks_are_refused():
    def typo(self, run): ...

    def unmarked(self, run): ...

    manager = load()
    for attributes, message in (
        ({}, "implements no hook"),
        ({"megalm_step_endd": hookimpl(typo)}, 'did you mean "megalm_step_end"'),
        ({"megalm_step_end": unmarked}, "lacks @hookimpl"),
        ({"megalm_objectives": hookimpl(lambda self: ())}, "only a plugin can"),
    ):
        with pytest.raises(PluginError, match='callback "x": .*' + re.escape(message)):
            manager.register_callback(type("C", (), attributes)(), "x")


# fingerprint


def test_fingerprint_follows_the_sources_and_not_the_place(fake_dist, tmp_path):
    files = {
        "fp_pkg/__init__.py": "raise RuntimeError('never imported')",
        "fp_pkg/objective.py": "x = 1\n",
        "fp_pkg/deep/more.py": "y = 1\n",
        "fp_mod.py": OBJECTIVES.format("o", "fp_pkg.objective:Obj"),
    }
    root = fake_dist("fp", {"fp": "fp_mod"}, files, version="3")

    def fingerprint():
        return load("fp").fingerprint()

    before = fingerprint()
    assert before["fp"]["dist"] == "fp"
    assert before["fp"]["version"] == "3"
    assert re.fullmatch("[0-9a-f]{64}", before["fp"]["sha256"])
    assert fingerprint() == before
    assert "fp_pkg" not in sys.modules
    hashes = {before["fp"]["sha256"]}
    for file in ("fp_mod.py", "fp_pkg/objective.py", "fp_pkg/deep/more.py"):
        (root / file).write_text((root / file).read_text() + "# changed\n")
        hashes.add(fingerprint()["fp"]["sha256"])
    assert len(hashes) == 4
    (root / "fp_pkg/deep/more.py").rename(root / "fp_pkg/deep/other.py")
    assert fingerprint()["fp"]["sha256"] not in hashes


def test_fingerprint_of_the_same_files_elsewhere(fake_dist):
    from megalm.plugin.sources import source_hash

    a = fake_dist("a", {}, {"samepkg/__init__.py": "", "samepkg/x.py": "1"})
    here = source_hash(["samepkg.x"])
    b = fake_dist("b", {}, {"samepkg/__init__.py": "", "samepkg/x.py": "1"})
    assert a != b
    assert source_hash(["samepkg.x"]) == source_hash(["samepkg"]) == here
    (b / "samepkg/x.py").write_text("2")
    assert source_hash(["samepkg"]) != here
    assert source_hash(["no_such_module_at_all"]) == source_hash([])


# hook specifications


def test_every_hook_is_documented_and_says_its_distributed_facts():
    docs = list(hook_docs())
    assert len({doc.name for doc in docs}) == len(docs)
    for doc in docs:
        assert doc.name.startswith("megalm_")
        assert len(doc.doc) > 15, doc.name
        assert doc.doc.endswith("."), doc.name
        assert doc.contract.when, doc.name
        assert not (doc.contract.ranks == "0" and doc.contract.collectives), f"{doc.name}: rank 0 would wait forever"


def test_hooks_match_the_kinds_and_the_run():
    by_family = {"component": {}, "event": {}}
    for doc in hook_docs():
        by_family[doc.family][doc.name] = doc.arguments
    assert by_family["component"] == {f"megalm_{kind}": () for kind in KINDS}
    assert by_family["event"] == {
        "megalm_train_start": ("run",),
        "megalm_step_start": ("run", "step"),
        "megalm_grads_ready": ("run", "step", "grad_norm"),
        "megalm_step_end": ("run", "step", "metrics"),
        "megalm_log": ("run", "step", "metrics"),
        "megalm_should_stop": ("run", "step"),
        "megalm_eval_end": ("run", "step", "metrics"),
        "megalm_save_state": ("run", "meta"),
        "megalm_load_state": ("run", "meta"),
        "megalm_train_end": ("run", "error"),
    }


def test_the_manager_needs_no_torch():
    code = (
        "import sys; from megalm.plugin.manager import PluginManager; PluginManager.for_launch([]).fingerprint(); "
        "import megalm.config.load; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


def test_hook_calls_are_cheap():
    """A hook that nobody implements costs microseconds, so that a handful a step vanish beside it."""
    import timeit

    manager, run = load(), SimpleNamespace()
    best = min(timeit.repeat(lambda: manager.hook.megalm_step_end(run=run, step=1, metrics={}), number=1000, repeat=5))
    assert best / 1000 < 50e-6
