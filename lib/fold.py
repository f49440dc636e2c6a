"""Folding of BatchNorm into the layer before it, and back into a state_dict of the user's model."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from .inputs import HALVES, copied, probed, tensors

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
COMPARED = 8  # images on which outputs are compared


@dataclass(frozen=True)
class Folded:
    """A network without the BatchNorms that its layers can do the work of.

    Attributes
    ----------
    model : nn.Module
        The user's, as given, untouched.
    network : nn.Module
        A copy in evaluation mode: each BatchNorm of ``pairs`` is an ``nn.Identity``, its layer has
        the folded weight under the same name, and a bias.
    pairs : dict of str to str
        Module path of each folded BatchNorm -> path of its layer.
    """

    model: nn.Module
    network: nn.Module
    pairs: dict[str, str]

    def scales(self) -> dict[str, Tensor]:
        """Factors by which folding multiplied each weight.

        Returns
        -------
        dict of str to Tensor
            Name of every parameter of the network with two or more axes -> positive factors,
            shaped like it; 1 where the factor is not defined, since the weight is zero.
        """
        scales = {}
        for name, after in self.network.named_parameters():
            if after.ndim > 1:
                scale = (after.detach() / self.model.get_parameter(name).detach()).abs()
                scales[name] = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
        return scales

    def unfold(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """What to store for the user's model so that it computes what the folded network does.

        Parameters
        ----------
        entries : mapping of str to Tensor, Codes or Constant
            Content for ``network.state_dict()``; the biases of folded layers as tensors.

        Returns
        -------
        dict of str to Tensor, Codes or Constant
            Content for ``model.state_dict()``, in its order: folded BatchNorms only shift, by the
            bias of their layer, and that bias, where the model has one, is zero.
        """
        # Here, since codes come from quantizers that ask for relevance, which folds.
        from .codec import Constant

        def filled(value: float, like: Tensor) -> Constant:
            return Constant(torch.tensor(value, dtype=like.dtype), tuple(like.shape))

        unfolded = dict(entries)
        for norm_path, layer_path in self.pairs.items():
            norm, shift = self.model.get_submodule(norm_path), entries[f"{layer_path}.bias"]
            assert isinstance(norm, BATCHNORMS)
            neutral = {
                "weight": 1.0,
                "bias": shift,
                "running_mean": 0.0 if norm.affine else -shift,
                "running_var": 1.0 - norm.eps,
                "num_batches_tracked": 0,
            }
            for name, like in norm.state_dict().items():
                value = neutral[name]
                value = value if isinstance(value, Tensor) else filled(value, like)
                unfolded[f"{norm_path}.{name}"] = value
            if self.model.get_submodule(layer_path).bias is not None:
                unfolded[f"{layer_path}.bias"] = filled(0.0, shift)
        return {name: unfolded[name] for name in self.model.state_dict() if name in unfolded}


def fold(model: nn.Module, images: Tensor | None = None) -> Folded:
    """Fold every BatchNorm into the layer before it, where that leaves the outputs as they are.

    Parameters
    ----------
    model : nn.Module
        Any network; not changed.
    images : Tensor [samples, ...], optional
        Inputs as the model takes them, on any device. On the first eight of them the outputs
        before and after folding are compared; should they differ by more than 0.1 % of the
        largest, BatchNorms are folded one by one, and those that change the outputs stay. Without
        images, linear layers are folded into only behind a flattening: elsewhere a BatchNorm may
        normalise another axis than their outputs.

    Returns
    -------
    Folded

    Notes
    -----
    ``w' = w γ / sqrt(σ² + ε)`` per output channel and ``b' = β + (b − μ) γ / sqrt(σ² + ε)``
    (Ioffe and Szegedy 2015; Jacob et al. 2018, section 3.2). The pairs are read off the modules'
    order, not off shapes: a BatchNorm that normalises another axis than its layer's outputs shows
    in the outputs alone. A network in half precision is copied to float32.
    """
    network, pairs = copied(model).eval(), batchnorm_pairs(model)
    if any(p.dtype in HALVES for p in network.parameters()):
        network.float()  # products of relevance and sums of moments leave the range of halves
    if images is None or len(images) == 0:
        if any(isinstance(model.get_submodule(layer), nn.Linear) for layer in pairs.values()):
            sure = _sure_of_axis(copy.deepcopy(network))
            pairs = {norm: layer for norm, layer in pairs.items() if layer in sure}
        return Folded(model, _fuse(network, pairs), pairs)
    if not pairs:
        return Folded(model, network, {})
    before, folded = _outputs(network, images), _fuse(copy.deepcopy(network), pairs)
    if _gives(folded, images, before):
        return Folded(model, folded, pairs)
    kept = {}
    for norm_path, layer_path in pairs.items():
        folded = _fuse(copy.deepcopy(network), {norm_path: layer_path})
        if _gives(folded, images, before):
            network, kept[norm_path] = folded, layer_path
    return Folded(model, network, kept)


def fold_batchnorm(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """The network of ``fold``: a copy in evaluation mode with its BatchNorms folded."""
    return fold(model, images).network


def batchnorm_pairs(model: nn.Module) -> dict[str, str]:
    """Find each BatchNorm that can be folded and the layer it belongs to.

    Parameters
    ----------
    model : nn.Module
        Any network; a copy of it is traced symbolically. Where that fails, only neighbours inside
        an ``nn.Sequential`` are paired.

    Returns
    -------
    dict of str to str
        Module path of the BatchNorm -> path of the linear or convolution layer whose only reader
        it is. A BatchNorm without running statistics, behind a layer used twice, behind one whose
        weight is shared or computed (a parametrization), or behind anything else, is absent.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(module, BATCHNORMS) for module in modules.values()):
        return {}
    every = [module for _, module in model.named_modules(remove_duplicate=False)]
    places = Counter(id(module) for module in every)
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values())
    try:
        # A copy, since a forward that keeps what it computed would keep the tracer's objects.
        candidates = _traced_pairs(copied(model).eval())
    except Exception:  # a forward with data-dependent control flow fails in ways of its own
        candidates = _sequential_pairs(model)

    def foldable(layer: nn.Module, norm: nn.Module) -> bool:
        if not isinstance(layer, FOLDABLE) or not isinstance(norm, BATCHNORMS):
            return False
        weight = layer._parameters.get("weight")
        return (
            norm.track_running_stats
            and weight is not None
            and owners[id(weight)] == 1
            and places[id(layer)] == places[id(norm)] == 1
            and not (is_parametrized(layer) or is_parametrized(norm))
            and not (isinstance(layer, TRANSPOSED) and layer.groups > 1)
            and norm.num_features == weight.shape[isinstance(layer, TRANSPOSED)]
        )

    return {
        norm: layer
        for layer, norm in candidates
        if layer in modules and norm in modules and foldable(modules[layer], modules[norm])
    }


