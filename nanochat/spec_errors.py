"""What is said of a spec that is wrong: place, value, what is allowed, the nearest spelling."""

import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def unknown(key: str, known: list[str], kind: str) -> str:
    """kind: what the key was taken for."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {key!r}{hint} (known: {', '.join(known)})"


def explain(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    """One line per mistake. where: file of the document; root: what it was read as."""
    lines = []
    for item in error.errors():
        loc = [str(x) for x in item["loc"] if not str(x).startswith(("literal", "constrained"))]
        place = ".".join(loc) or "spec"
        if item["type"] == "extra_forbidden":
            kind, known = "key" if loc[:-1] else "key or section", list(_fields_at(root, loc[:-1]))
            at = ".".join(loc[:-1]) or "top level"
            lines.append(f"{at}: {unknown(loc[-1], known, kind)}")
        elif item["type"] == "missing":
            lines.append(f"{place}: missing, and it has no default. {_help(root, loc)}".strip())
        elif item["type"] == "value_error":
            lines.append(f"{place}: {item['msg'].removeprefix('Value error, ')}")
        else:
            got = json.dumps(item["input"], default=str)
            wants = item["msg"][0].lower() + item["msg"][1:]
            if item["type"] == "model_type":
                wants = f"give a section: [{place}]"
            lines.append(f"{place} = {got}: {wants}. {_help(root, loc)}".strip())
    return f"{where}: " + "\n  ".join(dict.fromkeys(lines))


def _fields_at(root: type[BaseModel], loc: list[str]) -> dict[str, Any]:
    model = root
    for key in loc:
        field = model.model_fields.get(key)
        section = section_of(field.annotation) if field else None
        if section is None:
            return {}
        model = section
    return dict(model.model_fields)


def _help(root: type[BaseModel], loc: list[str]) -> str:
    field = _fields_at(root, loc[:-1]).get(loc[-1]) if loc else None
    return (field.description or "") if field else ""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in `X` or `X | None`."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
