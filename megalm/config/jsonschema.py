"""JSON Schema of RUN.toml, the plugins' sections included, so that editors complete and check keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from megalm.config.load import SECTIONS
from megalm.config.schema import Config
from megalm.config.settings import Settings
from megalm.errors import PluginError
from megalm.plugin.manager import PluginManager


def config_schema(manager: PluginManager) -> tuple[dict[str, Any], list[str]]:
    """The schema, and a line for each component that could not be imported and so is missing from it."""
    models: dict[tuple[str, str], type[Settings]] = {}
    skipped = []
    for section, kind in SECTIONS.items():
        for name, components in manager.registry(kind.kind).items():
            if len(components) != 1:
                continue  # ambiguous: it is written as plugin:name
            try:
                models[section, name] = manager.load_class(kind.kind, name).Config
            except PluginError as error:
                skipped.append(str(error))
    pairs: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Config, "validation")]
    pairs += [(model, "validation") for model in dict.fromkeys(models.values())]
    references, definitions = models_json_schema(pairs, ref_template="#/$defs/{model}")
    defs = definitions["$defs"]
    root = _take(defs, references[Config, "validation"])
    for section in SECTIONS:
        tables = {name: references[model, "validation"] for (s, name), model in models.items() if s == section}
        root["properties"][section] = {"type": "object", "properties": tables}
    # An architecture supplies the rest of [model], so that no key but its name is required.
    model_section = defs[root["properties"]["model"]["$ref"].rpartition("/")[2]]
    model_section["required"] = ["architecture"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": defs}, skipped


def _take(defs: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    taken: dict[str, Any] = defs.pop(reference["$ref"].rpartition("/")[2])
    return taken
