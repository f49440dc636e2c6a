"""LRP rules: how one linear layer shares the relevance of an output among its contributions."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from ..fields import check_fields

EPSILON = 1e-16


@dataclass(frozen=True)
class Rule:
    """One propagation rule with its constants.

    Attributes
    ----------
    name : str
        ``epsilon``, ``lrp-0``, ``zplus``, ``gamma``, ``alpha2beta1``; for the layer that reads the
        images also ``flat`` and ``box``.
    epsilon : float
        Added to every denominator with its sign. The default is far below the rounding of
        anything that matters, so that relevance is conserved; zennit's default is 1e-6. Where the
        rule is ``epsilon`` the default stands for the limit of no ε at all, whatever the scale of
        the activations; the other rules want images in units that make them more than 1e-8.
    gamma : float
        Extra weight of the favoured sign in ``gamma``.
    gate : {"shapley", "signal", "half"}
        How ``p = s σ(x)``, the product (of numbers or of matrices) of a signal and a gate, shares
        its relevance. Gates are sigmoid, hard sigmoid (also as a cut of x plus a number),
        softplus, logsigmoid, and after a shift tanh, erf, softsign and atan, as in GELU written
        out; and what elementwise and linear functions, products, joining and selection (max,
        sort, max pooling) make of them, where it differs from zero at x = 0; not what layers of
        scored weights make of them. ``shapley``: signal and gate get the shares
        ``(σ(x) + σ(0)) / 2 σ(x)`` and ``(σ(x) - σ(0)) / 2 σ(x)``, their Shapley values when absent
        ones are zero; this conserves relevance, and the modified gradient at x is at most that at
        p times ``s / 8`` for a sigmoid. ``signal``: all goes to the signal, so that layers that
        compute gates have no relevance. ``half``: one half to each, as for products of any other
        activations; without bound where x is small.
    low, high : float or tuple of float, optional
        Bounds of the images for ``box``, one number or one per channel; by default the least and
        greatest value of the images given.

    Notes
    -----
    With contributions ``c_jk = a_j w_jk``, ``R_jk = R_k c'_jk / (Σ_j c'_jk + b'_k)``, where c' is

    ============  ===================================================================
    epsilon       ``c``, the denominator being ``z_k + ε sign(z_k)``
    zplus         ``max(c, 0)``, ``b' = max(b, 0)``
    alpha2beta1   twice the share of ``max(c, 0)`` less the share of ``min(c, 0)``
    gamma         ``c + γ max(c, 0)`` where ``z_k > 0``, ``c + γ min(c, 0)`` where ``z_k < 0``
    flat          1 for every connection, ``b' = 0``
    box           ``a w - low max(w, 0) - high min(w, 0)``, ``b' = 0``
    ============  ===================================================================

    A unit whose denominator is exactly zero distributes nothing.

    References
    ----------
    Bach et al. 2015, PLoS ONE 10(7), eq. 58 (epsilon) and 60 (alpha-beta); Montavon et al. 2017,
    Pattern Recognition 65 (zplus, box); Montavon et al. 2019, LNCS 11700, ch. 10 (gamma);
    Lapuschkin et al. 2019, Nat. Commun. 10 (flat); Arras et al. 2017, arXiv 1706.07206 (signal);
    Achtibat et al. 2024, arXiv 2402.05602 (half); Lundberg and Lee 2017, arXiv 1705.07874, eq. 8
    (shapley).
    """

    name: str = "epsilon"
    epsilon: float = EPSILON
    gamma: float = 0.25
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    gate: str = "shapley"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.name not in RULES:
            known = ", ".join((*RULES, *COMPOSITES))
            raise ValueError(f"unknown rule {self.name!r}; known: {known}")
        if not (0 <= self.epsilon < math.inf and 0 <= self.gamma < math.inf):
            raise ValueError("epsilon and gamma must be finite and not negative")
        if self.gate not in GATES:
            raise ValueError(f"unknown gate {self.gate!r}; known: {', '.join(GATES)}")

    def is_gradient(self, dtype: torch.dtype) -> bool:
        """Whether the shares ``R_k / z_k`` equal the incoming gradient to machine precision."""
        negligible = max(EPSILON, torch.finfo(dtype).eps ** 2)
        return self.name == "lrp-0" or (self.name == "epsilon" and self.epsilon <= negligible)


RULES = ("epsilon", "lrp-0", "zplus", "gamma", "alpha2beta1", "flat", "box")
DIRECT = ("flat", "box")
GATES = ("shapley", "signal", "half")
# name: rule of dense layers, of convolutions, of the first layer (None: like the others)
COMPOSITES: dict[str, tuple[str, str, str | None]] = {
    "epsilon-plus": ("epsilon", "zplus", None),
    "epsilon-plus-flat": ("epsilon", "zplus", "flat"),
    "epsilon-alpha2beta1": ("epsilon", "alpha2beta1", None),
    "epsilon-alpha2beta1-flat": ("epsilon", "alpha2beta1", "flat"),
    "epsilon-gamma-box": ("epsilon", "gamma", "box"),
}
RuleLike = str | Rule | Mapping[str, str | Rule]
Chooser = Callable[[str, bool, bool], Rule]
Part = tuple[Tensor, Tensor]  # modified input and modified weight
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (input, weight, bias) -> output


def chooser(rule: RuleLike) -> Chooser:
    """Turn what the user gave as ``rule`` into a choice for each layer.

    Parameters
    ----------
    rule : str, Rule or mapping
        A rule, the name of a rule or of a composite, or a mapping from patterns of module paths
        (``"features.*"``) to those; the first pattern that fits decides, ``epsilon`` where none
        does. ``flat`` and ``box`` alone stand for the first layer, with ``epsilon`` for the rest.

    Returns
    -------
    callable
        ``(module path, is a convolution, is the first layer) -> Rule``.

    Raises
    ------
    ValueError
        Unknown name; the message lists the known ones.
    """
    if isinstance(rule, Rule):
        others = Rule(epsilon=rule.epsilon, gate=rule.gate) if rule.name in DIRECT else rule
        return lambda path, convolution, first: rule if first else others
    if isinstance(rule, Mapping):
        choices = [(pattern, _chosen(choice)) for pattern, choice in rule.items()]
        otherwise = chooser("epsilon")

        def choose(path: str, convolution: bool, first: bool) -> Rule:
            fitting = (c for pattern, c in choices if fnmatchcase(path, pattern))
            return next(fitting, otherwise)(path, convolution, first)

        return choose
    if not isinstance(rule, str):
        raise ValueError(f"rule must be a name, a Rule or a mapping to these, not {rule!r}")
    if rule in COMPOSITES:
        dense, conv, special = COMPOSITES[rule]
        return lambda path, convolution, first: Rule(
            special if first and special else conv if convolution else dense
        )
    return chooser(Rule(rule))


def _chosen(rule: str | Rule) -> Chooser:
    """As ``chooser``, for layers that the user picked: each gets the very rule."""
    rule = Rule(rule) if isinstance(rule, str) and rule in RULES else rule
    return (lambda path, convolution, first: rule) if isinstance(rule, Rule) else chooser(rule)


def bounded(choose: Chooser, images: Tensor) -> Chooser:
    """Fill in the bounds of ``box`` rules that have none: the images' own."""

    def fill(path: str, convolution: bool, first: bool) -> Rule:
        rule = choose(path, convolution, first)
        if rule.name != "box" or None not in (rule.low, rule.high):
            return rule
        low = float(images.min()) if rule.low is None else rule.low
        return replace(rule, low=low, high=float(images.max()) if rule.high is None else rule.high)

    return fill


