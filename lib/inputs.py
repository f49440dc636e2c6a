"""What users hand in: looked through, copied, checked up front, and made ready for a pass.

Whatever is unusable is refused here, before long work starts, by a sentence that names the remedy.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

Output = Callable[[Any], Tensor]
HALVES = (torch.float16, torch.bfloat16)
WEIGHT_HOOKS = {  # what they leave as a plain attribute cannot be copied, nor told from a weight
    prune.BasePruningMethod: "torch.nn.utils.prune.remove",
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
}


class UnsupportedLayerError(NotImplementedError):
    """A layer or function through which relevance has no defined way."""


class _Original(nn.Module):
    """A network in place of its compiled form, under the same names."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel or torch.compile."""
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def copied(model: nn.Module, output: Output | None = None) -> nn.Module:
    """A copy that computes the same and shares nothing.

    Parameters
    ----------
    model : nn.Module
        Activations that it keeps, which carry a graph, are detached in the copy; compiled parts
        are replaced there by what they were compiled from.
    output : callable, optional
        Takes what the model returns and gives the logits; then so does the copy.

    Raises
    ------
    ValueError
        The model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for kept in tensors([v for k, v in vars(module).items() if k != "_modules"]):
            if kept.grad_fn is not None:
                memo[id(kept)] = kept.detach().clone()
    try:
        private = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"the model cannot be copied; remove what it keeps: {error}") from error
    for path, module in list(private.named_modules()):
        if path and "_orig_mod" in module._modules and not isinstance(module, _Original):
            private.set_submodule(path, _Original(module._modules["_orig_mod"]))
    if output is not None:
        private.register_forward_hook(lambda _, inputs, outputs: output(outputs))
    return private


def check_model(model: Any) -> None:
    """Raise ValueError for what is no network, UnsupportedLayerError for what can't be followed."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {_advice_on_model(model)}")
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
        shape = tuple(labels.shape)
        remedy = ""
        if labels.dim() == 2 and len(labels) == len(images):
            how = ", as if one-hot: {}argmax(1)" if labels.shape[1] > 1 else ": {}flatten()"
            remedy = how.format("give the numbers of the classes, labels.")
        raise ValueError(f"{len(images)} images but labels of shape {shape}{remedy}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError("labels must be integers, the true classes: use labels.long()")


def check_images(images: Tensor) -> None:
    """Raise ValueError unless there are images and all of them are finite."""
    if images.dim() == 0 or len(images) == 0:
        raise ValueError("no reference images given")
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


def probed(network: nn.Module, images: Tensor) -> Any:
    """What a network in evaluation mode returns for some images.

    Raises
    ------
    ValueError
        It cannot run on them.
    """
    try:
        with torch.no_grad(), FullPrecision():
            return network(own(images, network))
    except UnsupportedLayerError:
        raise
    except Exception as error:
        given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}"
        if not images.is_floating_point():
            given += " (pixels must be normalised as in training: floats, not integers)"
        raise ValueError(
            f"the model does not run on images like these, {given}: {error}"
        ) from error


def own(batch: Tensor, network: nn.Module) -> Tensor:
    """A copy of some images that a network may change, on its device and in a dtype it has."""
    batch = batch.detach()
    dtypes = [p.dtype for p in network.parameters() if p.is_floating_point()]
    if batch.is_floating_point() and dtypes and batch.dtype not in dtypes:
        batch = batch.to(dtypes[0])
    device = next((p.device for p in network.parameters()), batch.device)
    # In the usual layout: in another, a forward that asks for a view of its activations fails.
    return batch.to(device).clone(memory_format=torch.contiguous_format)


def batched(count: int, size: int) -> Iterator[slice]:
    """Parts of ``count`` samples, of ``size`` each; no sample alone, if there are two.

    A network that squeezes loses the axis of the samples where there is one.
    """
    first = 0
    while first < count:
        last = count if count - first == size + 1 > 2 else min(first + size, count)
        yield slice(first, last)
        first = last


def split(images: Tensor, size: int) -> list[Tensor]:
    """Images in the parts of ``batched``."""
    return [images[part] for part in batched(len(images), size)]


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, whatever the model's forward asks for."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class FullPrecision(TorchFunctionMode):
    """Passes in which an autocast inside of the forward has no effect."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not any(True for _ in tensors((args, kwargs))):
            return func(*args, **(kwargs or {}))  # or it switches autocast, and must have its way
        with full_precision():
            return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A model in evaluation mode; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Its state_dict, without what modules add to it that is no tensor (extra state)."""
    return {n: value for n, value in model.state_dict().items() if isinstance(value, Tensor)}


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from tensors(branch)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
