"""How a forward pass is followed: what each torch function does to relevance."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..inputs import UnsupportedLayerError, full_precision, tensors
from . import kinds
from .changes import Changes, out_of_place
from .factors import Held, Multiply, Normaliser, activated, hand_on, shared, shifted, swap
from .functions import LAYERS, spread
from .layers import Collector, Key, Layer, Propagate
from .norms import NORMALISATIONS
from .operations import Operation
from .rules import DIRECT, Chooser, Rule
from .weights import computed, place, refusal, used


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
    """

    def __init__(
        self, model: nn.Module, choose: Chooser, collector: Collector, names: dict[int, str],
        ordinary: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.model, self.choose, self.collector = model, choose, collector
        self.names, self.ordinary = names, ordinary
        own = (p for p in model.parameters() if id(p) not in names)
        self.fixed = {t.untyped_storage().data_ptr() for t in (*model.buffers(), *own)}
        self.running = False
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

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, connected to the images and to the collector."""
        self._forget()
        self.recording = torch.is_grad_enabled()
        self.running = True
        try:
            with self:
                return self.model(images)
        finally:
            self.running = False

    def half(self, x: Tensor) -> Tensor:
        """The same value at half the gradient: two factors share relevance equally."""
        return x if self.ordinary else (x + x.detach()) / 2

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
                    "replace compiled code and custom autograd functions by torch's functions",
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
        if name in kinds.UNSEEN or not any(True for _ in tensors((args, kwargs))):
            return func(*args, **kwargs)  # it may switch gradients or autocast: nothing around it
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors((args, kwargs))):
            raise self.refuse(f"{name!r} inside torch.func", "write vmap or grad out as a loop")
        with ExitStack() as stack:
            stack.enter_context(full_precision())
            if self.recording and torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if self.recording and not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            args, kwargs = self.changes.current((args, kwargs))
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
            return self.vouch(result)

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
        result = self._propagate(func, name, len(tracked), args, kwargs)
        if target is not None:
            self.changes.note(target, result)
        if any(hasattr(t, "factor") for t in tracked):
            hand_on(func, name, args, kwargs, result)
        return result

    def _propagate(self, func: Callable, name: str, tracked: int, args: Any, kwargs: dict) -> Any:
        if name in kinds.FUSED:
            product, scale = kinds.FUSED[name]
            count = _tracked(args[1:])
            term = (
                self._propagate(product, product.__name__, count, args[1:], {})
                if count else product(*args[1:])
            )  # fmt: skip
            return args[0] * kwargs.get("beta", 1) + term * kwargs.get(scale, 1)
        constant = name in kinds.QUOTIENTS and not _tracked(args[:1])
        power = name == "pow" and not _tracked(args[1:])  # of an activation to a constant
        constant |= power and not bool((torch.as_tensor(args[1]) > 0).all())
        if constant or name in kinds.RECIPROCALS:
            return self._reciprocal(func, name, args, kwargs)
        if name in kinds.FIRST and _tracked((args[1:], kwargs)):
            raise self.refuse(f"{name!r} of more than one activation", kinds.ADVICE[name])
        bound = name in kinds.BOUNDS and tracked > 1  # an activation itself: as in minimum
        if power or (name in kinds.ELEMENTWISE and not bound):
            with torch.no_grad():
                out = func(*args, **kwargs)
            return activated(out, name, func, args, kwargs)
        if name in ("add", "radd"):
            args = spread(self, args)
            return shifted(func(*args, **kwargs), args, kwargs)
        if name in kinds.GRADIENT or bound:
            return func(*args, **kwargs)
        if name == "var":  # of degree two: its gradient would bring twice its relevance
            return self.half(func(*args, **kwargs))
        if name in kinds.QUOTIENTS and kwargs.get("rounding_mode") is None:
            self.held += [t for t in args[1:2] if isinstance(t, Tensor)]
            divisor = args[1].detach() if isinstance(args[1], Tensor) else args[1]
            return func(args[0], divisor, *args[2:], **kwargs)
        if name in kinds.PRODUCTS:
            return self._product(func, name, tracked, args, kwargs)
        result = None if name in ("item", "tolist", "numpy") else func(*args, **kwargs)
        if result is not None and not any(t.is_floating_point() for t in tensors(result)):
            return result
        raise self.refuse(f"{name!r}", kinds.ADVICE.get(name, ""))

    def _product(self, func: Callable, name: str, tracked: int, args: Any, kwargs: dict) -> Tensor:
        if tracked > 2:
            raise self.refuse(f"a product of {tracked} activations")
        weights = [t for t in tensors((args, kwargs)) if hasattr(t, "computed")]
        if tracked < 2 or len(weights) == 1:  # linear in the activation, as a layer is
            return func(*args, **kwargs)
        one, other = (t for t in tensors((args, kwargs)) if t.requires_grad)
        if one is other:
            return self.half(func(*args, **kwargs))
        return self.product(one, other, swap(func, args, kwargs, one, other))

    def _reciprocal(self, func: Callable, name: str, args: Any, kwargs: dict) -> Tensor:
        with torch.no_grad():
            out = func(*args, **kwargs)
        x = next(t for t in tensors((args, kwargs)) if t.requires_grad)
        error = self.refuse(
            f"the reciprocal of an activation ({name!r}) that is no factor of another one",
            "multiply the activation that it normalises by it, or divide that one",
        )
        result = Held.apply(x, out, error)
        result.factor = Normaliser()
        return result

    def layer(
        self, a: Tensor, w: Tensor, b: Tensor | None, operation: Operation, key: Key | None = None
    ) -> Tensor:
        """Output of a linear map of known weight, or of a constant."""
        key = key or self.key(w)
        path = key[0].rpartition(".")[0] if key else self.path[-1]
        rule = self.choose(path, bool(operation.options), not self.visited)
        if rule.name in DIRECT and self.visited.keys() - {path}:
            raise ValueError(
                f"rule {rule.name!r} is for the layer that reads the images, not {path!r}"
            )
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
            if at[1]:
                raise refusal(self, at[0], "linear, transposed")
            return at[0]
        if hasattr(w, "computed") or w.untyped_storage().data_ptr() in self.fixed:
            return None
        raise self.refuse(
            "a weight computed in the forward pass",
            "make it a parameter (torch.nn.utils.parametrize.remove_parametrizations)",
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


def _tracked(values: Any) -> int:
    return sum(t.requires_grad for t in tensors(values))
