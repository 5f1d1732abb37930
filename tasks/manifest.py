"""manifest: which images there are. Reads every image once: digest, size, and whether it can be read at all."""

from __future__ import annotations

from typing import Any

from storage.canonical import digest_bytes, digest_json
from storage.listing import Listing
from storage.schema import rows_to_table
from storage.sources import ImageSource, decode_image
from tasks.quarantine import IMAGE_ERRORS, set_aside
from tasks.sources import open_source
from tasks.stage import Context, Outcome, Stage

COLUMNS = ("image_id", "path", "sha256", "width", "height", "label", "label_name")


def run(context: Context) -> Outcome:
    """Rows of the table ``manifest`` for one shard of the listing; what cannot be decoded is set aside."""
    source = open_source(context.config.dataset)
    listed = Listing(context.listing_path, "", 0).slice(context.work.start, context.work.stop)
    rows, bad = [], []
    for item in listed:
        try:
            rows.append(_describe(source, item))
        except IMAGE_ERRORS as error:
            bad.append(set_aside(item["image_id"], item["reference"], error))
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    context.commit.table("manifest", rows_to_table("manifest", columns))
    # Later stages depend on what the images are, not on when their files were touched.
    content = digest_json([[row[name] for name in COLUMNS] for row in rows])
    return Outcome(len(listed), len(rows), tuple(bad), {"content": content})


def _describe(source: ImageSource, item: dict[str, Any]) -> dict[str, Any]:
    content = source.read(item["reference"])
    width, height = decode_image(content).size
    return {
        "image_id": item["image_id"],
        "path": item["reference"],
        "sha256": digest_bytes(content),
        "width": width,
        "height": height,
        "label": item["label"],
        "label_name": item["label_name"],
    }


STAGE = Stage(
    name="manifest",
    version=2,
    run=run,
    # Two folders may hold files of the same names, sizes and times.
    reads=lambda study, variant: {"kind": study.config.dataset.kind, "path": study.dataset_path},
    reads_model=False,
    summary="lists, hashes and measures the images",
)
