"""Writes docs/cluster-keys.md: every key of cluster files, from the classes that check them.

python docs/cluster_keys.py
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.settings import KINDS

PAGE = Path(__file__).parent / "cluster-keys.md"
HEAD = """# Every key of a cluster file

`python docs/cluster_keys.py` writes this page from `cluster/settings.py`. `rddm launch ... --dry-run` checks a file;
an unknown key is told with the nearest known one. How they are used: [clusters.md](clusters.md).
"""


def page() -> str:
    parts = [HEAD]
    shared = set.intersection(*(set(model.model_fields) for model in KINDS.values())) - {"kind"}
    fields = next(iter(KINDS.values())).model_fields
    parts.append(_table("All kinds", [(name, field) for name, field in fields.items() if name in shared]))
    for kind, model in KINDS.items():
        rows = [(name, field) for name, field in model.model_fields.items() if name not in {*shared, "kind"}]
        parts.append(_table(f"`kind: {kind}`", rows))
    return "\n".join(parts)


def _table(title: str, fields: list[tuple[str, FieldInfo]]) -> str:
    lines = [f"## {title}\n", "| key | default | what |", "|---|---|---|"]
    for name, field in fields:
        lines += [f"| `{key}` | {default} | {what} |" for key, default, what in _rows(name, field)]
    return "\n".join(lines) + "\n"


def _rows(name: str, field: FieldInfo) -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of a key, and of those inside it."""
    inner, form = _section(field.annotation)
    if inner is None:
        yield name, _default(field), field.description or ""
        return
    values = field.default if isinstance(field.default, inner) else None
    if form:
        yield name, _default(field), f"{form} of the keys below"
    prefix = f"{name}[].{{}}" if form == "a list" else f"{name}.{{}}"
    for key, each in inner.model_fields.items():
        for inner_key, default, what in _rows(key, each):
            is_set = values is not None and inner_key == key and not _section(each.annotation)[0]
            yield prefix.format(inner_key), _shown(getattr(values, key)) if is_set else default, what


def _section(annotation: object) -> tuple[type[BaseModel] | None, str]:
    """The section that a key holds, and whether it is "a list" of them or may be left out ("a group")."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for each in typing.get_args(annotation):
        if isinstance(each, type) and issubclass(each, BaseModel):
            is_optional = isinstance(annotation, UnionType) and NoneType in typing.get_args(annotation)
            return each, "a group" if is_optional else "a list"
    return None, ""


def _default(field: FieldInfo) -> str:
    return "must be given" if field.is_required() else _shown(field.default)


def _shown(value: object) -> str:
    if value in ("", (), {}, None):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
