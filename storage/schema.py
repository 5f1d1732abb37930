"""The tables of the store: one explicit schema each. ``run_id`` is added by the views, never stored in rows.

A shard that two runs share is stored once, so its rows cannot name one run; the views join each file with
the runs that refer to its commit.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

FORMAT_VERSION = 2
# The first version of vitrine that reads each format of the store.
READ_SINCE = {1: "0.1.0", 2: "0.2.0"}

_ID = pa.field("image_id", pa.int64(), nullable=False)


def _fields(**types: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in types.items()]


TABLES: dict[str, pa.Schema] = {
    "manifest": pa.schema(
        [
            _ID,
            *_fields(
                path=pa.string(),
                sha256=pa.string(),
                width=pa.int32(),
                height=pa.int32(),
                label=pa.int32(),
                label_name=pa.string(),
            ),
        ]
    ),
    "targets": pa.schema([_ID, *_fields(target=pa.int32(), target_name=pa.string(), correct=pa.bool_())]),
    "predictions": pa.schema(
        [
            _ID,
            *_fields(
                rank=pa.int8(),
                class_id=pa.int32(),
                class_name=pa.string(),
                logit=pa.float32(),
                prob=pa.float32(),
            ),
        ]
    ),
    "parts": pa.schema(
        [
            _ID,
            *_fields(
                part_id=pa.int16(),
                area=pa.int32(),
                x0=pa.int32(),
                y0=pa.int32(),
                x1=pa.int32(),
                y1=pa.int32(),
            ),
        ]
    ),
    "part_scores": pa.schema(
        [
            _ID,
            *_fields(
                method=pa.string(),
                part_id=pa.int16(),
                score=pa.float64(),
                kl_sym=pa.float64(),
                curvature=pa.float64(),
            ),
        ]
    ),
    "true_masks": pa.schema(
        [_ID, *_fields(inside=pa.int32(), outside=pa.int32(), unknown=pa.int32(), reason=pa.string())]
    ),
    "true_parts": pa.schema(
        [
            _ID,
            *_fields(
                part_id=pa.int16(), name=pa.string(), deciding=pa.bool_(), area=pa.int32(), effect=pa.float64()
            ),
        ]
    ),
    "metrics": pa.schema(
        [_ID, *_fields(method=pa.string(), metric=pa.string(), value=pa.float64(), reason=pa.string())]
    ),
    "curves": pa.schema(
        [
            _ID,
            *_fields(
                method=pa.string(),
                curve=pa.string(),
                step=pa.int32(),
                fraction=pa.float64(),
                prob=pa.float32(),
            ),
        ]
    ),
    "concepts": pa.schema(
        _fields(
            layer=pa.string(),
            extractor=pa.string(),
            concept_id=pa.int32(),
            size=pa.int64(),
            atoms=pa.int32(),
            channels=pa.int32(),
            vectors=pa.int64(),
            rel_l2=pa.float64(),
            l0_ratio=pa.float64(),
            rel_l2_error=pa.float64(),
            l0_ratio_error=pa.float64(),
        )
    ),
    "sae_training": pa.schema(
        _fields(
            layer=pa.string(),
            extractor=pa.string(),
            step=pa.int64(),
            vectors=pa.int64(),
            loss=pa.float64(),
            rel_l2=pa.float64(),
            l0=pa.float64(),
            dead=pa.float64(),
            learning_rate=pa.float64(),
        )
    ),
    "training": pa.schema(
        _fields(epoch=pa.int32(), step=pa.int64(), split=pa.string(), name=pa.string(), value=pa.float64())
    ),
    "importance_accuracy": pa.schema(
        [
            _ID,
            *_fields(
                network=pa.string(),
                kind=pa.string(),
                patch_size=pa.int32(),
                direction=pa.string(),
                threshold=pa.float64(),
                correct=pa.bool_(),
                masked=pa.float64(),
            ),
        ]
    ),
    "importance_scores": pa.schema(
        [_ID, *_fields(network=pa.string(), metric=pa.string(), value=pa.float64(), reason=pa.string())]
    ),
    "concept_exemplars": pa.schema(
        [
            *_fields(layer=pa.string(), extractor=pa.string(), concept_id=pa.int32(), rank=pa.int32()),
            _ID,
            *_fields(row=pa.int16(), column=pa.int16(), score=pa.float32(), relevance=pa.float32()),
        ]
    ),
    "concept_scores": pa.schema(
        [
            _ID,
            *_fields(
                layer=pa.string(),
                extractor=pa.string(),
                class_id=pa.int32(),
                concept_id=pa.int32(),
                rank=pa.int32(),
                attribution=pa.float64(),
                coefficient=pa.float64(),
            ),
        ]
    ),
    "concept_edges": pa.schema(
        [
            _ID,
            *_fields(
                extractor=pa.string(),
                attribution_method=pa.string(),
                class_id=pa.int32(),
                source_layer=pa.string(),
                target_layer=pa.string(),
                source=pa.int32(),
                target=pa.int32(),
                weight=pa.float64(),
            ),
        ]
    ),
    "concept_insertion": pa.schema(
        [
            _ID,
            *_fields(
                extractor=pa.string(),
                attribution_method=pa.string(),
                source_layer=pa.string(),
                target_layer=pa.string(),
                target=pa.int32(),
                insertion=pa.float64(),
                deletion=pa.float64(),
                reason=pa.string(),
            ),
        ]
    ),
    "concept_curves": pa.schema(
        [
            _ID,
            *_fields(
                extractor=pa.string(),
                attribution_method=pa.string(),
                source_layer=pa.string(),
                target_layer=pa.string(),
                target=pa.int32(),
                curve=pa.string(),
                step=pa.int32(),
                fraction=pa.float64(),
                alignment=pa.float32(),
            ),
        ]
    ),
    "cafe": pa.schema(
        [
            _ID,
            *_fields(
                layer=pa.string(),
                extractor=pa.string(),
                concept_id=pa.int32(),
                attributor=pa.string(),
                value=pa.float32(),
                insertion=pa.float64(),
                locality=pa.float64(),
            ),
        ]
    ),
    "timings": pa.schema(
        _fields(
            stage=pa.string(),
            method=pa.string(),
            shard=pa.int32(),
            images=pa.int32(),
            seconds=pa.float64(),
            device=pa.string(),
            peak_bytes=pa.int64(),
        )
    ),
    "quarantine": pa.schema(
        [
            _ID,
            *_fields(
                path=pa.string(),
                stage=pa.string(),
                method=pa.string(),
                error=pa.string(),
                message=pa.string(),
                attempt=pa.int32(),
            ),
        ]
    ),
}

# Rows that tell times: the same unit never gives the same bytes twice.
UNREPEATABLE_TABLES = frozenset({"timings"})

RUNS = pa.schema(
    _fields(
        run_id=pa.string(),
        name=pa.string(),
        state=pa.string(),
        created=pa.timestamp("us", tz="UTC"),
        updated=pa.timestamp("us", tz="UTC"),
        vitrine_version=pa.string(),
        model=pa.string(),
        images=pa.int64(),
        config=pa.string(),
        versions=pa.string(),
    )
)

METRIC_INFO = pa.schema(
    _fields(
        run_id=pa.string(),
        metric=pa.string(),
        higher_is_better=pa.bool_(),
        lower_bound=pa.float64(),
        upper_bound=pa.float64(),
        unit=pa.string(),
        family=pa.string(),
        definition=pa.string(),
        undefined=pa.string(),
        paper=pa.string(),
    )
)

METHOD_INFO = pa.schema(
    _fields(
        run_id=pa.string(),
        method=pa.string(),
        output=pa.string(),
        families=pa.string(),
        definition=pa.string(),
        equation=pa.string(),
        cost=pa.string(),
        paper=pa.string(),
    )
)


def rows_to_table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """Columns as a table of the named schema; unknown or missing columns and wrong types are errors."""
    return pa.Table.from_pydict(columns, schema=TABLES[name])
