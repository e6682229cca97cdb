"""The checks that all kinds share, on plugins that are broken on purpose."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from megalm.api import Settings
from megalm.plugin.manager import PluginManager
from megalm.testing.bad_settings import bad_settings
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.component_checks import component_checks

CONFIG = '''
class C(Settings):
    """Settings."""
    share: float = Field(default=0.5, gt=0, le=1)
    """A share."""
    kind: Literal["a", "b"] = "a"
    """A kind."""
'''
OBJECTIVE = '''
class Thing(Objective):
    """Does nothing."""
    Config = C
    def needs(self): ...
    def weights(self): ...
    def num_samples(self, corpus): ...
    def build_example(self, sample, corpus, rng): ...
    def collate(self, examples): ...
    def counts(self, batch): ...
    def loss(self, hidden, batch, ctx): ...
'''
IMPORTS = """
from typing import Literal
from pydantic import Field, field_validator
from megalm.api import ConfigError, Objective, Settings
"""
OFFER = """
from megalm.api import Component, hookimpl
MEGALM_API = (1, 0)
@hookimpl
def megalm_objectives():
    return [Component("thing", "shared_parts:Thing", {summary!r})]
"""


def check(name: str, fake_dist, parts: str = IMPORTS + CONFIG + OBJECTIVE, *, before="", summary="a thing", **files):
    """The check's answer for an objective ``thing`` of plugin ``mine`` of distribution megalm-mine."""
    sources = {"shared_offer.py": before + OFFER.format(summary=summary), "shared_parts.py": parts}
    fake_dist("megalm-mine", {"mine": "shared_offer"}, {**sources, **{f"{k}.py": v for k, v in files.items()}})
    subject = SimpleNamespace(manager=PluginManager.for_launch(["mine", "architectures", "objectives"]), name="thing")
    return {check.name: check for check in component_checks("objectives")}[name].run(subject)


def test_a_good_one_passes(fake_dist) -> None:
    assert check("component", fake_dist) == "API 1.0, 2 settings"
    subject = SimpleNamespace(manager=PluginManager.for_launch(["mine"]), name="thing")
    _, torch_free, bad = component_checks("objectives")
    assert torch_free.run(subject) == "shared_offer and shared_parts"
    # An unknown key; a wrong type, below and above for share; a wrong type and no choice for kind.
    assert bad.run(subject) == "6 bad settings"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('    """A share."""\n', "", "C.share has no docstring"),
        (
            "class C(Settings):",
            "from pydantic import BaseModel\nclass C(BaseModel):",
            "must be a subclass of .*Settings",
        ),
        ("    def counts(self, batch): ...\n", "", "leaves out what its contract asks for: counts"),
        ("class Thing(Objective)", "class Thing", "must be a subclass of megalm.api.Objective"),
        ("class Thing(", "class Thong(", "cannot be loaded from shared_parts:Thing"),
    ],
)
def test_an_incomplete_declaration(fake_dist, old, new, message) -> None:
    source = IMPORTS + CONFIG + OBJECTIVE
    assert old in source
    with pytest.raises(CheckFailed, match=message):
        check("component", fake_dist, source.replace(old, new))


def test_a_component_without_a_summary(fake_dist) -> None:
    with pytest.raises(CheckFailed, match=r'Component\("thing", \.\.\.\) has no summary'):
        check("component", fake_dist, summary=" ")


def test_torch_in_the_plugins_own_module(fake_dist) -> None:
    with pytest.raises(CheckFailed, match=r"importing shared_offer imports torch(.|\n)*shared_offer -> torch"):
        check("torch_free_import", fake_dist, before="import torch\n")


def test_torch_through_other_modules_names_the_one_at_fault(fake_dist) -> None:
    with pytest.raises(CheckFailed) as caught:
        check(
            "torch_free_import",
            fake_dist,
            "import shared_helper\n" + IMPORTS + CONFIG + OBJECTIVE,
            shared_helper="x = 1\nimport shared_deep\n",
            shared_deep="\n\ntry:\n    import torch.nn\nexcept ImportError:\n    pass\n",
        )
    text = str(caught.value)
    assert "shared_parts -> shared_helper -> shared_deep -> torch\n" in text
    assert "shared_deep imports it at " in text
    assert "shared_deep.py:4\n" in text


