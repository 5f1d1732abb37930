from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.parts import NO_PART, parse_parts, part_areas, part_boxes, part_counts
from xai_core.parts.features import position_features
from xai_core.parts.grid import grid_shape
from xai_core.parts.labels import compact
from xai_core.parts.mask_files import MaskOptions
from xai_core.parts.merge import merge_fragments
from xai_core.parts.positions import enlarge
from xai_core.parts.slic import SlicOptions
from xai_core.parts.tokens import TokenOptions
from xai_core.registry import parsers

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LEARNT = ("tokens", "spectral")
UNMASKED = (*LEARNT, "slic", "grid")

label_maps = arrays(
    np.int64,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([0, 1, 2, 3, NO_PART]),
)
thresholds = st.sampled_from([0.0, 0.04, 0.1, 0.25, 0.6])


def random_model(name: str, **create_args: object) -> Classifier:
    return load_classifier(
        ModelSpec(name, pretrained=False, create_args=create_args, transform={"input_size": (3, 64, 64)})
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vit() -> Classifier:
    return random_model("vit_tiny_patch16_224", img_size=64, patch_size=8)


@pytest.fixture(scope="module")
def cnn() -> Classifier:
    return random_model("resnet18")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth coloured blobs: white noise would give superpixels nothing to follow."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic")


def components(labels: np.ndarray) -> list[tuple[int, list[tuple[int, int]]]]:
    """The 4-connected components by flood fill, in reading order: label and pixels of each."""
    height, width = labels.shape
    seen = np.zeros(labels.shape, dtype=bool)
    found = []
    for start in np.ndindex(height, width):
        if seen[start]:
            continue
        seen[start] = True
        pixels, stack = [], [start]
        while stack:
            y, x = stack.pop()
            pixels.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if inside and not seen[near] and labels[near] == labels[start]:
                    seen[near] = True
                    stack.append(near)
        found.append((int(labels[start]), pixels))
    return found


def slow_merge(labels: np.ndarray, min_area: float) -> np.ndarray:
    """The definition word by word: one merge, then everything is looked at afresh."""
    labels = labels.copy()
    while True:
        found = components(labels)
        owner = {pixel: index for index, (_, pixels) in enumerate(found) for pixel in pixels}
        parts = [index for index, (label, _) in enumerate(found) if label != NO_PART]
        small = [index for index in parts if len(found[index][1]) < min_area * labels.size]
        if not small or len(parts) == 1:
            return labels
        fragment = min(small, key=lambda index: (len(found[index][1]), found[index][0], index))
        border: dict[int, int] = {}
        for y, x in found[fragment][1]:
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if owner.get(near, fragment) != fragment:
                    border[owner[near]] = border.get(owner[near], 0) + 1
        candidates = [index for index in border if found[index][0] != NO_PART] or list(border)
        target = min(candidates, key=lambda index: (-border[index], found[index][0], index))
        for pixel in found[fragment][1]:
            labels[pixel] = found[target][0]


