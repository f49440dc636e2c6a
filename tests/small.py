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