def _traced_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of modules and of the BatchNorm that alone reads each, both called once."""
    modules = dict(model.named_modules())
    every = list(fx.Tracer().trace(model).nodes)
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


def _sure_of_axis(model: nn.Module) -> set[str]:
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


def _sequential_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of all neighbours inside an ``nn.Sequential``."""
    pairs: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            names = [f"{path}.{child}" if path else child for child, _ in module.named_children()]
            pairs += zip(names, names[1:], strict=False)
    return pairs


def _fuse(network: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """Fold these BatchNorms of a network in evaluation mode, in place."""
    for norm_path, layer_path in pairs.items():
        norm, layer = network.get_submodule(norm_path), network.get_submodule(layer_path)
        assert isinstance(layer, FOLDABLE) and isinstance(norm, BATCHNORMS)
        if not norm.affine:  # torch's fusion of linear layers wants a gain and a shift
            gain = torch.ones_like(norm.running_var)  # type: ignore[arg-type]
            norm.weight, norm.bias = nn.Parameter(gain), nn.Parameter(torch.zeros_like(gain))
        network.set_submodule(
            layer_path,
            fuse_linear_bn_eval(layer, norm)
            if isinstance(layer, nn.Linear)
            else fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, TRANSPOSED)),
        )
        network.set_submodule(norm_path, nn.Identity())
    return network


def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    # a copy runs, since a forward may keep what it computed
    outputs = probed(copy.deepcopy(network), images[:COMPARED])
    return torch.cat([t.flatten(1) for t in tensors(outputs) if t.is_floating_point()], 1)


def _gives(network: nn.Module, images: Tensor, expected: Tensor) -> bool:
    try:
        outputs = _outputs(network, images)
    except ValueError:  # a forward may read from its layers what folding took
        return False
    return bool((outputs - expected).abs().max() <= 1e-3 * expected.abs().max())