class TestMerging:
    @settings(max_examples=400, deadline=None)
    @given(label_maps, thresholds)
    def test_agrees_with_the_definition(self, labels: np.ndarray, min_area: float) -> None:
        assert np.array_equal(merge_fragments(labels, min_area), slow_merge(labels, min_area))

    @settings(max_examples=100, deadline=None)
    @given(label_maps, thresholds)
    def test_leaves_no_fragment_but_the_last_part(self, labels: np.ndarray, min_area: float) -> None:
        merged = merge_fragments(labels, min_area)
        sizes = [len(pixels) for label, pixels in components(merged) if label != NO_PART]
        assert len(sizes) <= 1 or min(sizes) >= min_area * labels.size

    @settings(max_examples=100, deadline=None)
    @given(label_maps, thresholds)
    def test_neither_invents_labels_nor_takes_pixels_from_no_part(
        self, labels: np.ndarray, min_area: float
    ) -> None:
        merged = merge_fragments(labels, min_area)
        assert merged.shape == labels.shape
        assert set(np.unique(merged)) <= set(np.unique(labels))
        assert (merged[labels == NO_PART] == NO_PART).all()
        assert (merged != NO_PART).any() == (labels != NO_PART).any()

    @settings(max_examples=100, deadline=None)
    @given(label_maps, thresholds)
    def test_a_second_time_changes_nothing(self, labels: np.ndarray, min_area: float) -> None:
        once = merge_fragments(labels, min_area)
        assert np.array_equal(merge_fragments(once, min_area), once)

    def test_a_fragment_goes_where_its_border_is_longest(self) -> None:
        labels = np.array([[0, 0, 1], [0, 2, 1], [0, 0, 1]])
        assert merge_fragments(labels, 0.2).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]

    def test_a_fragment_prefers_a_part_to_no_part(self) -> None:
        labels = np.array([[NO_PART, NO_PART, NO_PART], [NO_PART, 2, 1], [NO_PART, NO_PART, 1]])
        assert merge_fragments(labels, 0.2)[1, 1] == 1

    def test_a_lone_tiny_part_stays(self) -> None:
        labels = np.full((9, 9), NO_PART)
        labels[4, 4] = 3
        assert np.array_equal(merge_fragments(labels, 0.5), labels)

    def test_the_largest_of_tiny_parts_stays(self) -> None:
        labels = np.full((9, 9), NO_PART)
        labels[1, 1], labels[5, 5:7] = 3, 4
        assert np.unique(merge_fragments(labels, 0.5)).tolist() == [4, NO_PART]

    def test_noise_of_the_size_of_a_photograph(self) -> None:
        labels = np.random.default_rng(0).integers(0, 12, (224, 224))
        sizes = [len(pixels) for _, pixels in components(merge_fragments(labels, 0.005))]
        assert min(sizes) >= 0.005 * labels.size


class TestLabels:
    @settings(max_examples=100, deadline=None)
    @given(label_maps)
    def test_compact_names_follow_reading_order(self, labels: np.ndarray) -> None:
        named = compact(labels)
        met = list(dict.fromkeys(value for value in named.ravel().tolist() if value != NO_PART))
        assert met == list(range(len(met)))
        assert np.array_equal(named == NO_PART, labels == NO_PART)
        assert all(len(np.unique(labels[named == part])) == 1 for part in met)

    @settings(max_examples=50, deadline=None)
    @given(arrays(np.uint8, (2, 5, 7), elements=st.sampled_from([0, 1, 2, NO_PART])))
    def test_areas_and_boxes_are_what_counting_gives(self, labels: np.ndarray) -> None:
        areas = part_areas(torch.from_numpy(labels), 4)
        boxes = part_boxes(torch.from_numpy(labels), 4)
        for image, part in np.ndindex(2, 4):
            y, x = np.nonzero(labels[image] == part)
            expected = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0]
            assert areas[image, part] == len(x)
            assert boxes[image, part].tolist() == expected

    def test_counts(self) -> None:
        labels = torch.tensor([[[0, 1], [2, NO_PART]], [[NO_PART] * 2] * 2], dtype=torch.uint8)
        assert part_counts(labels).tolist() == [3, 0]

    def test_enlarging_to_the_same_size_changes_nothing(self) -> None:
        labels = np.random.default_rng(0).integers(0, 9, (14, 10))
        assert np.array_equal(enlarge(labels, (14, 10)), labels)

    def test_enlarging_halves_keeps_halves(self) -> None:
        labels = enlarge(np.array([[5, 2], [5, 2]]), (6, 8))
        assert (labels[:, :4] == 5).all()
        assert (labels[:, 4:] == 2).all()


