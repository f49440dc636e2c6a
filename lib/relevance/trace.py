"""How a forward pass is followed: what each torch function does to relevance."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..inputs import UnsupportedLayerError, full_precision, memory, tensors
from . import kinds
from .changes import Changes, is_inplace, out_of_place
from .factors import Multiply, Normaliser, hand_on, shared
from .functions import LAYERS
from .layers import Collector, Key, Layer, Propagate
from .norms import NORMALISATIONS
from .operations import Operation
from .origins import Origins
from .passing import passed
from .rules import DIRECT, Chooser, Rule
from .weights import computed, multiplies, place, straightened, used


class Propagation(TorchFunctionMode):
    """Run a model's forward so that ``backward`` carries relevance over activation.

    Parameters
    ----------
    model : nn.Module
        A private copy in evaluation mode; gets hooks and loses its parameters' ``requires_grad``.
    choose : callable
        ``(module path, is a convolution, is the first layer) -> Rule``.
    collector : Collector
        Told what arrives at weights and units.
    names : dict of int to str
        ``id`` of every weight that is scored -> its name.
    ordinary : bool
        Carry ordinary gradients instead of relevance.

    Attributes
    ----------
    visited : dict of str to Rule
        Path of each layer that the last forward pass used -> its rule, in order.
    made : dict
        Each step of its graph that brings relevance to a scored weight -> the weight's name.
    held : list of Tensor
        What a rule takes for a constant.
    readers : list of str
        Paths of the layers that read the images.
    shares : bool
        Whether images are multiplied by activations, so that they have to take their share.
    counts : bool
        Whether how many rows layers read may depend on what the images hold; asked only where the
        collector looks at single samples.
    spreads : dict
        Shape of each sum of looked-up rows and activations in the first pass, and its images.
    """

    def __init__(
        self, model: nn.Module, choose: Chooser, collector: Collector, names: dict[int, str],
        ordinary: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.model, self.choose, self.collector = model, choose, collector
        self.names, self.ordinary = names, ordinary
        own = (p for p in model.parameters() if id(p) not in names)
        self.fixed = {memory(t) for t in (*model.buffers(), *own)}
        self.running = False
        self.spreads: dict[int, tuple[torch.Size, int]] = {}
        self._forget()
        for path, module in model.named_modules():
            self.path.append(path)
            if isinstance(module, torch.jit.ScriptModule):
                raise self.refuse("compiled code", "score the model before compiling it")
            module.register_forward_pre_hook(lambda *_, path=path: self.path.append(path))
            module.register_forward_hook(self._leave)
        model.requires_grad_(False)
        device = next(model.parameters()).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def _forget(self) -> None:
        """Forget the forward pass before."""
        self.path: list[str] = []
        self.visited: dict[str, Rule] = {}
        self.vouched: set[Any] = set()
        self.aliases: dict[int, tuple[Tensor, Key, bool]] = {}
        self.leaves: dict[Key, Tensor] = {}
        self.made: dict[Any, str] = {}
        self.held: list[Tensor] = []
        self.changes = Changes(self.vouch, self.refuse)
        self.origins = Origins(self.fixed)
        self.readers: list[str] = []
        self.shares, self.counts, self.number = False, False, 0
        modules = self.model.modules() if self.collector.samplewise else ()
        held = (t for module in modules for t in tensors(list(vars(module).values())))
        self.kept = {memory(t): t for t in held}  # and not made by this pass

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, connected to the images and to the collector."""
        self._forget()
        self.recording = torch.is_grad_enabled()
        self.running, self.images = True, images
        self.origins.read(images)
        try:
            with self:
                return self.model(images)
        finally:
            self.running = False

    def half(self, x: Tensor) -> Tensor:
        """A product just made, at half the gradient: two factors share relevance equally."""
        if x.requires_grad and not self.ordinary:
            x.register_hook(lambda g: g / 2)
        return x

    def _leave(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        if not self.running and any(t.requires_grad for t in tensors(outputs)):
            raise self.refuse(
                "a part that runs once more in the backward pass",
                "switch torch.utils.checkpoint off in evaluation mode",
            )
        current = self.changes.current(outputs)
        self._audit(current)
        self.path.pop()
        return current

    def _audit(self, values: Any) -> list[Tensor]:
        """Tensors that carry relevance; they must come from functions seen here."""
        tracked = [t for t in tensors(values) if t.requires_grad]
        for t in tracked:
            if t.grad_fn is not None and t.grad_fn not in self.vouched and not self.ordinary:
                raise self.refuse(
                    f"a gradient of its own ({type(t.grad_fn).__name__})",
                    "replace compiled code and custom autograd functions by torch's functions, and "
                    "keep no activations of one pass for the next",
                )
            if t.grad_fn is None and not (self.ordinary or self.origins.raw(t)):
                raise self.refuse(
                    f"a tensor {list(t.shape)} that requires gradients and is no parameter of the "
                    "model",
                    "register it (nn.Parameter, nn.ModuleList, register_buffer), or detach it; a "
                    "hook reads it from the module that it is given",
                )
        return tracked

    def refuse(self, what: str, advice: str = "") -> UnsupportedLayerError:
        """The error for something at the current module."""
        path = self.path[-1] if self.path else ""
        kind = type(self.model.get_submodule(path)).__name__
        return UnsupportedLayerError(
            f"no relevance rule for {what} in module {path or '(the model itself)'!r} ({kind}): "
            + (advice or "replace it by supported layers, or score the model without this part")
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Replace one torch call by its relevance-propagating form."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        name = "item" if name in kinds.NUMBERS else name
        name = (func.__self__.__name__ if name == "__get__" else name).strip("_")
        if name in kinds.UNSEEN:
            return func(*args, **kwargs)
        if not any(True for _ in tensors((args, kwargs))):
            result = func(*args, **kwargs)  # it may switch gradients or autocast: nothing around it
            self.origins.note((), result)
            return result
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors((args, kwargs))):
            raise self.refuse(f"{name!r} inside torch.func", "write vmap or grad out as a loop")
        with ExitStack() as stack:
            stack.enter_context(full_precision())
            if self.recording and torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if self.recording and not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            args, kwargs = self.changes.current((args, kwargs))
            self.counts |= self.collector.samplewise and self._counts(name, args, kwargs)
            if name not in LAYERS and name not in NORMALISATIONS:
                args = kinds.positional(args, kwargs)
            scored = [t for t in tensors((args, kwargs)) if place(self, t)]
            if name in LAYERS or (name in NORMALISATIONS and not self.ordinary and not scored):
                self._audit((args, kwargs))
                result = {**LAYERS, **NORMALISATIONS}[name](self, *args, **kwargs)
            elif scored and name not in kinds.CONSTANTS:
                result = used(self, func, name, args, kwargs)
            else:
                result = self.applied(func, name, args, kwargs)
            if name not in LAYERS:
                made_of = [t for t in tensors((args, kwargs)) if t.requires_grad]
                result = computed(result, made_of) if made_of else result
                if not scored:
                    target = args[:1] if is_inplace(func) else ()
                    read = () if name in kinds.CONSTANTS else (args, kwargs)
                    read = args[:1] if name in kinds.LIKE | {"to"} else read
                    self.origins.note(read, (result, target))
            return self.vouch(result)

    def _counts(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether a function chooses among rows by values that depend on the images."""
        if name == "getitem":
            index = args[1] if isinstance(args[1], tuple) else args[1:]
            bounds = [(i.start, i.stop, i.step) for i in index if isinstance(i, slice)]
            masks = [t for t in tensors(index) if t.dtype in (torch.bool, torch.uint8)]
            by = [*tensors(bounds), *masks]
        elif name == "where":
            by = list(tensors((args, kwargs))) * (len(args) + len(kwargs) == 1)
        elif name == "repeat_interleave":
            by = list(tensors((args[1:], kwargs)))
        elif name in ("item", "tolist", "index"):  # branches show by which layers are used
            by = [t for t in tensors(args) if t.dtype != torch.bool or name == "tolist"]
        else:
            by = list(tensors((args, kwargs))) * (name in kinds.COUNTING)
        return any(not self.origins.constant(t) and memory(t) not in self.kept for t in by)

    def vouch(self, result: Any) -> Any:
        """The same; its tensors carry relevance as a function seen here made them."""
        self.vouched.update(t.grad_fn for t in tensors(result) if t.requires_grad)
        return result

    def applied(self, func: Callable, name: str, args: Any, kwargs: dict) -> Any:
        """The result of a function that is no layer."""
        if name in kinds.LIKE:
            args = args[0], *(other.detach() for other in args[1:])
        tracked = self._audit((args, kwargs))
        if self.ordinary or not tracked or name in kinds.CONSTANTS:
            return func(*args, **kwargs)
        func, args, kwargs, target = out_of_place(func, name, args, kwargs)
        result = passed(self, func, name, len(tracked), args, kwargs)
        if target is not None:
            self.changes.note(target, result)
        if any(hasattr(t, "factor") for t in tracked):
            hand_on(func, name, args, kwargs, result)
        return result

    def layer(
        self, a: Tensor, w: Tensor, b: Tensor | None, operation: Operation, key: Key | None = None
    ) -> Tensor:
        """Output of a linear map of known weight, or of a constant."""
        w = straightened(self, w)
        key = key or self.key(w)
        path = key[0].rpartition(".")[0] if key else self.path[-1]
        first = self.origins.raw(a)
        rule = self.choose(path, bool(operation.options), first)
        if rule.name in DIRECT and not first:
            raise ValueError(
                f"rule {rule.name!r} is for the layer that reads the images, not {path!r}"
            )
        self.readers += [path] if first else []
        layer = self.use(a, operation, rule, key, path)
        active = b is not None and b.requires_grad  # an activation: one more term of the sum
        result = Propagate.apply(a, self.anchor, w, None if active else b, layer)
        self.made[result.grad_fn] = key[0] if key else ""
        return result + b.reshape(-1, *[1] * (w.dim() - 2)) if b is not None and active else result

    def use(
        self, a: Tensor, operation: Operation, rule: Rule, key: Key | None, path: str | None = None
    ) -> Layer:
        """Note one more use of a layer, at ``path`` or else at the current module, on ``a``."""
        self.visited[self.path[-1] if path is None else path] = rule
        layer = Layer(operation, rule, self.collector, key)
        self.collector.use(layer, a)
        return layer

    def key(self, w: Tensor) -> Key | None:
        """Where the relevance of a weight is collected; None for constants."""
        if at := place(self, w):
            return at[0]
        if hasattr(w, "computed"):
            multiplies(w)
            return None
        if self.origins.constant(w):
            return None
        raise self.refuse(
            "a weight that is computed from the images, or that the model holds as a plain tensor",
            "make it a parameter of a layer, or a buffer if it is a constant",
        )

    def product(self, one: Tensor, other: Tensor, multiply: Multiply = torch.mul) -> Tensor:
        """The product of two activations, sharing relevance by the current module's rule."""
        factors = [getattr(t, "factor", None) for t in (one, other)]
        self.held += [t for t, f in zip((one, other), factors, strict=True) if f is not None]
        normal = [isinstance(f, Normaliser) for f in factors]
        if any(normal) and not all(normal):
            return multiply(one.detach(), other) if normal[0] else multiply(one, other.detach())
        how = self.choose(self.path[-1] if self.path else "", False, False).gate
        product = None if self.ordinary else shared(one, other, how, multiply)
        return self.half(multiply(one, other)) if product is None else product
