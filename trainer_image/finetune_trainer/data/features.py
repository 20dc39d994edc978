"""Rows of Arrow batches as Hugging Face datasets means them: classes by their names, JSON as what it says. Called by rows.

The features stand in the schema's metadata, of the folders of `save_to_disk` and of the hub's Parquet files alike; other files have none.
"""

import json
from collections.abc import Callable
from typing import Any

from ..errors import DataError

Decode = Callable[[Any], Any]


def decoder(schema: Any, name: str) -> Callable[[Any], list[dict[str, Any]]]:
    """From a batch of this schema to its rows.

    Args:
        schema: a pyarrow.Schema.
        name: what messages call the file.
    """
    decoders = {column: decode for column, feature in _features(schema, name).items() if (decode := _decoder(feature))}

    def rows(batch: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = batch.to_pylist()
        for row in found:
            for column, decode in decoders.items():
                if row.get(column) is not None:
                    row[column] = decode(row[column])
        return found

    return rows


def _features(schema: Any, name: str) -> dict[str, Any]:
    described = (schema.metadata or {}).get(b"huggingface")
    try:
        return dict(json.loads(described)["info"]["features"] or {}) if described else {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: the features in its schema cannot be read; write it anew") from error


def _decoder(feature: Any) -> Decode | None:
    """What a column's values become; None where they stay."""
    if isinstance(feature, list):
        return _of_list(_decoder(feature[0])) if feature else None
    if not isinstance(feature, dict):
        return None
    match feature.get("_type"):
        case "ClassLabel" if names := feature.get("names"):
            # -1 says that there is no label.
            return lambda value: names[value] if 0 <= value < len(names) else None
        case "Json":
            return lambda value: json.loads(value) if isinstance(value, str) else value
        case "List" | "LargeList" | "Sequence":
            inner = feature.get("feature")
            if feature["_type"] == "Sequence" and isinstance(inner, dict) and "_type" not in inner:
                return _of_struct({key: _of_list(_decoder(one)) for key, one in inner.items()})
            return _of_list(_decoder(inner))
        case None:
            return _of_struct({key: _decoder(one) for key, one in feature.items()})
    return None


def _of_list(decode: Decode | None) -> Decode | None:
    if decode is None:
        return None
    return lambda values: None if values is None else [None if one is None else decode(one) for one in values]


def _of_struct(fields: dict[str, Decode | None]) -> Decode | None:
    known = {key: decode for key, decode in fields.items() if decode}
    if not known:
        return None
    return lambda value: {
        key: known[key](one) if key in known and one is not None else one for key, one in value.items()
    }
