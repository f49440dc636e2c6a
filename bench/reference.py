"""Relevance of every weight a second way: from the graph of ATen operations, in float64.

``lib.relevance`` replaces torch's functions while a model runs. Here the model is first traced to
the far more primitive operations below them; in this graph the factors that a rule holds constant
are detached, and torch's own autograd does the rest: with ``epsilon`` and no stabiliser, relevance
of a weight is weight x gradient of the graph so modified. The two share no code.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

_VIEWS = """t transpose permute view _unsafe_view reshape unsqueeze squeeze expand clone _to_copy
    slice select split split_with_sizes getitem alias detach contiguous"""
_ELEMENTWISE = """relu gelu silu mish elu selu celu leaky_relu hardswish hardtanh softplus
    log_sigmoid_forward clamp clamp_min clamp_max hardshrink softshrink sqrt relu6 square threshold
    prelu _prelu_kernel abs log1p expm1 atan"""
LOOKUPS = {"embedding", "index", "index_select", "gather"}  # of activations, though in weights
VIEWS = set(_VIEWS.split())
AFFINE = VIEWS | {"add", "sub", "rsub", "mul", "div"}
RESTING = {"sigmoid": 0.5, "hardsigmoid": 0.5, "tanh": 0.0, "erf": 0.0}  # value at zero
ELEMENTWISE = {*RESTING, *_ELEMENTWISE.split()}
PRODUCTS = {"mul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2),
            "addcmul": (1, 2), "convolution": (0, 1), "dot": (0, 1), "mv": (0, 1)}  # fmt: skip


def reference(model: nn.Module, images: Tensor, labels: Tensor, names: list[str]) -> dict:
    """Weight x modified gradient, summed over samples, for the weights of these names.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode and float64; returns logits.
    images, labels : Tensor
        As for ``lib.relevance.weight_relevance`` with ``rule="epsilon"``, ``start="target"``.
    names : list of str
        Of parameters of the model.

    Returns
    -------
    dict of str to Tensor
        Name -> relevance, shaped like the weight.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    weights = {name: model.get_parameter(name).detach() for name in names}

    def logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(model, weights, (images,))

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            # values that the forward pass asks for are taken as they are for these images
            trace = make_fx(functionalize(logits), _error_on_data_dependent_ops=False)
            graph = trace(weights, images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    leaves = [w.clone().requires_grad_() for w in weights.values()]
    run = _Modified(graph, len(leaves))
    with torch.enable_grad():
        shown = images.detach().clone()  # they take their share where they are a factor
        shown.requires_grad_(shown.is_floating_point())
        out = run.run(*leaves, shown, enable_io_processing=False)
        out = out if isinstance(out, Tensor) else out[0]  # [samples, classes]
        out.gather(1, labels[:, None]).sum().backward()
    return {
        name: torch.zeros_like(leaf) if leaf.grad is None else (leaf * leaf.grad).detach()
        for name, leaf in zip(weights, leaves, strict=True)
    }


class _Modified(fx.Interpreter):
    """The graph's forward pass with what the rules hold constant detached."""

    def __init__(self, graph: fx.GraphModule, weights: int):
        super().__init__(graph, garbage_collect_values=False)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.weights = set(placeholders[:weights])  # and what is made of them alone
        self.fed = set(placeholders[weights:])  # and what depends on the images

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        name = _name(node)
        if name in ("view", "_unsafe_view") and not isinstance(args[1], torch.dtype):
            node.target = torch.ops.aten.reshape.default  # strides differ here from the trace's
        if self.fed.intersection(node.all_input_nodes):
            self.fed.add(node)
        elif name not in LOOKUPS and self.weights.intersection(node.all_input_nodes):
            layers = {"mm": (0, 1), "addmm": (1, 2), "convolution": (0, 1)}.get(name, ())
            if all(node.args[place] in self.weights for place in layers):
                self.weights.add(node)  # a view of one, or computed from some
            # else what a layer makes of a constant, such as positions: an activation
        active = [
            _active(a) and n not in self.weights for a, n in zip(args, node.args, strict=True)
        ]
        if not any(active) and not any(map(_active, _flat(args))):
            return node.target(*args, **kwargs)
        if name in ELEMENTWISE or (name == "pow" and _positive(args[1])):
            with torch.no_grad():
                out = node.target(*args, **kwargs)
            if isinstance(out, tuple):  # log_sigmoid_forward
                return (_through(args[0], out[0]), *out[1:])
            return _through(args[0], out)
        if name in ("rsqrt", "reciprocal", "pow"):
            return node.target(*args, **kwargs).detach()
        if name == "div" and isinstance(args[1], Tensor):
            return node.target(args[0], args[1].detach(), *args[2:], **kwargs)
        if name in PRODUCTS:
            first, second = PRODUCTS[name]
            if active[first] and active[second]:
                return self._product(node, name, args, kwargs, first, second)
        if name in ("native_layer_norm", "native_group_norm"):
            return (_normalise(name, *args), None, None)
        if name == "native_batch_norm" and args[5]:  # of a weight: weight standardisation
            x, gain, shift, _, _, _, _, eps = args
            dims = (0, *range(2, x.dim()))
            centred = x - x.mean(dims, keepdim=True)
            out = centred / (centred.detach().square().mean(dims, keepdim=True) + eps).sqrt()
            shape = (1, -1, *[1] * (x.dim() - 2))
            out = out if gain is None else out * gain.view(shape)
            return (out if shift is None else out + shift.view(shape)), None, None
        if name == "_weight_norm_interface":
            v, g, *dim = args
            return v * (g / torch.norm_except_dim(v.detach(), 2, *dim)), None
        if name == "var":
            return _half(node.target(*args, **kwargs))
        if name == "glu":
            signal, x = args[0].chunk(2, args[1] if len(args) > 1 else -1)
            return _shapley(signal, x.sigmoid(), torch.full_like(x, 0.5), _moved("sigmoid", x))
        if name == "detach":
            return args[0]
        return node.target(*args, **kwargs)

    def _product(self, node, name, args, kwargs, first, second) -> Tensor:
        if name == "mul":
            gates = [self._gate(n) for n in node.args[:2]]
            if sum(g is not None for g in gates) == 1:
                which = 0 if gates[0] is not None else 1
                rest, moved = gates[which]
                return _shapley(args[1 - which], args[which], rest, moved)
        if name in ("addmm", "baddbmm", "addcmul"):
            ones = [torch.zeros_like(args[0]), *args[1:]]
            return args[0] * kwargs.get("beta", 1) + _half(node.target(*ones, **kwargs))
        return _half(node.target(*args, **kwargs))

    def _gate(self, node: Any) -> tuple[Tensor, Tensor] | None:
        """What a factor would be were its sigmoid's input zero, and how it moves from there."""
        chain = []
        while isinstance(node, fx.Node) and _name(node) not in RESTING:
            active = [n for n in node.all_input_nodes if _active(self.env[n])]
            if _name(node) not in AFFINE or len(active) != 1:
                return None
            if _name(node) == "div" and node.args[0] is not active[0]:
                return None
            chain.append((node, active[0]))
            node = active[0]
        if not isinstance(node, fx.Node):
            return None
        x = self.env[node.args[0]]
        rest = torch.full_like(x, RESTING[_name(node)])
        moved = _moved(_name(node), x)
        for step, source in reversed(chain):
            results = []
            for value in (rest, moved):
                env = {**{n: self.env[n] for n in step.all_input_nodes}, source: value}
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), env.__getitem__)
                results.append(step.target(*args, **kwargs))
            rest, moved = results
        return None if not isinstance(rest, Tensor) or not rest.any() else (rest, moved)


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def _flat(args: Any) -> list:
    return [a for group in args for a in (group if isinstance(group, (list, tuple)) else [group])]


