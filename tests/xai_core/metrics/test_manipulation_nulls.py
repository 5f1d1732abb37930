"""What the attack on explanations cannot attack is null, with the reason."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.xai_core.attribution.relu_networks import relu_resnet
from tests.xai_core.metrics.explaining import corner, explained, linear, measured, root
from tests.xai_core.metrics.test_manipulation import NAMES, STEPS, valid_pictures
from tests.xai_core.tiny import tiny_cnn, tiny_vit
from xai_core.metrics.robustness.attack import Attack, AttackOptions


def test_explanations_without_a_derivative_are_null() -> None:
    model = tiny_vit()
    images, targets = valid_pictures(2, model)
    for method, options in (("occlusion", {"window": 16, "stride": 16}), ("attention_rollout", {})):
        for name in NAMES:
            values, reasons = measured(explained(model, images, targets, method, **options), name)
            assert values.isnan().all()
            assert set(reasons) == {"the explanation cannot be differentiated"}


def test_a_network_without_second_derivatives_is_null() -> None:
    model = tiny_vit()
    images, targets = valid_pictures(2, model)
    for block in model.module.blocks:
        block.attn.forward = lambda x, **_: F.scaled_dot_product_attention(x, x, x)
    values, reasons = measured(explained(model, images, targets, "gradient"), "manipulation_pcc")
    assert values.isnan().all()
    assert set(reasons) == {"the explanation cannot be differentiated"}


def test_what_cannot_be_paired_or_compared_is_null() -> None:
    model = tiny_cnn()
    images, targets = valid_pictures(4, model)
    evidence = explained(model, images, torch.tensor([1, 1, 1, 1]), "gradient")
    assert set(measured(evidence, "manipulation_ssim")[1]) == {"no other image with another class"}
    evidence = explained(model, images, targets, "input_x_gradient")
    evidence.maps[1] = 0.5 * evidence.maps[1].sign()
    evidence.maps[2, 3, 3] = torch.nan
    for name in NAMES:
        values, reasons = measured(evidence, name, max_steps=2)
        assert reasons == (None, "the map is constant", "the map is not finite", None)
        assert values.isnan().tolist() == [False, True, True, False]


def test_a_map_that_does_not_move_is_null_and_not_robust() -> None:
    for model, beta in ((relu_resnet(), None), (linear(), 30.0)):
        images, _ = valid_pictures(2, model)
        evidence = explained(model, images, torch.tensor([0, 1]), "gradient")
        values, reasons = measured(evidence, "manipulation_ssim", softplus_beta=beta)
        assert set(reasons) == {"the map's derivative is zero"}
        assert values.isnan().all()


def test_a_derivative_that_is_not_finite_is_null() -> None:
    model = corner(root)
    images, _ = valid_pictures(2, model)
    images[:, 0, 0, 0] = -0.5
    evidence = explained(model, images, torch.tensor([0, 1]), "gradient")
    evidence.maps[:] = torch.rand(evidence.maps.shape, generator=torch.Generator().manual_seed(0))
    _, reasons = measured(evidence, "manipulation_pcc")
    assert reasons[0] == "the map's derivative is not finite"


def test_flips_are_null() -> None:
    model = tiny_cnn()
    images, targets = valid_pictures(2, model)
    evidence = explained(model, images, targets, "gradient")
    assert evidence.explainer is not None
    loose = AttackOptions(max_steps=STEPS, logit_weight=0.0)
    moved = Attack(model, evidence.explainer, loose).run(images, targets, evidence.maps.flip(0)).images
    with torch.no_grad():
        before, after = model(images)[0], model(moved)[0]
        # A rival is put so close behind that what it gains when nothing holds the logits suffices. No slope knows.
        top = int(before.argmax())
        gain = (after - before) - (after - before)[top]
        rival = int(gain.argmax())
        model.module.fc.bias[rival] += before[top] - before[rival] - gain[rival] / 2
    for name in NAMES:
        _, reasons = measured(evidence, name, max_steps=STEPS, logit_weight=0.0)
        assert reasons[0] == "the attack flips the prediction"
        assert measured(evidence, name, max_steps=STEPS)[1][0] is None
