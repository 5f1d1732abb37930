"""Odd inputs in a real folder: each is handled rightly or set aside with its reason, and no neighbour notices."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image as decode_by_torchvision

from storage.errors import SourceError
from storage.sources import FolderSource, decode_image
from storage.sources.folder import MAX_BYTES, path_of
from storage.store import open_store
from tasks.parts import read_mask
from tasks.quarantine import set_aside
from tasks.stage import Bad
from tests.conftest import Ran, SerialExecutor, config_with
from tests.flows.command import call, vitrine, write_config
from tests.tasks.test_quarantine import conducted
from xai_core.synthetic import render

FULL = bool(os.environ.get("VITRINE_FAULTS"))
NOBODY = 65534

# Long past what any of this takes: a pipe that is waited for must fail a test, not stop the suite.
SECONDS = 300

STUDY: dict[str, Any] = {
    "name": "inputs",
    "parts": {"parser": "tokens", "k": 4},
    "methods": ["grad_cam", "kl_hessian"],
    "metrics": [{"name": "insertion", "steps": 2}, "p_deletion"],
    "concepts": {"layers": ["blocks.2"], "extractors": ["bisecting_kmeans"], "atoms": 2},
    # Passes of one image: sums of floating-point numbers then do not depend on who else is in the batch.
    "run": {"shard_size": 8, "batch_size": 1, "max_bad_fraction": 1.0},
    "compute": {"workers": 1},
}


@contextmanager
def in_time() -> Iterator[None]:
    def too_late(_number: int, _frame: object) -> None:
        raise TimeoutError(f"still waiting after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(seed: int, width: int = 48, height: int = 40, channels: int = 3) -> np.ndarray:
    """Pixels that no two channels share, in cells large enough for JPEG."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, channels), dtype=np.uint8)
    return np.repeat(np.repeat(cells, 8, axis=0), 8, axis=1)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes) -> bytes:
    """A PNG chunk by chunk, of rows that carry their filter bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + body


def jpeg(seed: int, **options: Any) -> bytes:
    return encoded(Image.fromarray(noise(seed)), "JPEG", quality=92, **options)


def by_torchvision(content: bytes) -> np.ndarray:
    """The same bytes through another library's decoder."""
    return decode_by_torchvision(torch.frombuffer(bytearray(content), dtype=torch.uint8)).permute(1, 2, 0).numpy()


# --- what is refused ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Something under a picture's name, how it comes to stand there, and what its row in ``quarantine`` says."""

    write: Callable[[Path], Any]
    error: str
    message: str