class TestFeatures:
    def test_tokens_are_the_patch_tokens(self, vit: Classifier, images: torch.Tensor) -> None:
        features = position_features(vit, images)
        tokens = vit.module.forward_features(images)[:, vit.num_prefix_tokens :]
        expected = torch.nn.functional.normalize(tokens, dim=-1).reshape(3, 8, 8, -1)
        torch.testing.assert_close(features, expected)

    def test_a_map_is_the_deepest_with_enough_positions(self, cnn: Classifier, images: torch.Tensor) -> None:
        features = position_features(cnn, images)
        assert features.shape == (3, 16, 16, 64)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 16, 16))

    def test_small_images_use_the_finest_map(self, cnn: Classifier, images: torch.Tensor) -> None:
        assert position_features(cnn, images[..., :16, :16]).shape[1:3] == (8, 8)

    def test_batch_size_does_not_matter(self, cnn: Classifier, images: torch.Tensor) -> None:
        torch.testing.assert_close(
            position_features(cnn, images, batch_size=1), position_features(cnn, images, batch_size=3)
        )

    def test_a_backbone_sees_pictures_in_its_own_space(self, cnn: Classifier, images: torch.Tensor) -> None:
        spec = ModelSpec(
            "vit_tiny_patch16_224",
            pretrained=False,
            create_args={"img_size": 96, "num_classes": 0},
            transform={"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)},
        )
        backbone = load_classifier(spec)
        seen = []
        handle = backbone.module.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        labels = parse_parts(cnn, images, k=5, backbone=backbone)
        handle.remove()
        assert labels.shape == (3, 64, 64)
        assert seen[-1].shape == (3, 3, 96, 96)
        shown = backbone.denormalise(seen[-1])
        torch.testing.assert_close(
            shown.mean(dim=(2, 3)), cnn.denormalise(images).mean(dim=(2, 3)), atol=2e-2, rtol=0
        )


class TestParsers:
    @pytest.mark.parametrize("parser", UNMASKED)
    @pytest.mark.parametrize("family", ["vit", "cnn"])
    def test_labels_are_compact_and_cover_the_image(
        self, parser: str, family: str, images: torch.Tensor, request: pytest.FixtureRequest
    ) -> None:
        model = request.getfixturevalue(family)
        labels = parse_parts(model, images, parser=parser, k=6)
        assert labels.dtype == torch.uint8
        assert labels.shape == (3, 64, 64)
        for one, count in zip(labels, part_counts(labels).tolist(), strict=True):
            assert 2 <= count <= 6
            assert torch.unique(one).tolist() == list(range(count))

    @pytest.mark.parametrize("parser", UNMASKED)
    def test_an_image_is_parsed_as_if_alone(self, parser: str, vit: Classifier, images: torch.Tensor) -> None:
        together = parse_parts(vit, images, parser=parser, k=6, seed=3)
        alone = torch.cat([parse_parts(vit, one[None], parser=parser, k=6, seed=3) for one in images])
        assert torch.equal(together, alone)

    @pytest.mark.parametrize("parser", LEARNT)
    def test_the_global_generators_are_neither_read_nor_moved(
        self, parser: str, vit: Classifier, images: torch.Tensor
    ) -> None:
        np.random.seed(1)
        state = np.random.get_state()[1].copy()
        first = parse_parts(vit, images, parser=parser, k=6)
        assert np.array_equal(state, np.random.get_state()[1])
        np.random.seed(2)
        assert torch.equal(first, parse_parts(vit, images, parser=parser, k=6))

    @pytest.mark.parametrize("parser", UNMASKED)
    def test_one_part_is_the_whole_image(self, parser: str, vit: Classifier, images: torch.Tensor) -> None:
        assert (parse_parts(vit, images, parser=parser, k=1) == 0).all()

    @pytest.mark.parametrize("parser", LEARNT)
    def test_as_many_parts_as_positions(self, parser: str, vit: Classifier, images: torch.Tensor) -> None:
        labels = parse_parts(vit, images[:1], parser=parser, k=64, min_area=0)
        assert part_counts(labels).tolist() == [64]
        assert (labels[0] == parse_parts(vit, images[:1], parser="grid", k=64, min_area=0)[0]).all()

    @pytest.mark.parametrize("parser", UNMASKED)
    def test_an_image_of_one_colour_is_no_error(self, parser: str, cnn: Classifier) -> None:
        labels = parse_parts(cnn, torch.zeros(1, 3, 64, 64), parser=parser, k=12)
        assert 1 <= part_counts(labels).item() <= 12

    def test_token_clusters_follow_the_features(self, vit: Classifier, images: torch.Tensor) -> None:
        """A picture of two flat halves has tokens of two kinds, if place is taken out of them."""
        vit_without_place = random_model("vit_tiny_patch16_224", img_size=64, patch_size=8, pos_embed="none")
        halves = torch.zeros(1, 3, 64, 64)
        halves[..., 32:] = 1.5
        labels = parse_parts(vit_without_place, halves, k=2)
        assert (labels[..., :32] == 0).all()
        assert (labels[..., 32:] == 1).all()

    @pytest.mark.parametrize("k", [3, 12, 40, 254])
    def test_superpixels_never_exceed_k(self, k: int, vit: Classifier) -> None:
        noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        labels = parse_parts(
            vit, noise, parser="slic", k=k, min_area=0, options=SlicOptions(compactness=0.1, sigma=0)
        )
        assert part_counts(labels).item() <= k


class TestGrid:
    def test_sixty_four_cells_are_eight_by_eight(self, vit: Classifier, images: torch.Tensor) -> None:
        labels = parse_parts(vit, images, parser="grid", k=64)
        cell = torch.arange(64) // 8
        assert (labels == cell[:, None] * 8 + cell).all()
        assert (part_areas(labels, 64) == 64).all()

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 254), st.integers(20, 90), st.integers(20, 90))
    def test_shapes_have_exactly_k_cells(self, k: int, height: int, width: int) -> None:
        try:
            rows, columns = grid_shape(k, height, width)
        except UsageError:
            assert all(k % rows or rows > height or k // rows > width for rows in range(1, k + 1))
            return
        assert rows * columns == k
        assert rows <= height
        assert columns <= width

    @pytest.mark.parametrize(("k", "shape"), [(12, (3, 4)), (1, (1, 1)), (7, (1, 7)), (36, (6, 6))])
    def test_cells_are_as_square_as_divisors_allow(self, k: int, shape: tuple[int, int]) -> None:
        assert grid_shape(k, 224, 224) == shape

    def test_a_tall_image_has_more_rows(self) -> None:
        assert grid_shape(12, 300, 200) == (4, 3)


class TestMasks:
    def test_every_value_is_a_part_and_ignored_ones_are_none(self, vit: Classifier, images: torch.Tensor) -> None:
        masks = torch.zeros(3, 64, 64, dtype=torch.int64)
        masks[0, :32], masks[0, 32:, :32] = 900, -4
        masks[1, 10:40] = NO_PART
        labels = parse_parts(vit, images, parser="masks", masks=masks)
        assert part_counts(labels).tolist() == [2, 1, 0]
        assert (labels[0, :32] == 0).all()
        assert (labels[0, 32:, :32] == 1).all()
        assert (labels[0, 32:, 32:] == NO_PART).all()
        assert torch.equal(labels[1] == 0, masks[1] == NO_PART)
        assert (labels[2] == NO_PART).all()

    def test_the_caller_says_what_is_ignored(self, vit: Classifier, images: torch.Tensor) -> None:
        masks = torch.arange(3, dtype=torch.uint8).repeat_interleave(64 * 64).reshape(3, 64, 64)
        labels = parse_parts(vit, images, parser="masks", masks=masks, options=MaskOptions(ignore=(1, 2)))
        assert part_counts(labels).tolist() == [1, 0, 0]

    def test_more_values_than_a_byte_holds_are_refused(self, vit: Classifier, images: torch.Tensor) -> None:
        masks = torch.arange(64 * 64).reshape(1, 64, 64)
        with pytest.raises(UsageError, match="at most 254 parts in an image, got 4095"):
            parse_parts(vit, images[:1], parser="masks", masks=masks)


class TestErrors:
    def test_parsers_tell_of_themselves(self) -> None:
        assert {*UNMASKED, "masks"} <= set(parsers.names())
        assert all(entry.summary and entry.paper for entry in parsers)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"parser": "tokns"}, "did you mean 'tokens'"),
            ({"k": 0}, "expected 1 to 254 .* got 0"),
            ({"k": 255}, "expected 1 to 254 .* got 255"),
            ({"k": 65}, "at most 64, the positions of a 8 x 8 feature map, got 65"),
            ({"parser": "spectral", "k": 65}, "at most 64"),
            ({"parser": "grid", "k": 127}, "127; choose another"),
            ({"min_area": 1.0}, "below 1, got 1.0"),
            ({"min_area": float("nan")}, "got nan"),
            ({"parser": "grid", "options": TokenOptions()}, "expected NoOptions .* got TokenOptions"),
            ({"parser": "masks"}, r"expected masks of shape \(3, 64, 64\), got none"),
            (
                {"parser": "masks", "masks": torch.zeros(3, 32, 32).long()},
                r"got torch.int64 of shape \(3, 32",
            ),
            ({"parser": "masks", "masks": torch.zeros(3, 64, 64)}, "integer masks .* got torch.float32"),
        ],
    )
    def test_bad_requests(
        self, wrong: dict[str, object], message: str, vit: Classifier, images: torch.Tensor
    ) -> None:
        with pytest.raises(UsageError, match=message):
            parse_parts(vit, images, **wrong)

    def test_an_image_with_fewer_pixels_than_superpixels(self, cnn: Classifier) -> None:
        with pytest.raises(UsageError, match="pixels of a 8 x 8 image"):
            parse_parts(cnn, torch.zeros(1, 3, 8, 8), parser="slic", k=65)


