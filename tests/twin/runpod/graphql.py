"""The part of GraphQL that RunPod's clients send: one operation, arguments as literals.

The syntax is graphql-core's; what a field means is the account's business.
"""

from collections.abc import Callable, Mapping
from typing import Any

from graphql import (
    FieldNode,
    OperationDefinitionNode,
    SelectionSetNode,
    parse,
    value_from_ast_untyped,
)

Resolver = Callable[[str, dict[str, Any]], Any]
"""(operation, arguments) -> value."""


def execute(text: str, resolve: Resolver) -> dict[str, Any]:
    """`data` of the answer. Raises graphql.GraphQLError for what cannot be parsed."""
    (operation,) = parse(text).definitions
    assert isinstance(operation, OperationDefinitionNode)
    data = {}
    for field in _fields(operation.selection_set):
        value = resolve(field.name.value, _arguments(field))
        data[field.name.value] = _select(value, field.selection_set)
    return data


def _fields(selection: SelectionSetNode | None) -> list[FieldNode]:
    return [f for f in (selection.selections if selection else ()) if isinstance(f, FieldNode)]


def _arguments(field: FieldNode) -> dict[str, Any]:
    given = {a.name.value: value_from_ast_untyped(a.value) for a in field.arguments or ()}
    wrapped = given.get("input")
    return dict(wrapped) if isinstance(wrapped, Mapping) else given


def _select(value: Any, selection: SelectionSetNode | None) -> Any:
    if selection is None or value is None:
        return value
    if isinstance(value, list):
        return [_select(v, selection) for v in value]
    return {
        f.name.value: _select(value.get(f.name.value), f.selection_set) for f in _fields(selection)
    }
