"""Folding of BatchNorm into the layer before it, and back into a state_dict of the user's model."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .batchnorm import BATCHNORMS, FOLDABLE, TRANSPOSED, found_pairs, sure_of_axis
from .codec import Compressed, Constant
from .dense import as_linear, dense_layers
from .inputs import HALVES, copied, evaluated, probed, split, spread, tensors, tensors_of

COMPARED, BATCH = 8, 50  # images on which outputs are compared; so many run at a time


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
    dense : dict of str to bool
        Module path of each dense layer of another class, in whose place the copy has an
        ``nn.Linear`` -> whether the model's weight is [inputs, outputs].
    """

    model: nn.Module
    network: nn.Module
    pairs: dict[str, str]
    dense: dict[str, bool] = field(default_factory=dict)

    def stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the network's weights by name, shaped like the weights of the model."""
        turned = self._turned()
        return {n: v.mT.contiguous() if n in turned else v for n, v in values.items()}

    def _turned(self) -> set[str]:
        """Names of the weights that are [inputs, outputs] in the model, in each of their places."""
        modules = [self.model.get_submodule(path) for path, turned in self.dense.items() if turned]
        places = self.model.named_modules(remove_duplicate=False)
        return {f"{path}.weight" for path, module in places if module in modules}

    def scales(self) -> dict[str, Tensor]:
        """Factors by which folding multiplied each weight.

        Returns
        -------
        dict of str to Tensor
            Name of every parameter of the network with two or more axes -> positive factors,
            shaped like it; 1 where the factor is not defined, since the weight is zero.
        """
        own, scales = {f"{path}.weight" for path in self.dense}, {}
        for name, after in self.network.named_parameters():
            if after.ndim > 1 and name in own:
                scales[name] = torch.ones_like(after)
            elif after.ndim > 1:
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
                if name in neutral:  # its activation may have parameters of its own
                    value = neutral[name]
                    value = value if isinstance(value, Tensor) else filled(value, like)
                    unfolded[f"{norm_path}.{name}"] = value
            if self.model.get_submodule(layer_path).bias is not None:
                unfolded[f"{layer_path}.bias"] = filled(0.0, shift)
        again: dict[int, Any] = {}  # what stands in several places is stored once
        for name in self._turned() & entries.keys():
            entry = entries[name]
            unfolded[name] = again.setdefault(id(entry), _turned(name, entry))
        return {name: unfolded[name] for name in self.model.state_dict() if name in unfolded}


def fold(model: nn.Module, images: Tensor | None = None) -> Folded:
    """Fold every BatchNorm into the layer before it, where that leaves the outputs as they are.

    Parameters
    ----------
    model : nn.Module
        Any network; not changed.
    images : Tensor [samples, ...], optional
        Inputs as the model takes them, on any device. On eight of them, or on all where the pairs
        are not read off a graph, the outputs before and after folding are compared; should they
        differ by more than 0.1 % of the largest, BatchNorms are folded one by one, and those that
        change the outputs stay, as do those that cannot be unfolded again. Without images, linear
        layers are folded into only behind a flattening: elsewhere a BatchNorm may normalise another
        axis than their outputs.

    Returns
    -------
    Folded

    Notes
    -----
    ``w' = w γ / sqrt(σ² + ε)`` per output channel and ``b' = β + (b − μ) γ / sqrt(σ² + ε)``
    (Ioffe and Szegedy 2015; Jacob et al. 2018, section 3.2). The pairs are read off the modules'
    order, not off shapes: a BatchNorm that normalises another axis than its layer's outputs shows
    in the outputs alone. Dense layers of other classes than ``nn.Linear`` (GPT-2's ``Conv1D``)
    become that first. A network in half precision is copied to float32.
    """
    images = None if images is None or len(images) == 0 else images
    network, own = evaluated(copied(model)), dense_layers(model)
    pairs, sure = found_pairs(model, images)
    _floats(network)
    if images is None:
        pairs = {norm: layer for norm, layer in pairs.items() if _is_torchs(model, norm)}
        if any(isinstance(model.get_submodule(layer), nn.Linear) for layer in pairs.values()):
            certain = sure_of_axis(_sharing(network))
            pairs = {norm: layer for norm, layer in pairs.items() if layer in certain}
        return Folded(model, as_linear(_fuse(network, pairs), own), pairs, own)
    if not (pairs or own):
        return Folded(model, network, {})
    dense: dict[str, bool] = {}
    # more where a layer is only guessed
    some = spread(images, 32 * COMPARED if own else COMPARED)
    if own:
        network, dense = _kept(network, some, as_linear, own, lambda *_: True)

    def unfolds(changed: nn.Module, images: Tensor, folded: dict[str, str]) -> bool:
        """Whether other biases can be brought back to where they came from."""
        if sure:
            return True
        moved = _moved(changed, folded.values())
        try:
            unfolded = Folded(model, moved, folded, dense).unfold(tensors_of(moved))
            back = Compressed(unfolded).to_model(_floats(evaluated(copied(model))))
            return _gives(back, images, _outputs(moved, images))
        except Exception:  # in ways of the user's own: of loading, or where activations go
            return False

    fused, found = _kept(network, some, _fuse, pairs, unfolds)
    if not sure and found and len(some) < len(images):  # others may go other ways
        holds = _gives(fused, images, _outputs(network, images)) and unfolds(fused, images, found)
        if not holds:
            fused, found = _kept(network, images, _fuse, found, unfolds)
    return Folded(model, fused, found, dense)


