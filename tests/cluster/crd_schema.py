"""Strict JSON schemas from CustomResourceDefinitions: an unknown field is an error, as for `kubectl --validate=strict`.

A CRD's schema is structural OpenAPI v3. What is different in JSON Schema: unknown fields are allowed, `nullable` is
unknown, and a required field that has a default is missing before the API server has set it.
"""

from pathlib import Path
from typing import Any

import jsonschema
import yaml

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
OBJECT_META = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": STRINGS, "annotations": STRINGS},
}
"""What a manifest sets of ObjectMeta; the API server fills in the rest."""


def validator(crd: Path, version: str) -> jsonschema.Draft202012Validator:
    """Validates whole objects of one version of a CRD.

    Raises:
        LookupError: the CRD does not serve that version.
    """
    document = next(d for d in yaml.load_all(crd.read_text(), yaml.CSafeLoader) if d)
    names = {v["name"]: v for v in document["spec"]["versions"] if v["served"]}
    if version not in names:
        raise LookupError(f"{crd.name} serves {sorted(names)}, not {version!r}")
    schema = strict(names[version]["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"metadata": OBJECT_META}
    schema["required"] = ["apiVersion", "kind", "metadata", *schema.get("required", [])]
    return jsonschema.Draft202012Validator(schema)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a structural schema, with unknown fields as errors."""
    made = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k not in ("nullable", "default", "format")}
    properties = schema.get("properties", {})
    if properties:
        made["properties"] = {name: strict(child) for name, child in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if "required" in schema:
        made["required"] = [name for name in schema["required"] if "default" not in properties.get(name, {})]
    for key in ("items", "not"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if schema.get("nullable") and "type" in schema:
        made["type"] = [schema["type"], "null"]
    return made


def problems(schema: jsonschema.Draft202012Validator, obj: dict[str, Any]) -> list[str]:
    """One line a mistake: where, and what."""
    return [f"{'.'.join(map(str, e.absolute_path)) or 'object'}: {e.message}" for e in schema.iter_errors(obj)]
