"""RISE's masks against scikit-image's enlargement, which the authors' published code calls."""

from __future__ import annotations

import torch
from skimage.transform import resize
from torch import Tensor

from xai_core.attribution.perturbation.rise import RiseOptions, SmallMasks

OPTIONS = RiseOptions(masks=12, grid=7)
SIZE = (224, 160)


def drawn() -> tuple[SmallMasks, Tensor]:
    draw = SmallMasks.draw(OPTIONS, SIZE, torch.device("cpu"))
    return draw, draw.enlarge(slice(0, OPTIONS.masks))


def peers_mask(draw: SmallMasks, index: int, mode: str) -> Tensor:
    """Cells of ceil(side / s) pixels, one more than the image needs, enlarged and cut at the drawn shift."""
    cells = draw.cells[index].double().numpy()
    large = resize(cells, (8 * 32, 8 * 23), order=1, mode=mode, anti_aliasing=False)
    down, right = int(draw.down[index]), int(draw.right[index])
    return torch.from_numpy(large[down : down + SIZE[0], right : right + SIZE[1]])


def test_masks_are_scikit_images_linear_enlargement() -> None:
    draw, masks = drawn()
    for index, mask in enumerate(masks):
        torch.testing.assert_close(mask, peers_mask(draw, index, "edge"), rtol=1e-9, atol=1e-9)


def test_the_published_code_differs_within_half_a_cell_of_the_border() -> None:
    """It mirrors the cells at the border where ours, as torch's linear interpolation does, repeats the last."""
    draw, masks = drawn()
    for index, mask in enumerate(masks):
        mirrored = peers_mask(draw, index, "reflect")
        down, right = int(draw.down[index]), int(draw.right[index])
        inner = (slice(max(0, 19 - down), 237 - down), slice(max(0, 14 - right), 170 - right))
        torch.testing.assert_close(mask[inner], mirrored[inner], rtol=1e-9, atol=1e-9)
        assert torch.corrcoef(torch.stack([mask.flatten(), mirrored.flatten()]))[0, 1] > 0.95
    assert any(not torch.allclose(mask, peers_mask(draw, index, "reflect")) for index, mask in enumerate(masks))