def share(g: Tensor, z: Tensor, denominator: Tensor, epsilon: float, sign: int = 0) -> Tensor:
    """``g z / (d + ε sign d)``, and 0 where d is 0; overwrites d, whose sign may be known."""
    if sign and epsilon:
        denominator.add_(sign * epsilon)
    else:
        denominator.add_(torch.sign(denominator), alpha=epsilon)
        denominator.masked_fill_(denominator == 0, torch.inf)
    return torch.div(z, denominator, out=denominator).mul_(g)


def terms(
    rule: Rule, operation: Linear, g: Tensor, a: Tensor, w: Tensor, b: Tensor | None, z: Tensor
) -> Iterator[tuple[Tensor, list[Part]]]:
    """Split a layer's relevance into modified gradients.

    Parameters
    ----------
    rule : Rule
        How to share.
    operation : callable
        ``(input, weight, bias) -> output``, linear in input and weight.
    g : Tensor
        ``R / z`` of the outputs, shaped like them.
    a, w, b, z : Tensor
        The layer's input, weight, bias (or None) and output; the output is read only if the rule
        is not a plain gradient.

    Yields
    ------
    s : Tensor
        Relevance over denominator, shaped like the output.
    parts : list of (Tensor, Tensor)
        Modified inputs a' and weights w': each connection gets ``a' w' s``.
    """
    if rule.is_gradient(g.dtype):
        yield g, [(a, w)]
    elif rule.name == "epsilon":
        yield share(g, z, z.clone(), rule.epsilon), [(a, w)]
    elif rule.name in ("zplus", "alpha2beta1"):
        yield from _alpha_beta(rule, operation, g, a, w, b, z)
    elif rule.name == "gamma":
        yield from _gamma(rule, operation, g, a, w, b, z)
    else:
        flat = rule.name == "flat"
        parts = [(torch.ones_like(a), torch.ones_like(w))] if flat else _box(rule, a, w)
        yield share(g, z, _output(operation, parts, None), rule.epsilon), parts