def _active(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _positive(exponent: Any) -> bool:
    return bool(torch.as_tensor(exponent).min() > 0)


def _half(value: Tensor) -> Tensor:
    return (value + value.detach()) / 2


def _through(x: Tensor, out: Tensor) -> Tensor:
    """The value ``out``, whose relevance goes to ``x`` as it is."""
    x0 = x.detach()
    slope = torch.where(x0 == 0, 0.0, out / torch.where(x0 == 0, 1.0, x0))
    return x * slope + (out - x0 * slope)


def _moved(name: str, x: Tensor) -> Tensor:
    """A sigmoid's value at rest and, linear in x, what moves it away."""
    at = {"sigmoid": torch.sigmoid, "hardsigmoid": nn.functional.hardsigmoid,
          "tanh": torch.tanh, "erf": torch.erf}[name]  # fmt: skip
    with torch.no_grad():
        moved = at(x) - RESTING[name]
    return _through(x, moved) + RESTING[name]


def _shapley(signal: Tensor, gate: Tensor, rest: Tensor, moved: Tensor) -> Tensor:
    at_rest = signal * (gate.detach() + rest.detach()) / 2
    return at_rest + signal.detach() * (moved - rest.detach()) / 2


def _normalise(name: str, x: Tensor, *rest: Any) -> Tensor:
    if name == "native_layer_norm":
        shape, weight, bias, eps = rest
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        out = centred / (centred.detach().var(dims, correction=0, keepdim=True) + eps).sqrt()
        return (out if weight is None else out * weight) + (0 if bias is None else bias)
    weight, bias, n, channels, _, groups, eps = rest
    rows = x.reshape(n, groups, -1)
    centred = rows - rows.mean(2, keepdim=True)
    out = centred / (centred.detach().var(2, correction=0, keepdim=True) + eps).sqrt()
    out, shape = out.reshape(x.shape), (1, channels, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)
