"""DeepLIFT by Captum, carried from activations to weights."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..checks import check_samples
from ..inputs import evaluated
from .collect import Run
from .layers import Layer
from .persample import Absolutes

AS_MODULES = {F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.tanh: nn.Tanh,
              torch.sigmoid: nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh,
              "sigmoid": nn.Sigmoid, F.leaky_relu: nn.LeakyReLU, F.elu: nn.ELU}  # fmt: skip


def deeplift(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """DeepLIFT attribution of the true class's logit, carried to the weights.

    Raises
    ------
    ImportError
        Captum is not installed.
    ValueError
        The images are integers; or the attributions do not add up to the change of the output,
        since Captum does not know some nonlinearity; also as ``lib.relevance.weight_relevance``.

    Notes
    -----
    ``Σ_n |Σ_positions w_jk (a_j - a'_j) m_k|`` with Captum's multipliers m (rescale rule) at the
    layer's output and activations a' of a reference image, the mean of the images. Sabih et al.
    do not publish how attributions of activations become scores of weights: assumption S1 is that
    a unit's attribution is shared by its incoming connections in proportion to their contribution,
    and S2 that absolute values are summed over samples.

    References
    ----------
    Shrikumar et al. 2017, arXiv 1704.02685, eq. 3; Sabih et al. 2020, arXiv 2008.09072.
    """
    try:  # here, because it takes a second to import and is no part of the method
        from captum.attr import DeepLift
    except ImportError as error:
        raise ImportError('DeepLIFT needs captum: pip install "xai-compression[study]"') from error

    check_samples(images, labels)
    if not images.is_floating_point():
        raise ValueError("DeepLIFT compares images with their mean: it needs floats, no tokens")
    network = _separate_activations(model)
    run = Run(Differences, network, images, labels, "lrp-0", "target", ordinary=True)
    reference = images.mean(0, keepdim=True).to(run.device)  # [1, ...]
    explainer = DeepLift(_Traced(run))
    for x, y in run.batches():
        run.collector.begin(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = explainer.attribute(x, reference.expand_as(x), target=y)  # like x
        run.collector.end()
        with torch.no_grad():
            logits = run.propagate(torch.cat([x, reference]))  # [batch + 1, classes]
        change = (logits[:-1] - logits[-1]).gather(1, y[:, None])[:, 0]  # [batch]
        gap = (shares.flatten(1).sum(1) - change).abs().max()
        if gap > 1e-2 * change.abs().max() + 1e-5 * logits.abs().max():
            raise ValueError(
                f"DeepLIFT attributions miss the change of the output by {gap:.2g}: Captum knows "
                "ReLU, LeakyReLU, ELU, Sigmoid, Tanh, Softplus and Softmax, as modules, and max "
                "pooling without overlap"
            )
    return run.folded.stored(run.collector.found())


class Differences(Absolutes):
    """Relevance by the difference to a reference, which a batch's second half holds."""

    stacked = 2

    def weight(self, layer: Layer, s: Tensor, a: Tensor, w: Tensor, grad: Tensor | None) -> None:
        s, a = (layer.by_sample(t, 2 * self.samples) for t in (s, a))
        half = len(s) // 2
        piece = (layer.operation, s[:half], a[:half] - a[half:], w)
        self.pieces[layer.place].append(piece)


class _Traced(nn.Module):
    """A model as Captum calls it: forward passes are watched by a scoring run."""

    def __init__(self, run: Run[Differences]):
        super().__init__()
        self.model, self.run = run.propagate.model, run
        for module in self.model.modules():
            # Captum replaces the gradient of a pooling layer's input after the activation before
            # it has read it, unless the two are different tensors.
            if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
                module.register_forward_pre_hook(lambda _, inputs: inputs[0].clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.run.propagate(images)


def _separate_activations(model: nn.Module) -> nn.Module:
    """A copy whose activations are modules used once, as Captum needs; as it is if untraceable."""
    try:
        traced = fx.symbolic_trace(evaluated(copy.deepcopy(model)))
    except Exception:  # a forward with data-dependent control flow fails in ways of its own
        return model
    modules, seen = dict(traced.named_modules()), set()
    for number, node in enumerate(list(traced.graph.nodes)):
        fresh = None
        if node.op == "call_module" and not list(modules[node.target].parameters()):
            fresh = copy.deepcopy(modules[node.target]) if node.target in seen else None
            seen.add(node.target)
        elif node.op in ("call_function", "call_method") and node.target in AS_MODULES:
            extra = {k: v for k, v in node.kwargs.items() if k != "inplace"}
            fresh = AS_MODULES[node.target](**extra) if len(node.args) == 1 else None
        if fresh is not None:
            name = f"separate_activation_{number}"
            traced.add_submodule(name, fresh)
            node.op, node.target, node.kwargs = "call_module", name, {}
    traced.recompile()
    return traced