def _kept(
    network: nn.Module, images: Tensor, change: Callable, wanted: Mapping[str, Any],
    fits: Callable[[nn.Module, Tensor, dict], bool],
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """The network changed where that leaves its outputs as they are: all at once, or singly."""
    before = _outputs(network, images) if wanted else images
    done: dict[str, Any] = {}
    for some in (dict(wanted), *({path: what} for path, what in wanted.items())):
        if some and not done.keys() >= some.keys():
            changed = change(_sharing(network), some)
            if _gives(changed, images, before) and fits(changed, images, done | some):
                network, done = changed, done | some
    return network, done


def fold_batchnorm(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """The network of ``fold``: a copy in evaluation mode with its BatchNorms folded."""
    return fold(model, images).network


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
        rest = OrderedDict(norm.named_children())  # an activation, in BatchNorms that have one
        network.set_submodule(norm_path, nn.Sequential(rest) if rest else nn.Identity())
    return network


def _is_torchs(model: nn.Module, path: str) -> bool:
    """Whether a BatchNorm computes that alone."""
    norm = model.get_submodule(path)
    return any(type(norm).forward is kind.forward for kind in BATCHNORMS)


def _turned(name: str, entry: Any) -> Any:
    """What is stored for a weight [outputs, inputs] in the user's order, [inputs, outputs]."""
    if isinstance(entry, Tensor):
        return entry.mT.contiguous()
    if entry.kind == "channel":
        raise ValueError(
            f"{name!r} is [inputs, outputs], for which a file has no steps by output channel: use "
            "codes of another kind (uniform, tier, codebook)"
        )
    tiers = None if entry.tiers is None else entry.tiers.mT
    return replace(entry, symbols=entry.symbols.mT, tiers=tiers)


def _floats(network: nn.Module) -> nn.Module:
    """In float32, where it was in half precision, whose range moments and relevance leave."""
    return network.float() if any(p.dtype in HALVES for p in network.parameters()) else network


def _moved(network: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A copy in which the biases of these layers are others, by about the size of the outputs."""
    network, draw = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for path in paths:
        layer: Any = network.get_submodule(path)
        size = layer.weight.detach().norm() / math.sqrt(len(layer.bias)) + layer.bias.abs().mean()
        layer.bias.data += size * torch.randn(layer.bias.shape, generator=draw).to(layer.bias)
    return network


def _sharing(network: nn.Module) -> nn.Module:
    """A copy of the modules, of the same parameters: what a forward keeps stays in the copy."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    network = _sharing(network)
    return torch.cat([
        torch.cat([t.flatten(1) for t in tensors(found) if t.is_floating_point()], 1)
        for found in (probed(network, part) for part in split(images, BATCH))
    ])  # fmt: skip


def _gives(network: nn.Module, images: Tensor, expected: Tensor) -> bool:
    try:
        outputs = _outputs(network, images)
    except ValueError:  # a forward may read from its layers what folding took
        return False
    return bool((outputs - expected).abs().max() <= 1e-3 * expected.abs().max())
