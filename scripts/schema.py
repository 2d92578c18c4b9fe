"""Write params.schema.json, by which editors complete and check parameter files, from the classes in `vlm_vqa.params`.

    python -m scripts.schema

A test compares the committed file with what this writes. The first line of every parameter file names it, as a file beside
it; presets/ has a link to it, so that a preset can be copied to params.yaml as it is.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from vlm_vqa import params

FILE = Path(__file__).parents[1] / "params.schema.json"


class _Untitled(GenerateJsonSchema):
    """Without titles, which only repeat a key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_of(kind: type) -> dict[str, Any]:
    """Return the JSON schema of a class of parameters, with the docstrings below its fields."""
    # Not in the package: reading docstrings takes longer than validating.
    params.Section.__pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return TypeAdapter(kind).json_schema(schema_generator=_Untitled)


def schema() -> dict[str, Any]:
    """Return the schema of parameter files."""
    made = schema_of(params.Params)
    # DVC needs every section of a file, where Python has a default for the one that came later.
    made["properties"]["validation"].pop("default")
    made["required"] = [*made["properties"]]
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | made


if __name__ == "__main__":
    FILE.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
    print(FILE.name)
