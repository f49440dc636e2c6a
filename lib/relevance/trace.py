"""How a forward pass is followed: what each torch function does to relevance."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..inputs import UnsupportedLayerError, full_precision, tensors
from .changes import Changes, out_of_place
from .functions import LAYERS, NORMALISATIONS, Gate, spread
from .layers import Activate, Collector, Key, Layer, Propagate
from .operations import Operation
from .rules import DIRECT, Chooser, Rule
from .weights import place, refusal, used

# Relevance splits in proportion to the terms of a sum or goes where the value came from: both are
# what the ordinary gradient does. So is the first-order rule of softmax (Achtibat et al. 2024).
_GRADIENT = """add radd sub rsub subtract neg negative sum mean cat concat concatenate stack hstack
    vstack dstack flatten unflatten reshape view view_as permute transpose t T mT swapaxes swapdims
    movedim moveaxis squeeze unsqueeze expand expand_as broadcast_to contiguous clone to float
    double type type_as getitem chunk tensor_split split unbind select narrow index_select gather
    take_along_dim pad roll flip repeat repeat_interleave tile masked_fill where relu leaky_relu
    prelu threshold avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d amax amin max min maximum minimum dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_alpha_dropout softmax interpolate upsample pixel_shuffle
    pixel_unshuffle channel_shuffle unfold fold tril triu diagonal
    reshape_as setitem copy zero"""
_ELEMENTWISE = """gelu silu mish elu selu celu tanh sigmoid hardswish hardsigmoid hardtanh relu6
    softplus logsigmoid softsign clamp clamp_min clamp_max clip hardshrink softshrink tanhshrink
    rrelu"""
GRADIENT, ELEMENTWISE = frozenset(_GRADIENT.split()), frozenset(_ELEMENTWISE.split())
ELEMENTWISE_PRODUCTS = {"mul", "rmul", "multiply"}
PRODUCTS = ELEMENTWISE_PRODUCTS | {"matmul", "rmatmul", "bmm", "mm", "einsum"}
QUOTIENTS = {"div", "divide", "truediv", "true_divide"}
CONSTANTS = {
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like",
}  # fmt: skip
UNSEEN = {"grad_fn", "requires_grad", "register_hook"}
GATES = {"sigmoid", "hardsigmoid"}
_AFFINE = """add radd sub rsub mul rmul div truediv multiply divide flatten unflatten reshape view
    view_as permute transpose t T mT squeeze unsqueeze expand expand_as broadcast_to contiguous
    clone to float getitem select narrow repeat repeat_interleave tile interpolate upsample"""
KEPT = frozenset(_AFFINE.split())  # a gate is one still after these
ADVICE = {
    "log_softmax": "let the model return logits",
    "detach": "score the model without detaching activations",
    "lstm": "score the layers around the recurrence separately",
    "gru": "score the layers around the recurrence separately",
}


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
        Module path of each layer that the last forward pass used -> its rule, in order.
    """

    def __init__(
        self, model: nn.Module, choose: Chooser, collector: Collector, names: dict[int, str],
        ordinary: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.model, self.choose, self.collector = model, choose, collector
        self.names, self.ordinary = names, ordinary
        own = {id(p) for p in model.parameters()} - names.keys()
        self.fixed = {id(b) for b in model.buffers()} | own
        self.aliases: dict[int, tuple[Tensor, Key, bool]] = {}
        self.changes, self.running = Changes(self.vouch), False
        self.path: list[str] = []
        self.visited: dict[str, Rule] = {}
        self.vouched: set[Any] = set()
        for path, module in model.named_modules():
            self.path = [path]
            if isinstance(module, torch.jit.ScriptModule):
                raise self.refuse("compiled code", "score the model before compiling it")
            module.register_forward_pre_hook(lambda *_, path=path: self.path.append(path))
            module.register_forward_hook(self._leave)
        model.requires_grad_(False)
        device = next(model.parameters()).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, connected to the images and to the collector."""
        self.path.clear()
        self.visited.clear()
        self.vouched.clear()
        self.aliases.clear()
        self.changes = Changes(self.vouch)
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
        module = type(self.model.get_submodule(path)).__name__
        return UnsupportedLayerError(
            f"no relevance rule for {what} in module {path or '(the model itself)'!r} ({module}): "
            + (advice or "replace it by supported layers, or score the model without this part")
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Replace one torch call by its relevance-propagating form."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        name = (func.__self__.__name__ if name == "__get__" else name).strip("_")
        if name in UNSEEN or not any(True for _ in tensors((args, kwargs))):
            return func(*args, **kwargs)  # it may switch gradients or autocast: nothing around it
        with ExitStack() as stack:
            stack.enter_context(full_precision())
            if self.recording and torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if self.recording and not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            args, kwargs = self.changes.current((args, kwargs))
            scored = [t for t in tensors((args, kwargs)) if place(self, t)]
            if name in LAYERS or (name in NORMALISATIONS and not self.ordinary and not scored):
                self._audit((args, kwargs))
                result = {**LAYERS, **NORMALISATIONS}[name](self, *args, **kwargs)
            elif scored and name not in CONSTANTS:
                result = used(self, func, name, args, kwargs)
            else:
                result = self.applied(func, name, args, kwargs)
            return self.vouch(result)

    def vouch(self, result: Any) -> Any:
        """The same; its tensors carry relevance as a function seen here made them."""
        self.vouched.update(t.grad_fn for t in tensors(result) if t.requires_grad)
        return result

    def applied(self, func: Callable, name: str, args: Any, kwargs: dict) -> Any:
        """The result of a function that is no layer."""
        tracked = self._audit((args, kwargs))
        if self.ordinary or not tracked or name in CONSTANTS:
            return func(*args, **kwargs)
        func, args, kwargs, target = out_of_place(func, name, args, kwargs)
        result = self._propagate(func, name, len(tracked), args, kwargs)
        if target is not None:
            self.changes.note(target, result)
        if name in KEPT and len(tracked) == 1 and isinstance(result, Tensor):
            for gate in (t.gate for t in tracked if hasattr(t, "gate")):
                result.gate = gate.after(func, args, kwargs, result)  # type: ignore[attr-defined]
        return result

    def carries(self, name: str) -> bool:
        """Whether relevance passes a function to each of its arguments alike."""
        return name in GRADIENT or name in ELEMENTWISE

    def _propagate(self, func: Callable, name: str, tracked: int, args: Any, kwargs: dict) -> Any:
        if name in ELEMENTWISE:
            with torch.no_grad():
                out = func(*args, **kwargs)
            x = args[0] if args else kwargs["input"]
            result = Activate.apply(x, out)
            if name in GATES:
                result.gate = Gate.of(x, result, name)
            return result
        if name in ("add", "radd"):
            args = spread(self, args)
        if name in GRADIENT:
            return func(*args, **kwargs)
        if name in PRODUCTS or name in QUOTIENTS:
            if name in QUOTIENTS and any(t.requires_grad for t in tensors(args[1:])):
                raise self.refuse("division by an activation")
            if tracked > 2:
                raise self.refuse(f"a product of {tracked} activations")
            if tracked == 2 and sum(gates := [_is_gate(name, t) for t in args[:2]]) == 1:
                return self.gated(args[not gates[1]], args[gates[1]].gate)
            return func(*args, **kwargs) if tracked == 1 else self.half(func(*args, **kwargs))
        result = None if name in ("item", "tolist", "numpy") else func(*args, **kwargs)
        if result is None or any(t.is_floating_point() for t in tensors(result)):
            raise self.refuse(f"{name!r}", ADVICE.get(name, ""))
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
        return Propagate.apply(a, self.anchor, w, b, layer)

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
        if id(w) in self.fixed:
            return None
        raise self.refuse(
            "a weight computed in the forward pass",
            "make it a parameter (torch.nn.utils.parametrize.remove_parametrizations)",
        )

    def gated(self, signal: Tensor, gate: "Gate") -> Tensor:
        """The product of a signal and a gate, sharing relevance by the current module's rule."""
        how = self.choose(self.path[-1] if self.path else "", False, False).gate
        if how == "half" or self.ordinary:
            return self.half(signal * gate.value)
        if how == "signal":
            return signal * gate.value.detach()
        return gate.times(signal)


def _is_gate(name: str, value: Any) -> bool:
    return name in ELEMENTWISE_PRODUCTS and isinstance(getattr(value, "gate", None), Gate)