def content(given: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(given)


def node(kind: int) -> Callable[[Path], Any]:
    return lambda path: os.mknod(path, kind | 0o600)


def endless(path: Path) -> None:
    """A file of holes, larger than memory should ever take."""
    with path.open("wb") as stream:
        stream.write(jpeg(1))
        stream.truncate(MAX_BYTES + 1)


NOT_PICTURE = "not a readable picture: "
NONE_OF = "not a readable picture: of no known format, it begins with "
REFUSED = {
    "truncated.jpg": Refused(
        content(jpeg(1)[:-300]),
        "SourceError",
        NOT_PICTURE + r"OSError: image file is truncated \(\d+ bytes not processed\)",
    ),
    "truncated.png": Refused(
        content(encoded(Image.fromarray(noise(1)), "PNG")[:-60]), "SourceError", NOT_PICTURE + "OSError: .+"
    ),
    "only-a-header.jpg": Refused(
        content(jpeg(1)[:12]), "SourceError", NOT_PICTURE + "OSError: Truncated File Read"
    ),
    "empty.jpg": Refused(content(b""), "SourceError", "expected an encoded picture, got 0 bytes"),
    "text.png": Refused(
        content(b"Dear reader,\nI am no picture.\n"), "SourceError", NONE_OF + r"b'Dear reader,\\nI am no pic'"
    ),
    "postscript.jpg": Refused(
        content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "SourceError", NONE_OF + "b'%!PS.+"
    ),
    "bomb.png": Refused(
        content(png(10_000, 8_000, 1, 0, bytes(1 + 1250) * 8_000)),
        "SourceError",
        "expected at most 64000000 pixels, got 10000 x 8000",
    ),
    "claimed-bomb.png": Refused(
        content(png(30_000, 30_000, 8, 2, bytes(64))),
        "SourceError",
        "expected at most 64000000 pixels, got 900000000",
    ),
    "text-bomb.png": Refused(
        content(png(8, 8, 8, 0, bytes(9) * 8, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)))),
        "SourceError",
        NOT_PICTURE + "ValueError: Decompressed data too large.*",
    ),
    "strip.png": Refused(
        content(png(4_000, 2, 8, 0, bytes(4_001) * 2)),
        "SourceError",
        "expected a side at most 200 times the other, got 4000 x 2",
    ),
    "float.tif": Refused(
        content(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")),
        "SourceError",
        "expected 8 or 16 bits a channel, got 32.+",
    ),
    "endless.jpg": Refused(
        endless, "SourceError", f"expected a picture of at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"
    ),
    "broken\nin two \x1b[31m.png": Refused(content(b"\0" * 9), "SourceError", NONE_OF + r"b'(\\x00){9}'"),
    os.fsdecode(b"bro\xe9ken.png"): Refused(content(b"GIF89a"), "SourceError", NOT_PICTURE + ".+"),
    "dangling.png": Refused(
        lambda path: path.symlink_to("nowhere.png"),
        "FileNotFoundError",
        "cannot be read: No such file or directory",
    ),
    "circle.png": Refused(
        lambda path: path.symlink_to("circle.png"), "OSError", "cannot be read: Too many levels of symbolic links"
    ),
    "pipe.png": Refused(node(stat.S_IFIFO), "SourceError", "expected a file, got a named pipe"),
    "socket.png": Refused(node(stat.S_IFSOCK), "OSError", "cannot be read: No such device or address"),
    "device.png": Refused(
        lambda path: path.symlink_to("/dev/zero"), "SourceError", "expected a file, got a device"
    ),
}

# --- what is a picture -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture's bytes, what its pixels are by another way than ours, and by how much one may differ."""

    content: bytes
    pixels: np.ndarray
    within: int = 0


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return np.rint(colours * share + 255 * (1 - share))


def cmyk() -> Picture:
    inks = noise(2, channels=4)
    shares = inks.astype(float) / 255
    return Picture(
        encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0),
        255 * (1 - shares[..., :3]) * (1 - shares[..., 3:]),
        within=4,
    )