def test_torch_inside_functions_is_as_it_should_be(fake_dist) -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"
    assert check("torch_free_import", fake_dist, lazy + IMPORTS + CONFIG + OBJECTIVE)


def test_an_import_that_fails_is_shown(fake_dist) -> None:
    with pytest.raises(CheckFailed, match=r"(?s)in a fresh interpreter failed: .*no_such_module_anywhere"):
        check("torch_free_import", fake_dist, "import no_such_module_anywhere\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # The schema says what the model does not do.
        (
            "    share: float = Field(default=0.5, gt=0, le=1)\n",
            '    share: float = Field(default=0.5, json_schema_extra={"maximum": 1})\n',
            r"objective\.thing\.share = 1\.0000000000000002 is accepted, but its maximum is 1",
        ),
        (
            "class C(Settings):\n",
            'class C(Settings, strict=False):\n    model_config = {"extra": "ignore"}\n',
            r"objective\.thing\.sharee = 1 is accepted, but there is no such setting",
        ),
        # Refused, but elsewhere than at the key.
        (
            '    """A kind."""\n',
            '    """A kind."""\n'
            '    @field_validator("share", mode="wrap")\n'
            "    @classmethod\n"
            "    def _share(cls, value, handler):\n"
            "        try:\n"
            "            return handler(value)\n"
            "        except ValueError:\n"
            '            raise ConfigError(["something is wrong"]) from None\n',
            r"objective\.thing\.share = .* without naming the key: .*objective\.thing: something is wrong",
        ),
    ],
)
def test_settings_that_are_not_refused_as_they_should_be(fake_dist, old, new, message) -> None:
    source = IMPORTS + CONFIG + OBJECTIVE
    assert old in source
    with pytest.raises(CheckFailed, match=message):
        check("bad_configuration", fake_dist, source.replace(old, new))


def test_a_config_that_is_no_model_is_the_other_checks_concern(fake_dist) -> None:
    with pytest.raises(NotApplicable):
        check("bad_configuration", fake_dist, (IMPORTS + CONFIG + OBJECTIVE).replace("Config = C", "Config = dict"))


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(Settings):
    depth: int = Field(default=3, ge=1, lt=9)
    """A depth."""


class Many(Settings):
    plain: str
    """Required."""
    on: bool = False
    """A switch."""
    count: int = Field(default=4, ge=0, le=8, multiple_of=2)
    """Even."""
    rate: float = Field(default=0.5, gt=0, lt=1)
    """Between."""
    name: str = Field(default="ab", min_length=1, max_length=3)
    """Short."""
    way: Literal["up", "down"] = "up"
    """A way."""
    colour: Colour = Colour.RED
    """A colour."""
    maybe: int | None = Field(default=None, ge=1)
    """Or nothing."""
    either: int | str = 1
    """Two types."""
    sizes: list[int] = Field(default_factory=list)
    """A list."""
    inner: Inner = Inner()
    """A table."""
    alias: int = Field(default=1, alias="other-name")
    """Under another name."""


def test_every_bad_setting_is_bad_and_every_field_and_bound_has_one() -> None:
    """Against pydantic itself: each table is refused, at the place that it names."""
    found = list(bad_settings(Many))
    for bad in found:
        with pytest.raises(ValidationError) as caught:
            Many.model_validate({"plain": "x", **bad.table})
        places = [error["loc"][: len(bad.path)] for error in caught.value.errors()]
        assert bad.path in places, (bad, places)
    keys = {bad.path for bad in found}
    assert keys == {
        *((key,) for key in Many.model_json_schema()["properties"]),
        ("plainn",),
        ("inner", "depth"),
        ("inner", "depthh"),
        ("sizes", 0),
    }
    why = {bad.why for bad in found if bad.path == ("count",)}
    assert why == {
        "the setting takes an integer",
        "its minimum is 0",
        "its maximum is 8",
        "it has to be a multiple of 2",
    }
    assert {bad.shown for bad in found if bad.path == ("rate",)} >= {"0.0", "1.0"}
    assert [bad.meant for bad in found if bad.path == ("plainn",)] == ["plain"]


def test_a_model_without_settings_refuses_any() -> None:
    (bad,) = bad_settings(Settings)
    assert bad.meant is None
    assert bad.why == "there is no such setting"
