"""Second moments of layers' inputs against explicit patches, gathered position by position."""

import pytest
import torch
from patches import rows
from torch import nn

from lib.moments import input_moments


def test_moments_are_means_over_images_of_sums_over_positions(layer_case):
    layer, images, _ = layer_case
    model = nn.Sequential(layer)
    plain = input_moments(model, images)["0.weight"]
    centered = input_moments(model, images, centered=True)["0.weight"]
    groups = getattr(layer, "groups", 1)
    for group in range(groups):
        inputs = rows(layer, images, group * len(layer.weight) // groups)
        moment = torch.einsum("npi,npj->ij", inputs, inputs) / len(images)
        found = plain if groups == 1 else plain[group]
        assert torch.allclose(found.double(), moment, atol=1e-4)
        if layer.bias is not None:
            inputs = inputs - inputs.mean((0, 1))
            moment = torch.einsum("npi,npj->ij", inputs, inputs) / len(images)
            found = centered if groups == 1 else centered[group]
            assert torch.allclose(found.double(), moment, atol=1e-4)
        else:
            assert torch.allclose(centered, plain, atol=1e-4)


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.unused, self.head = (
            nn.ConvTranspose2d(1, 2, 2),
            nn.Linear(2, 2),
            nn.Linear(2, 3),
        )

    def forward(self, x):
        return self.head(self.up(x).mean((2, 3)))


def test_unused_layers_are_absent(references):
    model = Partly()
    assert list(input_moments(model, references[0])) == ["up.weight", "head.weight"]
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_unusable_images():
    model, images = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="no (reference )?images"):
        input_moments(model, images[:0])
    with pytest.raises(ValueError, match="not finite|NaN"):
        input_moments(model, images / 0)


def test_inputs_that_do_not_vary_borrow_a_little_of_their_own_size():
    """What float32 leaves of a difference of equal numbers has either sign, and is no moment."""
    images = (torch.randn(1, 9).abs() + 1).expand(700, 9) / 3
    layer = nn.Sequential(nn.Linear(9, 2))
    with pytest.warns(UserWarning, match="700 reference images cannot tell.*'0'"):
        moment = input_moments(layer, images, centered=True)["0.weight"]
    torch.testing.assert_close(moment, 1e-4 * input_moments(layer, images)["0.weight"])
