"""What is unusable, refused before long work starts by a sentence that names the remedy."""

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .inputs import UnsupportedLayerError

WEIGHT_HOOKS = {  # what they leave as a plain attribute cannot be copied, nor told from a weight
    prune.BasePruningMethod: "torch.nn.utils.prune.remove",
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
}


def check_model(model: Any) -> None:
    """Raise ValueError for what is no network, UnsupportedLayerError for what can't be followed."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {_advice_on_model(model)}")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device, without values: load them first")
        if value.layout != torch.strided:
            raise UnsupportedLayerError(f"{name!r} is sparse: give the layer its to_dense()")
        if not value.numel() and isinstance(value, nn.Parameter):
            raise UnsupportedLayerError(f"{name!r} has no elements: leave its layer out")
    _check_memory(model)
    for path, module in model.named_modules():
        name = f"module {path or '(the model itself)'!r} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayerError(
                f"{name} is compiled code of TorchScript: give the nn.Module that it was made from"
            )
        nodes = graph.nodes if isinstance(graph := getattr(module, "graph", None), fx.Graph) else ()
        if any(isinstance(node.target, torch._ops.OpOverload) for node in nodes):
            raise UnsupportedLayerError(
                f"{name} is an exported program, the operations of a network without its layers: "
                "give the nn.Module that it was exported from"
            )
        for hook in module._forward_pre_hooks.values():
            for kind, remedy in WEIGHT_HOOKS.items():
                if isinstance(hook, kind):
                    weight = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
                    raise ValueError(
                        f"{name} computes its {weight!r} anew before each pass: apply "
                        f"{remedy}(module, {weight!r}) first"
                    )


def _check_memory(model: nn.Module) -> None:
    """Raise UnsupportedLayerError where two parameters, or a buffer, lie in one memory."""
    taken: dict[int, list[tuple[str, int, int]]] = {}  # by storage: name, first byte, end
    buffers = [(name, value, True) for name, value in model.named_buffers()]
    for name, value, buffer in [*((n, p, False) for n, p in model.named_parameters()), *buffers]:
        if not value.numel():
            continue
        first = int(value.storage_offset())
        steps = zip(value.shape, value.stride(), strict=True)
        end = (first + sum((n - 1) * step for n, step in steps) + 1) * value.element_size()
        first *= value.element_size()
        spans = taken.setdefault(value.untyped_storage().data_ptr(), [])
        met = next((n for n, start, stop in spans if start < end and first < stop), None)
        if met and buffer:
            raise UnsupportedLayerError(
                f"the buffer {name!r} shares the memory of the weight {met!r}, whose "
                "relevance it would keep: read the weight itself, or make the buffer a copy"
            )
        if met:
            raise UnsupportedLayerError(
                f"the parameters {met!r} and {name!r} lie in one memory, but would be scored and "
                "stored as two: make them one parameter, the same object in both places"
            )
        if not buffer:
            spans.append((name, first, end))


def _advice_on_model(model: Any) -> str:
    if isinstance(model, (str, PathLike)):
        return f"the path {str(model)!r}: build the network and load the file into it"
    if isinstance(model, Mapping):
        return "a state_dict: build the network and call its load_state_dict"
    if isinstance(model, type):
        return f"the class {model.__name__}: make a network of it, {model.__name__}(...)"
    if type(model).__name__ == "ExportedProgram":
        return "an exported program: give the network that it was exported from"
    return f"a {type(model).__name__}"


def check_samples(images: Any, labels: Any) -> None:
    """Raise ValueError unless images are finite, not empty, and as many as the labels."""
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            loader = hasattr(value, "dataset") or isinstance(value, Iterator)
            remedy = "take a batch out of it" if loader else f"use torch.as_tensor({name})"
            kind = type(value).__name__
            raise ValueError(f"{name} must be a torch.Tensor, not a {kind}: {remedy}")
    check_images(images)
    if labels.shape != (len(images),):
        wanted, column = "give the numbers of the classes", labels.shape[1:] == (1,)
        remedy = f": {wanted}, labels.flatten()" if column else ""
        if labels.dim() == 2 and not column and len(labels) == len(images):
            remedy = f", as if one-hot: {wanted}, labels.argmax(1)"
        raise ValueError(f"{len(images)} images but labels of shape {tuple(labels.shape)}{remedy}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError("labels must be integers, the true classes: use labels.long()")


def check_images(images: Tensor) -> None:
    """Raise ValueError unless there are images and all of them are finite."""
    if images.dim() == 0 or len(images) == 0:
        raise ValueError("no reference images given")
    if images.is_meta:
        raise ValueError("images are on the meta device, without values")
    if images.is_complex():
        raise ValueError("images are complex: give their real and imaginary parts as channels")
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError("images contain NaN or infinite values: they must be finite")


def check_logits(logits: Any, labels: Tensor) -> None:
    """Raise ValueError unless the output for some images is logits that the labels index."""
    if not isinstance(logits, Tensor):
        if isinstance(logits, Mapping):
            names = ", ".join(map(repr, logits))
            fields = f" with {names}: say which, output=lambda o: o['logits']"
        elif isinstance(logits, (tuple, list)) and not hasattr(logits, "_fields"):
            fields = f" of {len(logits)}: say which holds the logits, output=lambda o: o[0]"
        else:
            fields = ": say which field holds the logits, output=lambda o: o.logits"
        raise ValueError(
            f"the model must return logits [samples, classes], not a {type(logits).__name__}"
            f"{fields}"
        )
    if logits.dim() != 2:
        shape = tuple(logits.shape)
        raise ValueError(
            f"the model must return logits [samples, classes], got {shape}; a squeeze() may have "
            "taken the axis of the samples where there is one"
        )
    if not logits.isfinite().all():
        raise ValueError("the model returns NaN or infinite logits")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the model has classes 0 to {logits.shape[1] - 1}"
        )
