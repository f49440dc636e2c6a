"""Which BatchNorm belongs to which layer: read off the modules' order in a forward pass."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .inputs import copied, evaluated, owners, probed

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batchnorm_pairs(model: nn.Module, images: Tensor | None = None) -> dict[str, str]:
    """Find each BatchNorm that can be folded and the layer it belongs to.

    Parameters
    ----------
    model : nn.Module
        Any network; a copy of it is traced symbolically. Where that fails, a BatchNorm is paired
        with the layer whose output it reads for some images; without images, only neighbours
        inside an ``nn.Sequential`` are paired.
    images : Tensor [samples, ...], optional
        As the model takes them.

    Returns
    -------
    dict of str to str
        Module path of the BatchNorm -> path of the linear or convolution layer whose only reader
        it is. A BatchNorm without running statistics, behind a layer used twice, behind one whose
        weight is shared or computed (a parametrization), or behind anything else, is absent.
    """
    return found_pairs(model, images)[0]


def found_pairs(model: nn.Module, images: Tensor | None = None) -> tuple[dict[str, str], bool]:
    """``batchnorm_pairs``; whether they are read off the whole graph, and so hold for any image."""
    modules = dict(model.named_modules())
    if not any(isinstance(module, BATCHNORMS) for module in modules.values()):
        return {}, True
    every = [module for _, module in model.named_modules(remove_duplicate=False)]
    places = Counter(id(module) for module in every)
    owned = owners(model)
    sure = True
    try:
        # A copy, since a forward that keeps what it computed would keep the tracer's objects.
        candidates = _traced_pairs(evaluated(copied(model)))
    except Exception:  # a forward with data-dependent control flow fails in ways of its own
        sure = False
        candidates = _sequential_pairs(model) if images is None else _met_pairs(model, images)

    def foldable(layer: nn.Module, norm: nn.Module) -> bool:
        if not isinstance(layer, FOLDABLE) or not isinstance(norm, BATCHNORMS):
            return False
        weight = layer._parameters.get("weight")
        return (
            norm.track_running_stats
            and weight is not None
            and owned[id(weight)] == 1
            and places[id(layer)] == places[id(norm)] == 1
            and not (is_parametrized(layer) or is_parametrized(norm))
            and not (isinstance(layer, TRANSPOSED) and layer.groups > 1)
            and norm.num_features == weight.shape[isinstance(layer, TRANSPOSED)]
        )

    pairs = {
        norm: layer
        for layer, norm in candidates
        if layer in modules and norm in modules and foldable(modules[layer], modules[norm])
    }
    return pairs, sure


class _Tracer(fx.Tracer):
    """Does not look into BatchNorms with an activation of their own, as timm has them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BATCHNORMS) or super().is_leaf_module(m, module_qualified_name)


def _traced_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of modules and of the BatchNorm that alone reads each, both called once."""
    modules = dict(model.named_modules())
    every = list(_Tracer().trace(model).nodes)
    nodes = [node for node in every if node.op == "call_module"]
    read = {str(node.target).rpartition(".")[0] for node in every if node.op == "get_attr"}
    calls = Counter(node.target for node in nodes)
    return [
        (str(node.args[0].target), str(node.target))
        for node in nodes
        if isinstance(modules[node.target], BATCHNORMS)
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "call_module"
        and len(node.args[0].users) == 1
        and calls[node.target] == calls[node.args[0].target] == 1
        and not read & {str(node.target), str(node.args[0].target)}
    ]


def sure_of_axis(model: nn.Module) -> set[str]:
    """Paths of convolutions, and of linear layers that surely read [samples, inputs]."""
    modules = dict(model.named_modules())
    sure = {path for path, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd)}
    try:
        nodes = fx.Tracer().trace(model).nodes
    except Exception:  # as in batchnorm_pairs
        return sure
    flat: set[Any] = set()
    for node in nodes:
        before = node.args[0] if node.args else None
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Flatten):
            flattens = (module.start_dim, module.end_dim) == (1, -1)
        elif module is not None:  # of those without children, no other changes the rank
            flattens = before in flat and not list(module.children())
        elif node.target in ("view", "reshape"):
            flattens = len(node.args) == 3
        else:
            flattens = node.target in ("flatten", torch.flatten) and node.args[1:] == (1,)
        if flattens:
            flat.add(node)
        if isinstance(module, nn.Linear) and before in flat:
            sure.add(str(node.target))
    return sure


def _met_pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Paths of layers and of the BatchNorm that reads what each put out, both called once."""
    network, calls = evaluated(copied(model)), Counter[str]()
    made: dict[int, tuple[str, Any]] = {}  # by identity, and held so that none is given twice
    pairs: list[tuple[str, str]] = []

    def hook(path: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        calls[path] += 1
        if isinstance(module, BATCHNORMS) and inputs and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], path))
        if isinstance(module, FOLDABLE):
            made[id(output)] = path, output

    for path, module in network.named_modules():
        if isinstance(module, (*BATCHNORMS, *FOLDABLE)):
            module.register_forward_hook(partial(hook, path))
    probed(network, images[:2])
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _sequential_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of all neighbours inside an ``nn.Sequential``."""
    pairs: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            names = [f"{path}.{child}" if path else child for child, _ in module.named_children()]
            pairs += zip(names, names[1:], strict=False)
    return pairs
