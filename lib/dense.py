"""Dense layers of other classes than ``nn.Linear``, known by what they compute.

GPT-2's ``Conv1D`` is one: its weight is [inputs, outputs]. Folding puts an ``nn.Linear`` in the
place of each, so that all else (rules, moments, refits, quantizers) sees units as rows.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .inputs import HALVES, owners

ROWS = 2  # inputs on which a layer is tried


def dense_layers(model: nn.Module) -> dict[str, bool]:
    """Modules that compute ``x W (+ b)`` or ``x Wᵀ (+ b)`` and are no ``nn.Linear``.

    Parameters
    ----------
    model : nn.Module
        Any network; not run as a whole, and not changed.

    Returns
    -------
    dict of str to bool
        Module path -> whether its ``weight`` is turned, that is [inputs, outputs]. A module that
        has other parameters than ``weight`` [.., ..] and ``bias`` [outputs], buffers, children
        or hooks, or whose weight another module has too, is absent, as are torch's own.
    """
    owned, found = owners(model), {}
    for path, module in model.named_modules():
        if path and _may_be_dense(module) and owned[id(module.weight)] == 1:
            turned = _turned(module)
            if turned is not None:
                found[path] = turned
    return found


def as_linear(network: nn.Module, layers: Mapping[str, bool]) -> nn.Module:
    """Put an ``nn.Linear`` in place of these modules, wherever they stand; changes the network."""
    places = [(p, m) for p, m in network.named_modules(remove_duplicate=False) if p]
    for path, turned in layers.items():
        old = network.get_submodule(path)
        weight, bias = old._parameters["weight"], old._parameters.get("bias")
        assert weight is not None
        rows = weight.detach().mT.contiguous() if turned else weight.detach()  # [outputs, inputs]
        linear = nn.Linear(rows.shape[1], rows.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(rows, weight.requires_grad)
        if bias is not None:
            linear.bias = bias
        linear.train(old.training)
        for place, module in places:
            if module is old:
                network.set_submodule(place, linear)
    return network


def _may_be_dense(module: nn.Module) -> bool:
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (
        not type(module).__module__.startswith("torch.")
        and not isinstance(module, (nn.Linear, nn.Embedding))
        and parameters.keys() <= {"weight", "bias"}
        and weight is not None and weight.dim() == 2 and weight.is_floating_point()
        and (bias is None or (bias.dim() == 1 and len(bias) in weight.shape))
        and not (module._modules or module._buffers)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )  # fmt: skip


def _turned(module: nn.Module) -> bool | None:
    """Whether it computes ``x W + b``, not ``x Wᵀ + b``; None if neither, or both."""
    tried = copy.copy(module)  # shares the weight; what its forward keeps stays here
    tried.__dict__["training"] = False
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    near = 0.05 if weight.dtype in HALVES else 1e-3
    answers = []
    for turned, matrix in ((True, weight), (False, weight.mT)):  # [inputs, outputs]
        x = torch.randn(ROWS, len(matrix), generator=generator).to(weight)
        if bias is not None and len(bias) != matrix.shape[1]:
            continue
        try:
            with torch.no_grad():
                given, wanted = tried.forward(x.clone()), x @ matrix.detach()
        except Exception:  # a forward of which nothing is known raises anything
            continue
        wanted = wanted if bias is None else wanted + bias.detach()
        if isinstance(given, Tensor) and given.shape == wanted.shape:
            atol = near * float(wanted.abs().max())
            answers += [turned] * torch.allclose(given, wanted, rtol=near, atol=atol)
    return answers[0] if len(answers) == 1 else None