def grey_of_sixteen_bits() -> Picture:
    values = np.random.default_rng(3).integers(0, 65536, (40, 48)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return Picture(png(48, 40, 16, 0, rows), np.repeat((values >> 8)[..., None], 3, axis=2))


def colour_of_sixteen_bits() -> Picture:
    values = np.random.default_rng(4).integers(0, 65536, (40, 48, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return Picture(png(48, 40, 16, 2, rows), values >> 8)


def palette_with_alpha() -> Picture:
    generator = np.random.default_rng(5)
    colours, alpha = generator.integers(0, 256, (16, 3)), generator.integers(0, 256, 16)
    index = generator.integers(0, 16, (40, 48)).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in index)
    before = chunk(b"PLTE", colours.astype(np.uint8).tobytes()), chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
    return Picture(png(48, 40, 8, 3, rows, *before), over_white(colours[index], alpha[index]), within=1)


def turned(orientation: int, turns: int) -> Picture:
    exif = Image.Exif()
    exif[0x0112] = orientation
    given = jpeg(6, exif=exif)
    # The same bytes without the tag, turned by numpy.
    return Picture(given, np.rot90(by_torchvision(jpeg(6)), turns))


def animation() -> Picture:
    frames = [noise(seed) // 64 * 64 for seed in (7, 8, 9)]
    first, *others = (Image.fromarray(frame).quantize(256) for frame in frames)
    return Picture(
        encoded(first, "GIF", save_all=True, append_images=others, duration=50), np.asarray(first.convert("RGB"))
    )


def plain(seed: int, kind: str = "PNG") -> Picture:
    pixels = noise(seed)
    return Picture(encoded(Image.fromarray(pixels), kind), pixels)


PICTURES = {
    "cmyk.jpg": cmyk(),
    "grey16.png": grey_of_sixteen_bits(),
    "colour16.png": colour_of_sixteen_bits(),
    "palette-alpha.png": palette_with_alpha(),
    "turned-6.jpg": turned(6, -1),
    "turned-3.jpg": turned(3, 2),
    "turned-8.jpg": turned(8, 1),
    "one-pixel.png": Picture(png(1, 1, 8, 2, b"\0\x0a\x14\x1e"), np.array([[[10, 20, 30]]])),
    "moving.gif": animation(),
    "progressive.jpeg": Picture(jpeg(10, progressive=True), by_torchvision(jpeg(10, progressive=True))),
    "UPPER.JPG": Picture(jpeg(11), by_torchvision(jpeg(11))),
    "a-jpeg-in-truth.png": Picture(jpeg(12), by_torchvision(jpeg(12))),
    "two\nlines \x1b[31m.png": plain(13),
    os.fsdecode(b"caf\xe9.png"): plain(14),
    "folder.png/inside.bmp": plain(15, "BMP"),
}

# What stands in the folder and is no part of the data set.
HIDDEN = (".hidden.png", "._apple.jpg", ".cache/copy.png", "notes.txt", ".png")


def write_neighbours(folder: Path, count: int = 5) -> None:
    for index in range(count):
        path = folder / ("even", "odd")[index % 2] / f"n{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(1, index).image).save(path)


def write_odd_inputs(folder: Path) -> None:
    place = folder / "odd"
    for name, picture in PICTURES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(picture.content)
    for name, refused in REFUSED.items():
        refused.write(place / name)
    for name in HIDDEN:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(plain(16).content)
    (place / "loop").symlink_to("..")
    (folder / "loop").symlink_to(".")
    (folder / ".hidden-class").mkdir()
    (folder / ".hidden-class" / "copy.png").write_bytes(plain(16).content)


def study_of(folder: Path, **changes: Any) -> dict[str, Any]:
    # The source's own order: neighbours then come in one order in both runs.
    return config_with(
        {**STUDY, "dataset": {"kind": "folder", "path": str(folder), "order_seed": None}}, **changes
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def mixed(place: Path) -> Ran:
    """The chain over neighbours and odd inputs."""
    write_neighbours(place / "mixed")
    write_odd_inputs(place / "mixed")
    with in_time():
        return conducted(study_of(place / "mixed"), place / "mixed-store", SerialExecutor())


@pytest.fixture(scope="module")
def clean(place: Path) -> Ran:
    """The chain over the neighbours alone."""
    write_neighbours(place / "clean")
    return conducted(study_of(place / "clean"), place / "clean-store", SerialExecutor())


def name_of(reference: str) -> str:
    """A listed path below ``odd`` as it stands in the file system."""
    return path_of(reference).removeprefix("odd/")


def test_what_cannot_be_used_is_set_aside_once_with_its_reason(mixed: Ran) -> None:
    rows = mixed.sql("select path, stage, method, error, message, attempt from quarantine")
    found = {name_of(row["path"]): row for row in rows}
    assert len(found) == len(rows)
    assert found.keys() == REFUSED.keys()
    for name, refused in REFUSED.items():
        row = found[name]
        assert (row["stage"], row["method"], row["error"], row["attempt"]) == ("manifest", "", refused.error, 1), (
            name
        )
        assert re.fullmatch(refused.message, row["message"], re.DOTALL), (name, row["message"])
    assert mixed.quarantined == len(REFUSED)


def test_every_odd_picture_goes_the_whole_way(mixed: Ran) -> None:
    rows = mixed.sql(
        "select path, width, height, target, count(metric) as metrics from images "
        "left join metrics using (run_id, image_id) group by all"
    )
    found = {name_of(row["path"]): row for row in rows if not re.search(r"n\d\.png$", row["path"])}
    assert found.keys() == PICTURES.keys()
    for name, picture in PICTURES.items():
        assert (found[name]["height"], found[name]["width"]) == picture.pixels.shape[:2], name
        assert found[name]["target"] is not None, name
        # Two methods by two metrics, defined or not.
        assert found[name]["metrics"] == 4, name


@pytest.mark.parametrize("name", PICTURES, ids=ascii)
def test_pixels_are_what_another_decoder_says(name: str, mixed: Ran, place: Path) -> None:
    (reference,) = [row["path"] for row in mixed.sql("select path from images") if name_of(row["path"]) == name]
    found = np.asarray(decode_image(FolderSource(place / "mixed").read(reference)))
    expected = PICTURES[name].pixels
    assert found.shape == expected.shape
    difference = np.abs(found.astype(float) - expected.astype(float)).max()
    assert difference <= PICTURES[name].within, difference


def test_hidden_files_and_loops_are_no_part_of_the_set(mixed: Ran) -> None:
    (listed,) = mixed.sql("select sum(images) as n from timings where stage = 'manifest'")
    assert listed["n"] == 5 + len(PICTURES) + len(REFUSED)
    assert mixed.sql("select distinct label, label_name from images order by 1") == [
        {"label": 0, "label_name": "even"},
        {"label": 1, "label_name": "odd"},
    ]


PER_IMAGE = {
    "targets": "target, target_name, correct",
    "predictions": "rank, class_id, class_name, logit, prob",
    "parts": "part_id, area, x0, y0, x1, y1",
    "part_scores": "method, part_id, score, kl_sym, curvature",
    "metrics": "method, metric, value",
    "curves": "method, curve, step, fraction, prob",
}
NEIGHBOURS = r"regexp_matches(path, '^(even|odd)/n\d\.png$')"


@pytest.mark.parametrize("table", PER_IMAGE)
def test_the_neighbours_rows_are_the_same_to_the_last_bit(table: str, mixed: Ran, clean: Ran) -> None:
    columns = PER_IMAGE[table]
    text = (
        f"select path, sha256, {columns} from {table} join manifest using (run_id, image_id) "
        f"where {NEIGHBOURS} order by all"
    )
    expected = clean.sql(text)
    assert len({row["path"] for row in expected}) == 5
    assert mixed.sql(text) == expected


@pytest.mark.parametrize(
    "name",
    [
        "parts/labels",
        "pfv/blocks.2.vectors",
        "pfv/blocks.2.positions",
        "pfv/blocks.2.relevance",
        "pfv/blocks.2.receptive_fields",
        "attribute/grad_cam/maps",
        "attribute/kl_hessian/maps",
        "attribute/kl_hessian/scale",
    ],
)
def test_the_neighbours_tensors_are_the_same_to_the_last_bit(name: str, mixed: Ran, clean: Ran) -> None:
    found, expected = (tensors(ran, name) for ran in (mixed, clean))
    assert len(expected) == 5
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, path)


def tensors(ran: Ran, name: str) -> dict[str, np.ndarray]:
    """The neighbours' rows of an array, by path."""
    rows = ran.store.xarray(name, ran.run_id)
    images = ran.sql(f"select path, image_id from images where {NEIGHBOURS}")
    assert all(bool(rows.sel(image=row["image_id"])["valid"]) for row in images)
    return {row["path"]: rows.sel(image=row["image_id"]).values for row in images}


def test_a_broken_row_of_parquet_is_set_aside(tmp_path: Path) -> None:
    given = [plain(1).content, None, b"", b"no picture", jpeg(1)[:-300], plain(2).content]
    image = pa.array(
        [{"bytes": one, "path": None} for one in given], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": image, "label": pa.array([0, 1, 0, 1, 0, 1])}), tmp_path / "set.parquet")
    document = {**STUDY, "dataset": {"kind": "parquet", "path": str(tmp_path / "set.parquet"), "order_seed": None}}
    found = conducted(document, tmp_path / "store", SerialExecutor())
    rows = found.sql("select image_id, error, message from quarantine order by 1")
    assert [(row["image_id"], row["error"]) for row in rows] == [(index, "SourceError") for index in range(1, 5)]
    assert [row["message"].split(":")[0] for row in rows] == [
        "expected an encoded picture, got null",
        "expected an encoded picture, got 0 bytes",
        "not a readable picture",
        "not a readable picture",
    ]


def test_the_list_of_them_shows_names_and_does_not_obey_them(mixed: Ran, place: Path) -> None:
    listed = call("quarantine", "--store", place / "mixed-store", cwd=place)
    assert listed.returncode == 0, listed.stderr
    head, _rule, *rows, summary = listed.stdout.splitlines()
    assert head.split() == ["image_id", "path", "stage", "methods", "error", "message"]
    assert summary.startswith(f"{len(REFUSED)} images quarantined in run {mixed.run_id}: manifest SourceError ")
    # Neither a name nor a message starts a row of its own; what is too wide goes on under its column.
    assert len([row for row in rows if not row.startswith("   ")]) == len(REFUSED), listed.stdout
    assert all(row.startswith("   ") or row.split()[0].isdigit() for row in rows), listed.stdout
    assert "\x1b" not in listed.stdout
    assert r"odd/broken\nin two \x1b[31m.png" in listed.stdout
    assert "percent-encoded:odd/bro%E9ken.png" in listed.stdout


def test_a_mask_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, reason in [
        ("pipe", "expected a file, got a named pipe"),
        ("loop", ".+symbolic links"),
        ("no", "No such"),
    ]:
        with in_time(), pytest.raises(SourceError, match=f"expected a readable mask at .+{name}.png: .*{reason}"):
            read_mask(tmp_path, f"{name}.jpg", (8, 8))


def test_reasons_are_the_same_on_every_machine() -> None:
    """Rows are compared between runs: they name neither absolute paths nor addresses."""
    missing = FileNotFoundError(2, "No such file or directory", "/some/where/\udce9.png")
    assert set_aside(3, "a.png", missing) == Bad(
        3, "a.png", "FileNotFoundError", "cannot be read: No such file or directory"
    )
    assert set_aside(3, "a.png", MemoryError()).error == "OutOfMemory"
    assert set_aside(3, "a.png", SourceError("mask /x/\udce9.png")).message == "mask /x/\\udce9.png"


# --- what may not be read ----------------------------------------------------------------------------------------


@contextmanager
def without_privileges() -> Iterator[None]:
    """As an ordinary user for the block: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class Unprivileged(SerialExecutor):
    """Runs works in this process, and lists the images as an ordinary user."""

    def run(self, works: list[Any]) -> Iterator[Any]:
        if works and works[0].unit.stage == "manifest":
            with without_privileges():
                yield from list(super().run(works))
        else:
            yield from super().run(works)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user can reach and write to; pytest's own are their owner's."""
    before = os.umask(0)
    place = Path(tempfile.mkdtemp(prefix="vitrine-inputs-"))
    place.chmod(0o777)
    try:
        yield place
    finally:
        os.umask(before)
        for path in place.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o777)
        shutil.rmtree(place)


def test_a_file_that_may_not_be_read_is_set_aside(open_place: Path) -> None:
    write_neighbours(open_place / "images", 3)
    locked = open_place / "images" / "odd" / "locked.png"
    locked.write_bytes(plain(1).content)
    locked.chmod(0)
    with without_privileges(), pytest.raises(PermissionError):
        locked.read_bytes()
    study = study_of(open_place / "images", concepts={"layers": []}, methods=["grad_cam"])
    found = conducted(study, open_place / "store", Unprivileged())
    rows = found.sql("select path, stage, error, message from quarantine")
    assert rows == [
        {
            "path": "odd/locked.png",
            "stage": "manifest",
            "error": "PermissionError",
            "message": "cannot be read: Permission denied",
        }
    ]
    assert found.sql("select count(*) as n from images") == [{"n": 3}]


def test_a_folder_that_may_not_be_listed_stops_the_run_before_it_starts(open_place: Path) -> None:
    """Nobody knows which images would be missing: they cannot be set aside one by one."""
    write_neighbours(open_place / "images", 3)
    (open_place / "images" / "odd").chmod(0)
    with (
        without_privileges(),
        pytest.raises(SourceError, match=r"can be listed, got Permission denied for .+/odd; make it"),
    ):
        list(FolderSource(open_place / "images").items())


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not FULL, reason="the full form only: VITRINE_FAULTS=full (the chain above is the same in this process)"
)
def test_the_command_survives_them_too(place: Path, mixed: Ran, tmp_path: Path, prefect_api: str) -> None:
    config = write_config(tmp_path / "inputs.yaml", study_of(place / "mixed"))
    done = vitrine("run", config, "--store", tmp_path / "store", cwd=tmp_path)
    assert done.returncode == 3, done.stderr[-3000:]
    assert f"{len(REFUSED)} images quarantined, listed by: vitrine quarantine" in done.stdout
    for table in ("quarantine", "manifest"):
        found, expected = (
            store.table(table, mixed.run_id) for store in (open_store(tmp_path / "store"), mixed.store)
        )
        assert found.sort_by("image_id").equals(expected.sort_by("image_id")), table
