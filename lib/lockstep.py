"""Two networks of one architecture, the second changed layer by layer as the first goes along.

Each layer of the second is changed when its inputs, those of the network as changed so far, and
the outputs of the same layer in the first are known. One forward pass of each network does it: the
first runs in a thread of its own and waits before every layer, so that the activations of one
stage are held at a time, whatever the depth.

Where the output of a layer ends a branch, i.e. is one of the two terms of a sum and nothing else
reads it, the layer is changed when the other term is known as well. What it has to give is then
the first network's sum less the other term in the second: so it takes back the drift that came
along the shortcut. Which layers these are is found from the forward pass itself.
"""

import copy
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .inputs import UnsupportedLayerError, evaluated, own, spread, tensors
from .linear import Layer, hooked, layers_of

PAIRED = 16  # images that show which layers run for each
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}

Change = Callable[[str, Layer, Tensor, Tensor, Tensor], None]


@dataclass
class Plan:
    """How a forward pass goes."""

    layers: list[str]  # paths of those that are called exactly once, in the order of the calls
    branch_ends: set[str]  # those whose output is a term of a sum and read by nothing else


def plan(model: nn.Module, images: Tensor) -> Plan:
    """Find the layers of a network in the order of its forward pass, and where branches end.

    In evaluation mode it runs on some of the images [N, ...], two at a time. Layers that run for
    some images only, or read but a part of them, are left out. What the model returns is read.
    """
    layers, shapes = layers_of(model), []
    for pair in reversed(pairs_of(images)):
        batch, probe = own(pair, model), _Probe()
        with torch.no_grad(), hooked(model, layers, probe.layer), probe:
            returned = model(batch)
        probe.readers.update(probe.names_of(returned))
        shapes.append({name: output.shape for name, output in probe.outputs})
    calls = Counter(name for name, _ in probe.outputs)
    steady = {name for name in calls if all(shapes[-1][name] == s.get(name) for s in shapes)}
    found = Plan([n for n, _ in probe.outputs if calls[n] == 1 and n in steady], set())
    sizes = {name: layers[name].weight.numel() for name in found.layers}
    for terms in probe.sums:
        ends = [name for name in terms if name in sizes and probe.readers[name] == 1]
        if ends:  # of two branches the one with more weights can take back more
            found.branch_ends.add(max(ends, key=lambda name: sizes[name]))
    return found


def pairs_of(images: Tensor) -> list[Tensor]:
    """A few images from all parts of the set, two at a time: some networks squeeze one away."""
    some = spread(images, PAIRED)
    return list(some[: len(some) - len(some) % 2 or 1].split(2))


def unsteady(
    name: str, why: str = "which images it reads depends on the activations before it"
) -> UnsupportedLayerError:
    """The error for a layer that reads other samples in one network, or pass, than in another."""
    return UnsupportedLayerError(
        f"{name!r} cannot be coded in the order of the layers, since {why}: choose a recipe that "
        "codes all at once (lrp-rd, uniform)"
    )


MANY = "it is called once for two images and not for all at once, as where a forward splits them"


