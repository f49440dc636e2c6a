"""Relevance written out connection by connection, in float64: slow, obvious, and nothing else.

Written from the equations, without a look at ``lib.relevance``. A layer with weights is the list of
its connections ``z_k = Σ_n f_n · w_{p(n)} · a_{j(n)} + b_k``, found by feeding unit inputs
through unit weights; no gradient is taken anywhere but for the winner of a max pooling. Every rule
is then one sentence about single contributions ``c_n = f_n w_p a_j``: the relevance that connection
n carries from output k is summed over the connections of a weight, or over those of an input.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class OracleRule:
    """A rule's name and constants; ``epsilon`` stabilises the denominator of every rule."""

    name: str
    epsilon: float = 1e-6
    gamma: float = 0.25
    low: Tensor | None = None  # for box: one bound per input value
    high: Tensor | None = None


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """``z + ε sign(z)`` with sign(0) = +1."""
    return z + epsilon * torch.where(z >= 0, 1.0, -1.0).to(z)


def ratio(numerator: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """``numerator / (z + ε sign(z))``, where 0 / 0 carries nothing."""
    denominator = stabilised(z, epsilon)
    empty = (denominator == 0) & (numerator == 0)
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def start_relevance(logits: Tensor, labels: Tensor, start: str) -> Tensor:
    """Relevance [N, C] of the outputs, entry by entry."""
    samples, classes = logits.shape
    relevance = torch.zeros_like(logits)
    for n in range(samples):
        t = int(labels[n])
        p = torch.exp(logits[n] - logits[n].max())
        p = p / p.sum()
        for k in range(classes):
            if start == "target":
                relevance[n, k] = logits[n, k] if k == t else 0
            elif start == "contrastive":
                relevance[n, k] = logits[n, k] if k == t else -logits[n, k] / (classes - 1)
            elif start == "softmax-gradient":
                relevance[n, k] = p[t] * ((1.0 if k == t else 0.0) - p[k])
            else:
                raise ValueError(start)
    return relevance


@dataclass
class Connections:
    """All connections of a layer: output, weight and input index and the fixed factor of each."""

    out: Tensor
    weight: Tensor
    inp: Tensor
    factor: Tensor
    out_shape: torch.Size

    def sum_to(self, what: str, messages: Tensor, count: int) -> Tensor:
        """Sum messages [N, connections] over those which share an output, weight or input."""
        index = getattr(self, what)
        return messages.new_zeros(len(messages), count).index_add(1, index, messages)


def connect(f: Callable[[Tensor, Tensor], Tensor], weight_shape, input_shape) -> Connections:
    """Find the connections of ``f(weight, inputs)``, linear in both, by unit weights and inputs.

    ``input_shape`` is that of one sample; ``f`` sees a batch.
    """
    inputs = torch.Size(input_shape).numel()
    units = torch.eye(inputs, dtype=torch.float64).reshape(inputs, *input_shape)
    found, shape = [], torch.Size()
    for p in range(torch.Size(weight_shape).numel()):
        weight = torch.zeros(weight_shape, dtype=torch.float64)
        weight.view(-1)[p] = 1
        with torch.no_grad():
            response = f(weight, units)
        shape, response = response.shape[1:], response.reshape(inputs, -1)
        j, k = response.nonzero(as_tuple=True)
        found.append((k, torch.full_like(k, p), j, response[j, k]))
    return Connections(*(torch.cat(column) for column in zip(*found, strict=True)), shape)


def carry(rule: OracleRule, links: Connections, weight, bias, a, relevance) -> Tensor:
    """Relevance every connection carries down, [N, connections].

    ``weight`` [P], ``bias`` [K], inputs ``a`` [N, J] and ``relevance`` [N, K] are flat.
    """
    w = weight[links.weight]
    c = links.factor * w * a[:, links.inp]
    count, eps = relevance.shape[1], rule.epsilon

    def share(part: Tensor, part_bias) -> Tensor:
        z = links.sum_to("out", part, count) + part_bias
        return ratio(part, z[:, links.out], eps)

    plus, minus = c.clamp(min=0), c.clamp(max=0)
    if rule.name == "epsilon":
        shares = share(c, bias)
    elif rule.name == "lrp-0":
        z = links.sum_to("out", c, count) + bias
        shares = ratio(c, z[:, links.out], 0.0)
    elif rule.name == "zplus":
        shares = share(plus, bias.clamp(min=0))
    elif rule.name == "alpha2beta1":
        shares = 2 * share(plus, bias.clamp(min=0)) - share(minus, bias.clamp(max=0))
    elif rule.name == "gamma":
        z = (links.sum_to("out", c, count) + bias)[:, links.out]
        up = share(c + rule.gamma * plus, bias + rule.gamma * bias.clamp(min=0))
        down = share(c + rule.gamma * minus, bias + rule.gamma * bias.clamp(max=0))
        shares = torch.where(z > 0, up, torch.where(z < 0, down, 0.0))
    elif rule.name == "flat":
        shares = share(links.factor.expand_as(c), 0.0)
    elif rule.name == "box":
        low, high = rule.low.flatten()[links.inp], rule.high.flatten()[links.inp]
        corner = low * w.clamp(min=0) + high * w.clamp(max=0)
        shares = share(c - links.factor * corner, 0.0)
    else:
        raise ValueError(rule.name)
    return shares * relevance[:, links.out]


@dataclass(eq=False)
class Node:
    """One value of a forward pass, [N, ...], and the relevance that has reached it."""

    value: Tensor
    relevance: Tensor = None

    def __post_init__(self):
        self.relevance = torch.zeros_like(self.value)


@dataclass
class Tape:
    """A forward pass spelled out step by step, and relevance carried back through the steps.

    ``choose(name, module)`` gives the rule of a weighted layer; ``epsilon`` stabilises whatever has
    no weights (sums, averages, norms, attention).
    """

    choose: Callable[[str, object], OracleRule]
    epsilon: float = 1e-6
    steps: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)  # weight name -> relevance [N, *weight shape]
    quotients: dict = field(default_factory=dict)  # weight name -> R_k / z_k [N, *output shape]
    sums: dict = field(default_factory=dict)  # weight name -> Σ_k R_k per sample [N]
    lost: list = field(default_factory=list)  # relevance [N] that each softmax keeps to itself
    known: dict = field(default_factory=dict)  # weight name -> connections, to be found only once

    def _record(self, value: Tensor, back: Callable[[Node], None]) -> Node:
        node = Node(value.detach())
        self.steps.append((node, back))
        return node

    def backward(self, last: Node, relevance: Tensor) -> None:
        """Carry the relevance of the last node down to the inputs and weights."""
        last.relevance = relevance
        for node, back in reversed(self.steps):
            back(node)

    def affine(self, name: str, f, weight: Tensor, bias, node: Node, rule: OracleRule) -> Node:
        """``f(weight, inputs) + bias`` with f linear in both; ``bias`` broadcasts over outputs."""
        weight = weight.detach().double()
        if name not in self.known:
            self.known[name] = connect(f, weight.shape, node.value.shape[1:])
        links = self.known[name]
        offset = torch.as_tensor(0.0 if bias is None else bias).detach().double()
        offset = offset.expand(links.out_shape).reshape(-1)
        a = node.value.flatten(1)
        c = links.factor * weight.flatten()[links.weight] * a[:, links.inp]
        z = links.sum_to("out", c, links.out_shape.numel()) + offset

        def back(out: Node) -> None:
            upper = out.relevance.flatten(1)
            m = carry(rule, links, weight.flatten(), offset, a, upper)
            at_weights = links.sum_to("weight", m, weight.numel())
            at_inputs = links.sum_to("inp", m, a.shape[1])
            self.weights[name] = at_weights.reshape(-1, *weight.shape) + self.weights.get(name, 0)
            self.quotients[name] = ratio(upper, z, 0.0).reshape(out.value.shape)
            self.sums[name] = upper.sum(1)
            node.relevance += at_inputs.reshape(node.value.shape)

        return self._record(z.reshape(-1, *links.out_shape), back)

    def layer(self, name: str, module: nn.Module, node: Node) -> Node:
        """A Linear, convolution or transposed convolution."""
        zeros = {} if module.bias is None else {"bias": torch.zeros_like(module.bias).double()}
        bias = module.bias
        if bias is not None and not isinstance(module, nn.Linear):
            bias = bias.reshape(-1, *[1] * (node.value.dim() - 2))

        def f(w: Tensor, x: Tensor) -> Tensor:
            return functional_call(module, {"weight": w, **zeros}, (x,))

        return self.affine(
            f"{name}.weight", f, module.weight, bias, node, self.choose(name, module)
        )

    def activation(self, f, node: Node) -> Node:
        """Elementwise: relevance passes unchanged."""

        def back(out: Node) -> None:
            node.relevance += out.relevance

        return self._record(f(node.value), back)

    def move(self, f, node: Node) -> Node:
        """Entries copied, dropped, reordered or padded with zeros: relevance goes where they came
        from."""
        size = node.value[0].numel()
        units = torch.eye(size, dtype=torch.float64).reshape(size, *node.value.shape[1:])
        matrix = f(units).reshape(size, -1)

        def back(out: Node) -> None:
            node.relevance += (out.relevance.flatten(1) @ matrix.T).reshape(node.value.shape)

        return self._record(f(node.value), back)

    def mix(self, matrix: Tensor, offset, shape, node: Node, epsilon: float | None = None) -> Node:
        """``z_k = Σ_j M_kj a_j + offset_k`` with a matrix [N or 1, K, J] that is no parameter:
        relevance in proportion to ``M_kj a_j / (z_k + ε sign z_k)``."""
        a = node.value.flatten(1)
        c = matrix * a[:, None, :]
        z = c.sum(2) + offset
        eps = self.epsilon if epsilon is None else epsilon

        def back(out: Node) -> None:
            upper = out.relevance.flatten(1)
            shares = ratio(c, z[:, :, None].expand_as(c), eps)
            node.relevance += (shares * upper[:, :, None]).sum(1).reshape(node.value.shape)

        return self._record(z.reshape(len(z), *shape), back)

    def average(self, f, node: Node) -> Node:
        """Any linear map without parameters, such as average pooling."""
        size = node.value[0].numel()
        units = torch.eye(size, dtype=torch.float64).reshape(size, *node.value.shape[1:])
        response = f(units)
        return self.mix(response.reshape(size, -1).T[None], 0.0, response.shape[1:], node)

    def batchnorm(self, module: nn.Module, node: Node) -> Node:
        """BatchNorm in evaluation mode as the affine layer it is."""
        shape = node.value.shape[1:]
        scale = module.weight.detach().double() / (module.running_var.double() + module.eps).sqrt()
        offset = module.bias.detach().double() - module.running_mean.double() * scale
        ones = [1] * (len(shape) - 1)
        scale = scale.reshape(-1, *ones).expand(shape).reshape(-1)
        offset = offset.reshape(-1, *ones).expand(shape).reshape(-1)
        return self.mix(torch.diag(scale)[None], offset, shape, node)

    def standardise(self, members, gain, shift, eps: float, centre: bool, node: Node) -> Node:
        """``y_i = γ_i (x_i − mean) / σ + β_i`` with mean and σ over the entries of the same group,
        and σ a constant; without ``centre`` there is no mean and σ is the root of the mean square.

        ``members`` [J] numbers the group of every entry; ``gain`` and ``shift`` are [J].
        """
        x, size = node.value.flatten(1), len(members)
        matrix = torch.zeros(len(x), size, size, dtype=torch.float64)
        for group in members.unique():
            of = (members == group).nonzero().squeeze(1)
            mean = x[:, of].mean(1, keepdim=True) if centre else 0.0
            sigma = ((x[:, of] - mean).square().mean(1) + eps).sqrt()
            block = torch.eye(len(of), dtype=torch.float64) - (1 / len(of) if centre else 0.0)
            matrix[:, of[:, None], of] = gain[of, None] * block / sigma[:, None, None]
        return self.mix(matrix, shift, node.value.shape[1:], node)

    def norm(self, module: nn.Module, node: Node) -> Node:
        """LayerNorm or RMSNorm over the last axis, or GroupNorm over neighbouring channels."""
        shape = node.value.shape[1:]
        size, bias = shape.numel(), getattr(module, "bias", None)
        if isinstance(module, nn.GroupNorm):
            members = torch.arange(size) // (size // module.num_groups)
            channel = torch.arange(size) // (size // shape[0])
        else:
            members, channel = torch.arange(size) // shape[-1], torch.arange(size) % shape[-1]
        gain = module.weight.detach().double()[channel]
        shift = torch.zeros(size).double() if bias is None else bias.detach().double()[channel]
        eps = torch.finfo(torch.float64).eps if module.eps is None else module.eps
        centre = not isinstance(module, nn.RMSNorm)
        return self.standardise(members, gain, shift, eps, centre, node)

    def max_pool(self, f, node: Node) -> Node:
        """The winner of each window takes all: its Jacobian is 0 or 1."""

        def back(out: Node) -> None:
            for n, x in enumerate(node.value):
                jac = torch.autograd.functional.jacobian(lambda v: f(v[None])[0], x)
                node.relevance[n] += torch.einsum(
                    "k,kj->j", out.relevance[n].flatten(), jac.reshape(-1, x.numel())
                ).reshape(x.shape)

        return self._record(f(node.value), back)

    def add(self, *nodes: Node) -> Node:
        """A residual sum, split in proportion to its terms."""
        total = sum(node.value for node in nodes)

        def back(out: Node) -> None:
            for node in nodes:
                node.relevance += ratio(node.value, total, self.epsilon) * out.relevance

        return self._record(total, back)

    def cat(self, nodes: list[Node], dim: int) -> Node:
        """Concatenation; ``dim`` counts the batch axis."""

        def back(out: Node) -> None:
            parts = out.relevance.split([node.value.shape[dim] for node in nodes], dim)
            for node, part in zip(nodes, parts, strict=True):
                node.relevance += part

        return self._record(torch.cat([node.value for node in nodes], dim), back)

    def softmax(self, node: Node, allowed: Tensor | None = None) -> Node:
        """AttnLRP, softmax over the last axis: ``R_i = x_i (R'_i − s_i Σ_j R'_j)``; entries that
        are not ``allowed`` take no part."""
        e = torch.exp(node.value - node.value.amax(-1, keepdim=True))
        e = e if allowed is None else e * allowed
        s = e / e.sum(-1, keepdim=True)

        def back(out: Node) -> None:
            total = out.relevance.sum(-1, keepdim=True)
            down = node.value * (out.relevance - s * total)
            self.lost.append((out.relevance - down).flatten(1).sum(1))
            node.relevance += down

        return self._record(s, back)

    def matmul(self, left: Node, right: Node) -> Node:
        """AttnLRP, ``O_ip = Σ_j A_ij V_jp``: each product's relevance, half to each factor."""
        products = left.value[..., :, :, None] * right.value[..., None, :, :]
        z = products.sum(-2)

        def back(out: Node) -> None:
            part = products * ratio(out.relevance, 2 * z, self.epsilon)[..., :, None, :]
            left.relevance += part.sum(-1)
            right.relevance += part.sum(-3)

        return self._record(z, back)

    def follow(self, name: str, module: nn.Module, node: Node) -> Node:
        """Any module that maps one value to one value, by its type; else by its ``explain``."""
        if isinstance(module, nn.Sequential):
            for child, inner in module.named_children():
                node = self.follow(f"{name}.{child}" if name else child, inner, node)
            return node
        if isinstance(module, WEIGHTED):
            return self.layer(name, module, node)
        if isinstance(module, ACTIVATIONS):
            return self.activation(module, node)
        if isinstance(module, MAX_POOLS):
            return self.max_pool(module, node)
        if isinstance(module, AVERAGE_POOLS):
            return self.average(module, node)
        if isinstance(module, BATCHNORMS):
            return self.batchnorm(module, node)
        if isinstance(module, NORMS):
            return self.norm(module, node)
        if isinstance(module, nn.Flatten):
            return self.move(module, node)
        if isinstance(module, (nn.Dropout, nn.Identity)):
            return node
        return module.explain(self, name, node)


def by_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Weight x gradient of the true logit [N, ...]: relevance of ReLU networks without biases."""
    model, found = copy.deepcopy(model), {}
    for image, label in zip(images.split(1), labels, strict=True):
        model.zero_grad(set_to_none=True)
        model(image.clone())[0, label].backward()
        for name, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            found.setdefault(name, []).append((p * grad).detach())
    return {name: torch.stack(each) for name, each in found.items()}


def aggregated(per_sample: Tensor, aggregate: str) -> Tensor:
    """Scores [...] from relevance per sample [N, ...], one sample after the other."""
    total = torch.zeros_like(per_sample[0])
    for r in per_sample:
        total += {"sum": r, "abs": r.abs(), "rms": r * r}[aggregate]
    return (total / len(per_sample)).sqrt() if aggregate == "rms" else total
