"""What is unusable, refused before long work starts by a sentence that names the remedy."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from .inputs import UnsupportedLayerError, memory, names_by_memory, probed, spread, tensors

SMALLEST, LARGEST = 1e-12, 1e12  # of the images' largest value
ALONE = 4  # images of which each is run by itself, too
WEIGHT_HOOKS = {  # what they leave as a plain attribute cannot be copied, nor told from a weight
    prune.BasePruningMethod: "torch.nn.utils.prune.remove",
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
}


def check_model(model: Any) -> None:
    """Raise ValueError for what is no network, UnsupportedLayerError for what can't be followed."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {_advice_on_model(model)}")
    parameters = dict(model.named_parameters())
    for name, value in (*parameters.items(), *model.named_buffers()):
        if isinstance(value, UninitializedParameter):
            raise ValueError(f"{name!r} has no shape yet: run the model once on some images")
        if value.is_meta:
            raise ValueError(f"{name!r} is on the meta device, without values: load them first")
        if value.layout != torch.strided:
            raise UnsupportedLayerError(f"{name!r} is sparse: give the layer its to_dense()")
        if not value.numel() and name in parameters:
            raise UnsupportedLayerError(f"{name!r} has no elements: leave its layer out")
        if value.is_complex() and name in parameters:
            raise UnsupportedLayerError(
                f"{name!r} is complex: hold its real and imaginary parts as two parameters, and "
                "compute with torch.complex or with both"
            )
        if value.is_inference():
            value = value.clone()
        # a mask, which does not train, may hold infinities
        bad = ~value.isfinite() if value.requires_grad else value.isnan()
        if name in parameters and bad.any():
            raise ValueError(f"{name!r} holds values that are not finite")
    _check_memory(model)
    for path, module in model.named_modules():
        name = f"module {path or '(the model itself)'!r} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayerError(
                f"{name} is compiled code of TorchScript: give the nn.Module that it was made from"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedLayerError(
                f"{name} has no running statistics, so that the output for an image depends on the "
                "others: make it with track_running_stats=True"
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


def check_scale(images: Tensor) -> None:
    """Raise ValueError where squares of images, and so moments, leave the range of float32."""
    largest = float(images.abs().max()) if images.is_floating_point() and images.numel() else 0.0
    if largest and not SMALLEST <= largest <= LARGEST:
        raise ValueError(
            f"images hold values up to {largest:.1g}, whose squares float32 cannot hold: give them "
            "in units in which they are of about order one, and let the model begin with a factor"
        )


def check_state(model: nn.Module) -> None:
    """Raise UnsupportedLayerError where the state_dict calls weights otherwise than they are."""
    unknown = dict(model.named_parameters()).keys() - model.state_dict().keys()
    if unknown:
        raise UnsupportedLayerError(
            f"the model's state_dict does not hold {min(unknown)!r}: a state_dict of its own that "
            "names or leaves out weights cannot be stored; give the network without it"
        )


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
    check_finite(logits)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the model has classes 0 to {logits.shape[1] - 1}"
        )


def check_finite(logits: Tensor) -> None:
    """Raise ValueError unless all logits are finite."""
    if not logits.isfinite().all():
        raise ValueError("the model returns NaN or infinite logits")


class _Reading(TorchFunctionMode):
    """A pass in which none of a network's tensors may be read."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = names_by_memory(model)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for tensor in tensors((args, kwargs or {})):
            if name := self.names.get(memory(tensor)):
                raise UnsupportedLayerError(
                    f"a copy of the model reads {name!r} of the model itself: some function or "
                    "hook holds on to the model; write it as a method, or let it read from the "
                    "module that it is given"
                )
        return func(*args, **(kwargs or {}))


def check_copy(model: nn.Module, copy: nn.Module, images: Tensor) -> None:
    """Raise UnsupportedLayerError where a copy computes with the tensors of the model itself."""
    with _Reading(model), suppress(ValueError):  # what else is wrong is told elsewhere
        probed(copy, images)


def check_alone(network: nn.Module, images: Tensor) -> None:
    """Raise UnsupportedLayerError where outputs depend on chance, or on other images of a batch.

    A network that squeezes needs two images at a time, and gets each twice; some take but one.
    """
    some = spread(images, ALONE)
    try:
        together = probed(network, some)
    except ValueError:
        together = probed(network, some := images[:1])
    check_finite(together)
    alone = _apart(network, some, 1)
    if _near(together, alone):
        return
    if not _near(together, probed(network, some)):
        raise UnsupportedLayerError(
            "the outputs for the same images differ from pass to pass: evaluation mode must not "
            "be random (dropout and its kin need training=self.training), nor change the model"
        )
    squeezes = alone is None or alone.shape != together.shape
    if not (squeezes and len(some) > 1 and _near(together, _apart(network, some, 2))):
        raise UnsupportedLayerError(
            "the output for an image depends on the others of its batch: is the first axis that "
            "of the samples everywhere (batch_first=True), and is no mean, norm or softmax taken "
            "over it?"
        )


def _apart(network: nn.Module, images: Tensor, times: int) -> Tensor | None:
    """The outputs for each image by itself, so many times; None where it cannot run like that."""
    try:
        every = [probed(network, torch.cat([image] * times)) for image in images.split(1)]
    except ValueError:
        return None
    return torch.cat([out[:1] if out.dim() > 1 else out for out in every])


def _near(one: Tensor, other: Tensor | None) -> bool:
    """Whether outputs differ by no more than rounding."""
    if other is None or one.shape != other.shape:
        return False
    share = max(1e-3, 8 * torch.finfo(one.dtype).eps)
    largest = float(one.detach().abs().max())
    return torch.allclose(one, other, rtol=share, atol=share * largest)