@pytest.fixture(scope="module")
def deit() -> Classifier:
    checkpoint = SHARED / "models" / "deit_tiny_patch16_224.safetensors"
    if not checkpoint.is_file():
        pytest.skip(f"no real DeiT-tiny weights at {checkpoint}")
    return load_classifier(ModelSpec("deit_tiny_patch16_224", checkpoint=str(checkpoint)))


@pytest.fixture(scope="module")
def pets(deit: Classifier) -> tuple[torch.Tensor, torch.Tensor]:
    """A few photographs of pets and where the animal is."""
    pictures = sorted((SHARED / "pets" / "images").glob("*/*.jpg"))[::60]
    if not pictures:
        pytest.skip(f"no photographs at {SHARED / 'pets'}")
    trimaps = [SHARED / "pets" / "trimaps" / one.parent.name / f"{one.stem}.png" for one in pictures]
    return (
        torch.stack([deit.preprocess(Image.open(one)) for one in pictures]),
        torch.stack([deit.preprocess_mask(Image.open(one).convert("L")) for one in trimaps]),
    )


@pytest.mark.shared
class TestRealPhotographs:
    @pytest.mark.parametrize("parser", LEARNT)
    def test_parts_tell_animal_from_background(
        self, parser: str, deit: Classifier, pets: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Naming every part by its majority must name more pixels rightly than a grid of as many cells."""
        images, trimaps = pets
        agreement = [
            _majority_agreement(parse_parts(deit, images, parser=name, k=12), trimaps == 1)
            for name in (parser, "grid")
        ]
        assert agreement[0] > agreement[1]

    def test_an_image_is_parsed_as_if_alone(
        self, deit: Classifier, pets: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        images, _ = pets
        together = parse_parts(deit, images)
        assert torch.equal(together, torch.cat([parse_parts(deit, one[None]) for one in images]))

    def test_trimaps_are_parts(self, deit: Classifier, pets: tuple[torch.Tensor, torch.Tensor]) -> None:
        images, trimaps = pets
        labels = parse_parts(
            deit, images, parser="masks", masks=trimaps, min_area=0, options=MaskOptions(ignore=(2, 3))
        )
        assert torch.equal(labels == 0, trimaps == 1)


def _majority_agreement(labels: torch.Tensor, animal: torch.Tensor) -> float:
    inside = torch.stack([(part & animal).sum() for part in _parts(labels)])
    total = torch.stack([part.sum() for part in _parts(labels)])
    return float(torch.maximum(inside, total - inside).sum() / total.sum())


def _parts(labels: torch.Tensor) -> list[torch.Tensor]:
    image = torch.arange(len(labels)).view(-1, 1, 1)
    flat = image * 256 + labels
    return [flat == value for value in torch.unique(flat)]


def test_a_mask_follows_its_image_and_a_border_belongs_to_nothing() -> None:
    """A mask is cut as its image is; where the geometry adds a border, the mask says 255 there."""
    transform = {"input_size": (3, 32, 32), "crop_mode": "border", "crop_pct": 1.0}
    model = load_classifier(
        ModelSpec("vit_tiny_patch16_224", False, create_args={"img_size": 32}, transform=transform)
    )
    values = np.zeros((32, 16), np.uint8)
    values[:16] = 7
    mask = model.preprocess_mask(Image.fromarray(values))
    assert mask.shape == (32, 32)
    assert set(mask[:, 8:24].unique().tolist()) == {0, 7}
    assert set(mask[:, :8].unique().tolist()) == {255}
    assert set(mask[:, 24:].unique().tolist()) == {255}
