"""Networks and images that users hand in: looked through, copied, made ready for a pass."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Output = Callable[[Any], Tensor]
HALVES = (torch.float16, torch.bfloat16)


class UnsupportedLayerError(NotImplementedError):
    """A layer or function through which relevance has no defined way."""


class BadOutputError(ValueError):
    """What was given as ``output`` does not fit what the model returns."""


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
        The model holds something that cannot be copied; ``output`` is no function.
    """
    if output is not None and not callable(output):
        raise ValueError(
            "output must be a function of what the model returns, such as lambda o: o.logits, "
            f"not {output!r}"
        )
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
        private.register_forward_hook(lambda _, inputs, outputs: _logits_of(outputs, output))
    return private


def _logits_of(outputs: Any, output: Output) -> Tensor:
    try:
        return output(outputs)
    except Exception as error:
        kind = type(outputs).__name__
        kind += f" {list(outputs.shape)}" if isinstance(outputs, Tensor) else ""
        raise BadOutputError(
            f"output= cannot take what the model returns, a {kind}: {type(error).__name__}: {error}"
        ) from error


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
    except (UnsupportedLayerError, BadOutputError):
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


def spread(images: Tensor, count: int) -> Tensor:
    """So many images from all parts of the set, whose first ones may be alike; all if fewer."""
    return images[:: max(1, len(images) // count)][:count]


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


def evaluated(model: nn.Module) -> nn.Module:
    """The same, in evaluation mode; a ``train`` of the user's own may return nothing."""
    model.eval()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A model in evaluation mode; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield evaluated(model)
    finally:
        for module, training in modes.items():
            module.training = training


def memory(tensor: Tensor) -> int | None:
    """Identity of the memory that a tensor lies in, as long as somebody holds it.

    None where it has none of its own (sparse, or wrapped by torch.func).
    """
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return tensor.untyped_storage()._cdata


def names_by_memory(model: nn.Module) -> dict[int | None, str]:
    """``memory`` of every parameter and buffer -> its name."""
    held = (*model.named_buffers(), *model.named_parameters())
    return {memory(value): name for name, value in held}


def owners(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its ``id``: more than one where it is tied."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values())


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
