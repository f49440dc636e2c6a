"""Layers of all shapes, and what each of their units reads, gathered position by position."""

import copy

import torch
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear over tokens": (lambda: nn.Linear(7, 5), (3, 7)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "stride, dilation": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        (2, 8, 7),
    ),
    "same, circular": (
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
        (2, 5, 5),
    ),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
}


def rows(layer, images, unit):
    """Inputs [N, positions, d] of one unit, from the layer's derivative by its weights."""
    probe = copy.deepcopy(layer).double()
    probe.weight.data.zero_()
    columns = []
    for index in range(probe.weight[unit].numel()):
        probe.weight.data[unit].view(-1)[index] = 1
        output = probe(images.double()) - (0 if probe.bias is None else probe(images.double() * 0))
        dim = -1 if isinstance(layer, nn.Linear) else 1
        columns.append(output.select(dim, unit).reshape(len(images), -1))
        probe.weight.data.zero_()
    return torch.stack(columns, 2).detach()
