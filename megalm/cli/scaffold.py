"""The files of a new plugin, from templates that come with megalm.

A template's path names the place of its file: ``package`` stands for the import package and ``NAME`` for the plugin's
name. Its text is a :class:`string.Template`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template

from megalm.errors import UsageError
from megalm.plugin.discovery import discover
from megalm.plugin.hookspecs import API_VERSION
from megalm.plugin.manager import PluginManager
from megalm.plugin.registry import singular

SUMMARIES = {
    "objectives": "next-token prediction that scores one position of every n",
    "tokenizers": "the most frequent characters, and bytes for all others",
    "heads": "a label for a text, from the mean of its vectors",
}
"""What the plugin of each kind's template does; ``megalm plugins`` lists it."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LONGEST = 50


def check_name(name: str, kind: str, manager: PluginManager) -> None:
    """UsageError unless a plugin of this name would be the only one of its name, in every way that names are used.

    ``megalm check-plugin NAME`` takes components, plugins and distributions, so a distribution may not have the name,
    nor a module that one brings (``yaml``). Modules of Python itself, such as ``json``, are in nobody's way: the
    plugin's own module is ``megalm_NAME``.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > _LONGEST:
        near = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_")[:_LONGEST]
        usable = _NAME.fullmatch(near) and not keyword.iskeyword(near)
        raise UsageError(
            f'"{name}" cannot name a plugin: it becomes part of Python names, so take up to {_LONGEST} lower-case '
            "letters, digits and underscores, the first a letter, and no word of Python"
            + (f'; "{near}" would do' if usable else "")
        )
    taken = [f"{singular(kind)} {name} of plugin {c.plugin}" for c in manager.registry(kind).get(name, ())]
    taken += [f"plugin {info}" for info in discover() if info.name == name]
    module, dist = module_name(name), dist_name(name)
    if find_spec(module) is not None:
        taken.append(f"the Python module {module}")
    for each in (name, dist):
        with suppress(metadata.PackageNotFoundError):
            found = metadata.distribution(each)
            taken.append(f"the distribution {found.metadata['Name']} {found.version}")
    taken += [f"the Python module {name} of {owner}" for owner in metadata.packages_distributions().get(name, ())]
    if taken:
        raise UsageError(f'the name "{name}" is taken: {taken[0]} is installed; choose another')


def module_name(name: str) -> str:
    """The import package of a plugin."""
    return f"megalm_{name}"


def dist_name(name: str) -> str:
    """The distribution of a plugin, as indices write it."""
    return re.sub(r"_+", "-", f"megalm-{name}").strip("-")


def write_plugin(folder: Path, name: str, kind: str) -> list[str]:
    """Write a plugin's files into an existing folder; their names, in order."""
    words = {
        "name": name,
        "module": module_name(name),
        "dist": dist_name(name),
        "camel": "".join(part.capitalize() for part in name.split("_")),
        "summary": SUMMARIES[kind],
        "api": repr(API_VERSION),
    }
    written = []
    templates = resources.files("megalm.cli") / "templates"
    for group in ("common", singular(kind)):
        for parts, template in _files(templates / group, ()):
            place = "/".join(words["module"] if part == "package" else part.replace("NAME", name) for part in parts)
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            text = Template(template.read_text(encoding="utf-8")).substitute(words)
            path.write_text(text, encoding="utf-8", newline="\n")
            written.append(place)
    return sorted(written)


def _files(folder: Traversable, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Traversable]]:
    """(path in the new folder, template) of each template below a folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, (*parts, entry.name))
        elif entry.name.endswith(".in"):
            yield (*parts, re.sub(r"^dot-", ".", entry.name.removesuffix(".in"))), entry