class _Probe(TorchFunctionMode):
    """Notes which layers' outputs are terms of sums, and who else reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, Tensor]] = []  # held, so that no identity is given twice
        self.names: dict[int, str] = {}
        self.sums: list[list[str]] = []
        self.readers: Counter[str] = Counter()

    def layer(self, name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        self.outputs.append((name, output))
        self.names[id(output)] = name

    def names_of(self, tree: Any) -> list[str]:
        """The layers whose outputs are among some tensors."""
        return [self.names[id(tensor)] for tensor in tensors(tree) if id(tensor) in self.names]

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        read = self.names_of((args, kwargs or {}))
        every = tensors((args, kwargs or {}))
        given = [(t, t._version) for t in every if not t.is_inference()]
        result = func(*args, **(kwargs or {}))
        changed = [t for t, version in given if t._version != version]
        same = bool(args) and result is args[0]
        told = name == "__get__" and not isinstance(result, Tensor)  # its shape, not .mT of it
        if not told and (changed or not same):  # dropout returns what it was given
            self.readers.update(read)
        sums = read and name in SUMS and not kwargs
        if sums and [t.shape for t in tensors(args)] == [result.shape] * 2:
            self.sums.append(read)
        for tensor in changed:
            self.names.pop(id(tensor), None)  # no longer what the layer gave
        return result


def change_in_order(
    dense: nn.Module, network: nn.Module, images: Tensor, route: Plan, change: Change
) -> None:
    """Change layer after layer of a network in place, inputs as changed so far.

    Parameters
    ----------
    dense : nn.Module
        What the network should compute, of the same architecture. Both run in evaluation mode.
    images : Tensor
        Reference images [N, ...], all at once.
    route : Plan
        The layers to change, each of which both call once.
    change : callable
        ``(path, layer, inputs, output, target)``: changes the layer in place. ``output`` is what
        it gives at present, ``target`` what it should give, both shaped alike.

    Raises
    ------
    UnsupportedLayerError
        The two networks, or a pass over all images and one over two, do not call the same layers
        on the same samples.
    """
    network.eval()
    with _Dense(dense, images, route).started() as targets:
        run = _Changing(route.branch_ends, targets, change)
        with torch.no_grad(), hooked(network, route.layers, run.layer), run:
            network(own(images, network))
    waiting = {name for name, _ in run.pending.values()}  # for the end of their branch
    for name in route.layers:
        if name not in run.called or name in waiting:
            raise unsteady(name, MANY)


class _Watch(TorchFunctionMode):
    """Sees outputs of layers, and of the sums in which branches end."""

    def __init__(self, branch_ends: set[str]):
        super().__init__()
        self.branch_ends = branch_ends
        self.pending: dict[int, tuple[str, Any]] = {}

    def at_sum(self, name: str, held: Any, args: tuple) -> None:
        """Called before a sum of which a pending output is a term."""

    def after_sum(self, name: str, result: Tensor) -> None:
        """Called with the sum."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        ended = None
        if self.pending and getattr(func, "__name__", "") in SUMS:
            ended = next((id(t) for t in tensors(args) if id(t) in self.pending), None)
        if ended is None:
            return func(*args, **(kwargs or {}))
        name, held = self.pending.pop(ended)
        with torch._C.DisableTorchFunction():
            self.at_sum(name, held, args)
            result = func(*args, **(kwargs or {}))
            self.after_sum(name, result)
        return result


class _Changing(_Watch):
    """The second network's pass."""

    def __init__(self, branch_ends: set[str], targets: "_Dense", change: Change):
        super().__init__(branch_ends)
        self.targets, self.change = targets, change
        self.called: set[str] = set()

    def layer(self, name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> Any:
        if name in self.called:
            raise unsteady(name, MANY)
        self.called.add(name)
        with torch._C.DisableTorchFunction():
            if name in self.branch_ends:
                self.pending[id(output)] = (name, (layer, inputs[0].clone(), output))
                return None
            self.change(name, layer, inputs[0], output, self.targets.of(name, output))
            return layer.forward(inputs[0])

    def at_sum(self, name: str, held: Any, args: tuple) -> None:
        layer, inputs, output = held
        (other,) = [t for t in tensors(args) if t is not output]
        self.change(name, layer, inputs, output, self.targets.of(name, output) - other)
        output.copy_(layer.forward(inputs))


class _Dense(_Watch):
    """The first network's pass, in a thread that waits until each output is asked for."""

    def __init__(self, dense: nn.Module, images: Tensor, route: Plan):
        super().__init__(route.branch_ends)
        self.model, self.images, self.names = evaluated(copy.deepcopy(dense)), images, route.layers
        self.queue: queue.Queue = queue.Queue(maxsize=1)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def layer(self, name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        if name in self.branch_ends:
            self.pending[id(output)] = (name, output)
        else:
            self._give(name, output)

    def after_sum(self, name: str, result: Tensor) -> None:
        self._give(name, result)

    def _give(self, name: str, value: Any) -> None:
        value = value.clone() if isinstance(value, Tensor) else value  # may be changed in place
        while not self.stopped.is_set():
            try:
                return self.queue.put((name, value), timeout=0.5)
            except queue.Full:
                continue
        raise _Stopped

    def _run(self) -> None:
        try:
            with torch.no_grad(), hooked(self.model, self.names, self.layer), self:
                self.model(own(self.images, self.model))
            self._give("", None)
        except _Stopped:
            return
        except BaseException as error:  # handed to whoever waits for an output
            self._give("", error)

    @contextmanager
    def started(self) -> Iterator["_Dense"]:
        self.thread.start()
        try:
            yield self
        finally:
            self.stopped.set()
            self.thread.join()

    def of(self, name: str, output: Tensor) -> Tensor:
        """What the layer of that name gives, or the sum that its branch ends in; like ``output``.

        Raises
        ------
        UnsupportedLayerError
            The two networks do not call the same layers on the same samples.
        """
        came, value = self.queue.get()
        if isinstance(value, BaseException):
            raise value
        if came != name or value.shape != output.shape:
            raise unsteady(name)
        return value


class _Stopped(Exception):
    """Ends a pass that nobody waits for any more."""
