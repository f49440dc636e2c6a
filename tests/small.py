"""Networks and images small enough for tests of what users hand in."""

import torch
from torch import nn


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def small_data(samples=60):
    torch.manual_seed(1)
    return torch.randn(samples, 20), torch.arange(samples) % 4


class Tied(nn.Module):
    """One weight for what reads tokens and for what tells them."""

    def __init__(self, tokens=50, width=32):
        super().__init__()
        self.e, self.f = nn.Embedding(tokens, width), nn.Linear(width, tokens, bias=False)
        self.f.weight = self.e.weight

    def forward(self, t):
        return self.f(self.e(t).mean(1))


class Doubled(nn.Module):
    """A parametrization: what is computed is twice what is stored."""

    def forward(self, stored):
        return 2 * stored


class Forwarded(nn.Module):
    """Linear layers without biases, layers that a test adds, and a forward pass that it writes."""

    sizes: dict[str, tuple[int, int]] = {}  # by name inputs and units

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(0)
        for name, (inputs, units) in self.sizes.items():
            setattr(self, name, nn.Linear(inputs, units, bias=False))
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.way = forward

    def forward(self, x):
        return self.way(self, x)


def outputs(network, images):
    """What a network gives in evaluation mode."""
    with torch.no_grad():
        return network.eval()(images)