def _output(operation: Linear, parts: list[Part], b: Tensor | None) -> Tensor:
    total = operation(*parts[0], b)  # like z
    for part in parts[1:]:
        total += operation(*part, None)
    return total


def _signed(a: Tensor, same: Callable[[], Tensor], opposite: Callable[[], Tensor]) -> list[Part]:
    """Contributions of positive inputs with one weight and of negative ones with another."""
    if a.min() >= 0:
        return [(a, same())]
    return [(a.clamp(min=0), same()), (a.clamp(max=0), opposite())]


def _alpha_beta(
    rule: Rule, operation: Linear, g: Tensor, a: Tensor, w: Tensor, b: Tensor | None, z: Tensor
) -> Iterator[tuple[Tensor, list[Part]]]:
    up, down = partial(w.clamp, min=0), partial(w.clamp, max=0)
    parts = _signed(a, up, down)
    positive = _output(operation, parts, None if b is None else b.clamp(min=0))  # like z
    if rule.name == "zplus":
        yield share(g, z, positive, rule.epsilon, 1), parts
        return
    # what is not positive is negative: one pass less than adding it up
    negative = torch.sub(positive, z).clamp_(min=0)  # like z
    yield share(g, z, positive, rule.epsilon, 1).mul_(2), parts
    del positive
    yield share(g, z, negative, rule.epsilon, 1), _signed(a, down, up)


def _gamma(
    rule: Rule, operation: Linear, g: Tensor, a: Tensor, w: Tensor, b: Tensor | None, z: Tensor
) -> Iterator[tuple[Tensor, list[Part]]]:
    def favour(tensor: Tensor, **side: float) -> Tensor:
        return tensor + rule.gamma * tensor.clamp(**side)

    up, down = partial(favour, w, min=0), partial(favour, w, max=0)
    for active, same, opposite, side in (
        (z > 0, up, down, {"min": 0.0}),
        (z < 0, down, up, {"max": 0.0}),
    ):
        chosen = g * active  # like z
        if chosen.any():
            parts, bias = _signed(a, same, opposite), None if b is None else favour(b, **side)
            yield share(chosen, z, _output(operation, parts, bias), rule.epsilon), parts


def _box(rule: Rule, a: Tensor, w: Tensor) -> list[Part]:
    low, high = (torch.as_tensor(v, dtype=a.dtype, device=a.device) for v in (rule.low, rule.high))
    if a.dim() > 2:  # [samples, channels, ...]: one bound per channel
        low, high = (v.reshape(-1, *[1] * (a.dim() - 2)) for v in (low, high))
    low, high = -low.expand_as(a), -high.expand_as(a)  # like a
    return [(a, w), (low, w.clamp(min=0)), (high, w.clamp(max=0))]
