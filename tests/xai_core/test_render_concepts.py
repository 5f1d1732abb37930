"""Concept sheets and graph pictures: what is outlined holds what it says, nothing overlaps, nothing is hidden."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from xai_core.errors import UsageError
from xai_core.render.concept_sheet import Exemplars, concept_sheet, concept_tiles, evidence_region
from xai_core.render.evidence import MARK, OUTLINE, Window, crop_window, evidence_tile, level_of, spread
from xai_core.render.graph_layout import crossings, heights, layer_order, ordered
from xai_core.render.graph_picture import Edge, Node, graph_picture
from xai_core.render.graph_svg import BOX, NEGATIVE, PITCH, POSITIVE
from xai_core.render.text import shortened, text_width, wrapped

SIZE = (48, 64)


def random(seed=0):
    return np.random.default_rng(seed)


# --- evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_the_region_is_the_smallest_that_holds_the_share(share):
    field = random().gamma(0.3, size=SIZE)
    region = evidence_region(field, SIZE, share=share, smoothing=0)
    # Slow twin: take pixel after pixel, the strongest first.
    held, taken = 0.0, 0
    for value in sorted(field.ravel().tolist(), reverse=True):
        if held >= share * field.sum() * (1 - 1e-9):
            break
        held, taken = held + value, taken + 1
    assert abs(region.sum() - taken) <= (1 if share < 1 else 0.05 * field.size)
    assert not (~region).any() or field[region].min() > field[~region].max()
    assert field[region].sum() >= share * field.sum() * (1 - 1e-6)


def test_what_speaks_against_and_what_is_not_finite_is_no_evidence():
    field = random().normal(size=SIZE)
    field[0, 0], field[0, 1] = np.nan, np.inf
    changed = np.where(np.isfinite(field) & (field > 0), field, -100.0)
    region = evidence_region(field, SIZE)
    assert np.array_equal(region, evidence_region(changed, SIZE))
    assert not evidence_region(-np.abs(np.nan_to_num(field)), SIZE).any()
    assert not evidence_region(np.zeros((7, 7)), SIZE).any()


def test_equal_pixels_come_in_together_and_a_scale_changes_nothing():
    assert evidence_region(np.ones((7, 7)), SIZE, smoothing=0).all()
    field = random().gamma(1.0, size=(7, 7))
    assert np.array_equal(evidence_region(field, SIZE), evidence_region(field * 1e-6, SIZE))


def test_a_coarse_field_keeps_its_place_in_the_picture():
    field = np.zeros((6, 8))
    field[1, 6] = 1.0
    rows, columns = np.nonzero(evidence_region(field, SIZE))
    assert (rows.mean(), columns.mean()) == pytest.approx((11.5, 51.5), abs=0.01)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UsageError, match="share: expected a number above 0 and at most 1"):
        evidence_region(np.ones((3, 3)), SIZE, share=share)


@pytest.mark.parametrize("place", [(4, 4), (24, 32), (47, 63)])
def test_a_crop_is_a_square_inside_the_picture_that_shows_the_main_island(place):
    evidence = np.zeros(SIZE)
    y, x = np.mgrid[:48, :64]
    evidence[np.hypot(y - place[0], x - place[1]) < 6] = 1.0
    evidence[20, 2] = 1.0
    window = crop_window(evidence, 1.0)
    assert window.bottom - window.top == pytest.approx(window.right - window.left)
    assert 0 <= window.top < window.bottom <= 48 and 0 <= window.left < window.right <= 64
    rows, columns = np.nonzero(np.hypot(y - place[0], x - place[1]) < 6)
    assert window.top <= rows.min() and rows.max() + 1 <= window.bottom
    assert window.left <= columns.min() and columns.max() + 1 <= window.right
    assert crop_window(np.zeros(SIZE), np.inf) == Window(0, 0, 48, 64)


def test_inside_the_outline_the_picture_is_as_it_was_and_outside_dimmed():
    picture = np.full((64, 64, 3), (200.0, 100.0, 50.0))
    evidence = np.zeros((64, 64))
    evidence[20:44, 20:44] = 1.0
    tile = evidence_tile(picture, evidence, 0.5, Window(0, 0, 64, 64), 64)
    assert np.array_equal(tile[32, 32], (200, 100, 50))
    assert tile[4, 4].astype(float) @ (0.299, 0.587, 0.114) < 0.75 * (
        np.array((200, 100, 50)) @ (0.299, 0.587, 0.114)
    )
    assert tuple(tile[19, 32]) == OUTLINE and tuple(tile[32, 44]) == OUTLINE
    bare = evidence_tile(picture, evidence, 0.5, Window(0, 0, 64, 64), 64, Window(0, 0, 8, 8), lines=False)
    assert len(np.unique(bare.reshape(-1, 3), axis=0)) == 2


def test_the_position_is_marked_where_it_is_in_a_crop_too():
    picture, evidence = np.zeros((64, 64, 3)), np.zeros((64, 64))
    for window, edge in ((Window(0, 0, 64, 64), (32, 32)), (Window(16, 16, 48, 48), (32, 32))):
        tile = evidence_tile(picture, evidence, np.inf, window, 128, Window(16 + 8, 16, 16 + 24, 16 + 16))
        scale = 128 / (window.bottom - window.top)
        # The right edge of the cell, at half its height.
        x, y = round((32 - window.left) * scale), round((edge[0] - window.top) * scale)
        assert tuple(tile[y, x]) == MARK or tuple(tile[y, x - 1]) == MARK
        assert (tile[:, min(127, x + 4)] == 0).all()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (7, 7), (0, 7), (3, 0)])
def test_a_position_at_the_border_has_all_four_sides(row, column):
    cell = Window(8 * row, 8 * column, 8 * row + 8, 8 * column + 8)
    tile = evidence_tile(np.zeros((64, 64, 3)), np.zeros((64, 64)), np.inf, Window(0, 0, 64, 64), 128, cell)
    marked = (tile == MARK).all(axis=-1)
    # Straight through the middle of the box, both ways.
    for line, start in ((marked[:, 16 * column + 8], 16 * row), (marked[16 * row + 8], 16 * column)):
        for edge in (start, start + 16):
            assert (np.abs(np.flatnonzero(line) + 0.5 - edge) <= 3).sum() >= 2


def test_smoothing_joins_specks():
    from scipy.ndimage import label

    field = random().random((112, 112)) * np.hanning(112)[:, None] * np.hanning(112)
    counts = [
        label(spread(field, (112, 112), one) >= level_of(spread(field, (112, 112), one)))[1] for one in (0, 1 / 56)
    ]
    assert counts[0] > 20 * counts[1]


# --- sheets ---------------------------------------------------------------------------------------------------


def exemplars(count=3, size=SIZE, **changes):
    generator = random(count)
    parts = {
        "pictures": generator.random((count, 3, *size)),
        "fields": generator.gamma(0.5, size=(count, 6, 8)),
        "positions": np.stack([generator.integers(0, 6, count), generator.integers(0, 8, count)], axis=1),
        "grid": (6, 8),
        "captions": [f"image {index}\na $class$\nscore 0.5" for index in range(count)],
    }
    return Exemplars(**{**parts, **changes})


@pytest.mark.parametrize("count", [1, 6])
def test_a_sheet_grows_with_its_exemplars(count):
    sheet = concept_sheet(exemplars(count), "concept $7$ of <layer>" * 9, note="n")
    assert sheet.mode == "RGB" and sheet.width > 400
    assert sheet.height > 500 * (1 + (count - 1) // 5)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000


def test_the_same_sheet_twice():
    one, two = (concept_sheet(exemplars(), "t") for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_tiles_are_as_wide_as_asked_and_crops_are_squares():
    assert {tile.shape for tile in concept_tiles(exemplars(), side=96)} == {(96, 96, 3)}
    assert {tile.shape for tile in concept_tiles(exemplars(), side=96, crop=False)} == {(72, 96, 3)}


def test_a_vector_without_a_place_gets_no_mark():
    nowhere = exemplars(1, positions=np.array([[-1, 0]]), pictures=np.zeros((1, 3, *SIZE)))
    somewhere = exemplars(1, pictures=np.zeros((1, 3, *SIZE)))
    (without,), (marked,) = (concept_tiles(one, crop=False) for one in (nowhere, somewhere))
    assert (marked == MARK).all(axis=-1).any() and not (without == MARK).all(axis=-1).any()


def test_the_first_of_some_are_those():
    whole = exemplars(5)
    tiles, first = concept_tiles(whole), concept_tiles(whole.first(2))
    assert len(whole.first(2)) == len(first) == 2
    assert all(np.array_equal(one, other) for one, other in zip(first, tiles[:2], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": np.full((3, 3, *SIZE), 255.0)}, "pictures: expected values in \\[0, 1\\], got 255 to 255"),
        ({"pictures": np.full((3, 3, *SIZE), np.nan)}, "pictures: expected values in"),
        ({"pictures": np.zeros((3, *SIZE, 3))}, "expected pictures \\[n, 3, H, W\\]"),
        ({"fields": np.zeros((2, 6, 8))}, "expected 3 fields"),
        ({"positions": np.zeros((3, 3), int)}, "expected 3 fields and positions \\[3, 2\\]"),
        ({"positions": np.full((3, 2), 40)}, "inside the layer's grid \\(6, 8\\), got \\[40, 40\\]"),
        ({"captions": ()}, "n at least 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        exemplars(**changes)


@pytest.mark.shared
def test_a_real_photograph(shared_data):
    file = sorted(shared_data.glob("imagenet-sample/images/*/*.jpg"))[0]
    picture = np.asarray(Image.open(file).convert("RGB").resize((224, 224)), np.float32).transpose(2, 0, 1) / 255
    field = np.zeros((14, 14))
    field[4:8, 5:9] = 1.0
    one = Exemplars(picture[None], field[None], np.array([[5, 6]]), (14, 14), ["tench"])
    (tile,) = concept_tiles(one, side=224, crop=False)
    region = evidence_region(field, (224, 224))
    away = spread(region.astype(float), (224, 224), 2 / 224)
    original = np.rint(255 * picture.transpose(1, 2, 0))
    inside, outside = away > 0.999, away < 0.001
    inside[5 * 16 - 6 : 6 * 16 + 6, 6 * 16 - 6 : 7 * 16 + 6] = False
    assert inside.sum() > 500 and np.abs(tile[inside] - original[inside]).max() <= 1
    assert tile[outside].mean() < 0.8 * original[outside].mean()


# --- text -----------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "a",
    "a word",
    "W" * 90,
    "i" * 90,
    "漢字" * 20,
    "blocks.11.mlp.fc2",
    "e\u0301" * 20,
    "a\n\tb\x00c " * 9,
]


@pytest.mark.parametrize("words", TEXTS)
@pytest.mark.parametrize("room", [14.0, 60.0, 300.0])
def test_text_is_no_wider_than_its_room(words, room):
    for cut in (
        shortened(words, room, 11),
        shortened(words, room, 11, keep_end=True),
        *wrapped(words, room, 11, 2),
    ):
        assert text_width(cut, 11) <= room
        assert cut.isprintable()


def test_what_is_cut_is_marked_and_what_fits_is_whole():
    assert shortened("golden retriever", 500, 11) == "golden retriever"
    assert re.fullmatch(r"golden.*…", shortened("golden retriever", 80, 11))
    assert re.fullmatch(r"….*layer12", shortened("features.denseblock3.denselayer12", 90, 11, keep_end=True))
    assert wrapped("West Highland white terrier", 110, 11, 2) == ["West Highland", "white terrier"]
    assert wrapped("concept 7", 300, 11, 2) == ["concept 7"]
    assert wrapped("one two three four five six", 60, 11, 2)[-1].endswith("…")


def test_widths_are_those_of_the_font():
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), "tiger cat", size=100, prop={"family": "DejaVu Sans"})
    assert text_width("tiger cat", 100) == pytest.approx(path.get_extents().width, rel=0.04)


# --- layout ---------------------------------------------------------------------------------------------------


def links_of(columns, seed, density=0.5):
    generator = random(seed)
    return [
        (source, target, float(generator.gamma(0.5)))
        for left, right in combinations(range(len(columns)), 2)
        if right == left + 1 or seed % 2
        for source in columns[left]
        for target in columns[right]
        if generator.random() < density
    ]


def columns_of(*counts):
    return [[f"{layer}.{index}" for index in range(count)] for layer, count in enumerate(counts)]


def slow_crossings(columns, links):
    place = {node: (layer, index) for layer, column in enumerate(columns) for index, node in enumerate(column)}
    total = 0.0
    for (a, b, first), (c, d, second) in combinations(links, 2):
        if place[a][0] == place[c][0] and place[b][0] == place[d][0]:
            crossed = (place[a][1] - place[c][1]) * (place[b][1] - place[d][1]) < 0
            total += first * second * crossed
    return total


@pytest.mark.parametrize("seed", range(4))
def test_crossings_are_those_of_every_two_links(seed):
    columns = columns_of(5, 7, 3, 4)
    links = links_of(columns, seed)
    assert crossings(columns, links) == pytest.approx(slow_crossings(columns, links))


@pytest.mark.parametrize("seed", range(6))
def test_an_order_is_never_worse_than_the_given_one(seed):
    columns = columns_of(12, 9, 12, 2)
    links = links_of(columns, seed, 0.3)
    found = ordered(columns, links)
    assert [sorted(column) for column in found] == [sorted(column) for column in columns]
    assert crossings(found, links) < 0.8 * crossings(columns, links)
    assert found == ordered(columns, links)


def test_what_can_be_untangled_is():
    columns = columns_of(6, 6, 6)
    links = [
        (f"{layer}.{index}", f"{layer + 1}.{(5 * index + 2) % 6}", 1.0) for layer in (0, 1) for index in range(6)
    ]
    assert crossings(columns, links) > 0 and crossings(ordered(columns, links), links) == 0


def test_layers_follow_from_their_edges():
    assert layer_order([("b", "c"), ("a", "b"), ("a", "c")]) == ["a", "b", "c"]
    with pytest.raises(UsageError, match="a circle"):
        layer_order([("a", "b"), ("b", "a")])


def test_heights_stay_within_and_apart():
    columns = columns_of(1, 12, 5, 2)
    places = heights(columns, PITCH)
    assert all(PITCH / 2 <= place <= 11.5 * PITCH for place in places.values())
    for column in columns:
        assert all(gap >= PITCH - 1e-9 for gap in np.diff([places[node] for node in column]))


# --- pictures of graphs ---------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"
LONG = 'the quite unusually long name of a class, of a kind & <b>more</b> "so"'


def graph(layers, per_layer, seed=0, label="concept {}"):
    generator = random(seed)
    names = [f"blocks.{index}" for index in range(layers)]
    nodes = [
        Node(f"{name}/{index}", name, label.format(index), float(generator.normal()), ("A", "B", "")[index % 3])
        for name in names
        for index in range(per_layer)
    ]
    edges = [
        Edge(f"{first}/{i}", f"{second}/{j}", float(generator.normal()))
        for first, second in pairwise(names)
        for i in range(per_layer)
        for j in range(per_layer)
    ]
    return nodes, edges, names


def drawn(nodes, edges, layers, **options):
    picture = graph_picture(nodes, edges, layers, title="t", **options)
    return picture, ElementTree.fromstring(picture.svg)


def place_of(element):
    return tuple(float(one) for one in re.findall(r"-?[\d.]+", element.get("transform")))


@pytest.mark.parametrize(("layers", "per_layer"), [(2, 1), (2, 12), (5, 5), (8, 1), (8, 12)])
@pytest.mark.parametrize("label", ["concept {}", LONG, "W" * 40, "漢" * 30])
def test_nothing_overlaps_and_everything_is_inside(layers, per_layer, label):
    _, root = drawn(*graph(layers, per_layer, label=label))
    width, height = (float(one) for one in root.get("viewBox").split()[2:])
    boxes = [place_of(node) for node in root.iterfind(".//*[@class='node']")]
    assert len(boxes) == layers * per_layer
    for left, top in boxes:
        assert 0 <= left <= width - BOX[0] and 0 <= top <= height - BOX[1]
    for (x0, y0), (x1, y1) in combinations(boxes, 2):
        assert abs(x0 - x1) >= BOX[0] or abs(y0 - y1) >= BOX[1]
    for node in root.iterfind(".//*[@class='node']"):
        lines = node.findall(f".//{SVG}text")
        assert 1 <= len(lines) <= 2
        for line in lines:
            assert float(line.get("x")) + text_width(line.text, float(line.get("font-size"))) <= BOX[0]
            assert 10 <= float(line.get("y")) <= BOX[1] - 4
        assert node.find(f"{SVG}title").text.splitlines()[0] in {label.format(index) for index in range(per_layer)}
    # Headings and legend.
    for line in root.iterfind(f"{SVG}text"):
        middle, half = float(line.get("x")), text_width(line.text, float(line.get("font-size"))) / 2
        assert half <= middle <= width - half
    legend = [group for group in root.findall(f"{SVG}g") if group.get("transform") and group.get("class") is None]
    ends = []
    for group in legend:
        x, y = place_of(group)
        reach = max(
            float(t.get("x")) + text_width(t.text, float(t.get("font-size"))) for t in group.iter(f"{SVG}text")
        )
        assert x + reach <= width and max(top for _, top in boxes) + BOX[1] < y - 5 < height
        ends.append((y, x, x + reach))
    for (y0, left0, right0), (y1, left1, right1) in combinations(ends, 2):
        assert y0 != y1 or right0 < left1 or right1 < left0


def test_stronger_edges_are_thicker_and_bluer_and_negative_ones_another_hue():
    nodes, edges, layers = graph(3, 4)
    picture, root = drawn(nodes, edges, layers, least_share=0.0)
    paths = {(one.get("data-source"), one.get("data-target")): one for one in root.iterfind(".//*[@class='edge']")}
    assert len(paths) == len(edges) == picture.edges
    for first, second in pairwise(layers):
        pair = [one for one in edges if one.source.startswith(first) and one.target.startswith(second)]
        pair.sort(key=lambda one: abs(one.weight))
        found = [paths[one.source, one.target] for one in pair]
        for what in ("stroke-width", "stroke-opacity"):
            values = [float(one.get(what)) for one in found]
            assert values == sorted(values) and values[-1] > 2 * values[0]
        assert [one.get("stroke-dasharray") is not None for one in found] == [one.weight < 0 for one in pair]
        assert [NEGATIVE in one.get("style") for one in found] == [one.weight < 0 for one in pair]
        assert [POSITIVE in one.get("style") for one in found] == [one.weight > 0 for one in pair]
        assert f"max {abs(pair[-1].weight):.3g}" in picture.svg


def test_weak_edges_are_left_out_and_counted():
    nodes, edges, layers = graph(2, 6)
    strongest = max(abs(one.weight) for one in edges)
    weak = sum(abs(one.weight) < 0.3 * strongest for one in edges)
    picture, root = drawn(nodes, edges, layers, least_share=0.3)
    assert picture.left_out == weak > 0 and picture.edges == len(edges) - weak
    assert len(root.findall(".//*[@class='edge']")) == picture.edges
    assert f"not drawn: {weak} edges below 30%" in picture.svg
    nothing, _ = drawn(nodes, [Edge(one.source, one.target, 0.0) for one in edges], layers)
    assert (nothing.edges, nothing.left_out) == (0, len(edges))


def test_every_edge_meets_its_boxes():
    nodes, edges, layers = graph(4, 5)
    _, root = drawn([*nodes], [*edges, Edge("blocks.0/0", "blocks.3/4", 1.0)], layers, least_share=0.0)
    place = {one.get("data-node"): place_of(one) for one in root.iterfind(".//*[@class='node']")}
    paths = root.findall(".//*[@class='edge']")
    assert any(one.get("data-source") == "blocks.0/0" and one.get("data-target") == "blocks.3/4" for one in paths)
    for one in paths:
        x0, y0, *_, x1, y1 = (float(number) for number in re.findall(r"-?[\d.]+", one.get("d")))
        (left0, top0), (left1, top1) = place[one.get("data-source")], place[one.get("data-target")]
        assert x0 == pytest.approx(left0 + BOX[0], abs=0.01) and x1 == pytest.approx(left1, abs=0.01)
        assert top0 < y0 < top0 + BOX[1] and top1 < y1 < top1 + BOX[1]


def test_nodes_can_be_reached_and_told_apart_without_seeing_them():
    nodes, edges, layers = graph(2, 2)
    nodes[0] = Node("blocks.0/0", "blocks.0", LONG, 0.25, "A", "data:image/png;base64,AA==", "concept-1")
    _, root = drawn(nodes, edges, layers, name="g1")
    links = root.findall(f".//{SVG}a")
    assert [one.get("href") for one in links] == ["#concept-1"]
    assert links[0].get("aria-label") == f"{LONG}, blocks.0, attribution 0.25, A"
    others = [one for one in root.iterfind(".//*[@class='node']") if one.tag == f"{SVG}g"]
    assert len(others) == 3 and all(one.get("tabindex") == "0" and one.get("aria-label") for one in others)
    assert root.get("aria-labelledby") == "g1-title g1-told"
    assert {one.get("id") for one in root.iter() if one.get("id")} == {"g1-title", "g1-told", "g1-box"}


def test_nothing_is_loaded_and_names_stay_text():
    nodes, edges, layers = graph(2, 2, label='<script>alert(1)</script>"&')
    svg = graph_picture(nodes, edges, layers, title="</title><script>").svg
    assert "<script" not in svg and "&lt;script&gt;" in svg
    assert set(re.findall(r"https?://[^\"' ]+", svg)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"url\(([^)]*)\)", svg) == ["#graph-box"] * 4


def test_classes_come_first_among_the_colours():
    nodes = [
        Node("a", "x", "a", 1.0, "shared"),
        Node("b", "y", "b", None, "cat"),
        Node("c", "y", "c", None, "dog"),
    ]
    svg = graph_picture(nodes, [Edge("a", "b", 1.0)], ["x", "y"], title="t").svg
    groups = re.findall(r"<title>(\w+)</title><rect y", svg)
    assert groups == ["cat", "dog", "shared"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, e, la: (n, e, la[:1]), "layers: expected 2 to 8 different layers, got 1"),
        (lambda n, e, la: (n, e, [*la, "x"]), "layers: expected every layer to have nodes .* got x"),
        (lambda n, e, la: ([*n, n[0]], e, la), "expected ids of their own, got 'blocks.0/0'"),
        (
            lambda n, e, la: ([*n, *(Node(f"n{i}", la[0], "") for i in range(11))], e, la),
            "at most 12 a layer, got 13",
        ),
        (
            lambda n, e, la: ([*n, *(Node(f"n{i}", la[0], "", group=f"{i}") for i in range(9))], e, la),
            "at most 6 groups",
        ),
        (lambda n, e, la: ([*n, Node("n", la[0], "", thumbnail="http://x/y.png")], e, la), "data:image"),
        (lambda n, e, la: ([*n, Node("n", la[0], "", float("nan"))], e, la), "weight of 'n': expected a finite"),
        (
            lambda n, e, la: (n, [*e, Edge("blocks.1/0", "blocks.0/0", 1.0)], la),
            "from an earlier to a later layer",
        ),
        (lambda n, e, la: (n, [*e, Edge("blocks.0/0", "x", 1.0)], la), "the ids of two nodes"),
        (lambda n, e, la: (n, [*e, e[0]], la), "expected once, got twice"),
        (lambda n, e, la: (n, [Edge("blocks.0/0", "blocks.1/0", float("inf"))], la), "expected a finite weight"),
    ],
)
def test_a_graph_that_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        graph_picture(*change(*graph(2, 2)), title="t")


@pytest.mark.parametrize("least_share", [-0.1, 1.0])
def test_a_least_share_out_of_range_is_refused(least_share):
    with pytest.raises(UsageError, match="least_share"):
        graph_picture(*graph(2, 2), title="t", least_share=least_share)
