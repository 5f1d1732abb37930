"""``vitrine diagnose``: the routes of concepts through which classes compete for one picture."""

from __future__ import annotations

from pathlib import Path

from storage.errors import SourceError
from storage.files import publish
from storage.sources import decode_image
from storage.store import open_store
from tasks.diagnosis import diagnose, open_study
from tasks.diagnosis_page import diagnosis_page
from tasks.worker import resolve_device
from xai_core.errors import UsageError
from xai_core.precision import precision_context


def diagnose_picture(
    path: Path,
    classes: str,
    store: Path,
    run: str | None,
    extractor: str | None,
    attack: float | None,
    towards: str | None,
    output: Path,
) -> None:
    """Writes the page of a picture's diagnosis, and prints its routes."""
    if towards is not None and attack is None:
        raise UsageError("--towards: nothing reads it without --attack; say how strong the attack is")
    try:
        picture = decode_image(path.read_bytes())
    except (OSError, SourceError) as error:
        raise UsageError(f"{path}: expected a picture, {error}") from None
    device = resolve_device("auto")
    studied = open_study(open_store(store), run, extractor, device)
    wanted = [studied.class_of(one) for one in classes.split(",")]
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"--classes: expected different classes, got {classes!r}")
    with precision_context("fp32", device):
        found = diagnose(
            studied,
            picture,
            wanted,
            epsilon=attack,
            towards=None if towards is None else studied.class_of(towards),
        )
        page = diagnosis_page(found, path.name)
    publish(output, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(output)
    print("\n".join(f"  {line}" for line in found.lines()))
