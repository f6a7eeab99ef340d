"""Reports and profiles as JSON: public documents, with a kind and the number of a schema."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from quark_inductor import __version__
from quark_inductor.schemes.errors import DocumentError


def read_document(text: str, kind: str, newest: int, *, nameless: bool = False) -> dict[str, Any]:
    """A document of some kind, of schema 1 to ``newest``.

    Args:
        text: the document.
        kind: its kind.
        newest: the newest schema that is known.
        nameless: whether one that does not say its kind is taken for one of this.

    Raises:
        DocumentError: it is no JSON, of another kind, or of a schema that is not known.
    """
    expected = f"expected a {kind}, as quark-inductor writes it with --json"
    try:
        raw = json.loads(text)
    except ValueError as e:
        raise DocumentError(f"this is no JSON ({e}); {expected}") from e
    if not isinstance(raw, dict) or raw.get("kind", kind if nameless else None) != kind:
        found = f"a document of kind {raw.get('kind')!r}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
        raise DocumentError(f"this is {found}; {expected}")
    if raw.get("schema") not in range(1, newest + 1):
        raise DocumentError(
            f"this {kind} has schema {raw.get('schema')!r}, and quark-inductor {__version__} knows 1 to {newest}: "
            "read it with the version that wrote it, or write it again"
        )
    return raw


def known_fields(cls: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has a field for: a version that is older or newer may have more or fewer."""
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: value for key, value in raw.items() if key in names}


def rounded(raw: Any) -> Any:
    """Numbers to six digits after the point: seconds to a microsecond."""
    if isinstance(raw, float):
        return round(raw, 6)
    if isinstance(raw, Mapping):
        return {key: rounded(value) for key, value in raw.items()}
    return [rounded(value) for value in raw] if isinstance(raw, list | tuple) else raw
