"""Criteria that are no relevance against sums written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.baselines import fisher, hessian_trace, integrated_gradients
from lib.fold import fold_batchnorm
from lib.relevance import scored_weights
from lib.score import CRITERIA
from study.networks import build


def logits(model, problem):
    _, images, labels = problem
    return model(images).gather(1, labels[:, None])[:, 0]


def near(scores, expected, tolerance=1e-9):
    assert list(scores) == list(expected)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=tolerance, atol=1e-12)


def test_folded_magnitudes_are_those_of_the_folded_network(problem):
    model, *data = problem
    folded = fold_batchnorm(model)
    expected = {name: folded.get_parameter(name).detach().abs() for name in scored_weights(model)}
    near(CRITERIA["magnitude-folded"](model, *data), expected)
    assert not torch.allclose(expected["0.weight"], model[0].weight.abs())


def test_magnitude_is_of_the_weights_as_trained(problem):
    model = problem[0]
    near(CRITERIA["magnitude"](*problem), {n: w.abs() for n, w in scored_weights(model).items()})


def test_gradient_criteria(problem):
    model, images, labels = problem
    private = copy.deepcopy(model).eval()
    weights = scored_weights(private)

    def products(output):
        grads = torch.autograd.grad(output, weights.values(), retain_graph=True)
        return {n: w.detach() * g for (n, w), g in zip(weights.items(), grads, strict=True)}

    near(CRITERIA["grad-times-weight"](*problem), products(logits(private, problem).sum()))
    loss = F.cross_entropy(private(images), labels, reduction="none")
    near(CRITERIA["taylor"](*problem), {n: p**2 for n, p in products(loss.mean()).items()})
    samples = [products(one) for one in loss]
    expected = {n: sum(p[n] ** 2 for p in samples) / (2 * len(samples)) for n in weights}
    near(fisher(*problem), expected)


def test_gradients_are_ordinary_whatever_the_layers():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(),
        nn.SiLU(), nn.Linear(24, 3),
    ).double()  # fmt: skip
    images, labels = torch.randn(5, 3, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    private = copy.deepcopy(model).eval()
    weights = scored_weights(private)
    expected = dict.fromkeys(weights, 0)
    for x, y in zip(images, labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(private(x[None]), y[None]), weights.values())
        for (n, w), g in zip(weights.items(), grads, strict=True):
            expected[n] = expected[n] + (w * g).detach() ** 2 / 10
    near(fisher(model, images, labels), expected)


def test_wanda_reads_the_inputs_of_every_connection(problem):
    model, images, _ = problem
    folded = fold_batchnorm(model)
    inside = folded[:4](images)
    patches = F.unfold(inside, 3, padding=1, stride=2)
    norms = patches.square().sum((0, 2)).sqrt().view(1, 4, 3, 3)
    scores = CRITERIA["wanda"](*problem)
    torch.testing.assert_close(scores["4.weight"], model[4].weight.detach().abs() * norms)
    patches = F.unfold(images, 3, padding=1).square().sum((0, 2)).sqrt().view(2, 1, 3, 3)
    norms = patches.repeat_interleave(2, 0)
    torch.testing.assert_close(scores["0.weight"], model[0].weight.detach().abs() * norms)
    norms = folded[:7](images).square().sum(0).sqrt()
    torch.testing.assert_close(scores["7.weight"], model[7].weight.detach().abs() * norms)


def test_integrated_gradients_add_up_to_the_change_of_the_output(problem):
    model = copy.deepcopy(problem[0]).eval()
    scores = integrated_gradients(*problem, steps=200)
    before = logits(model, problem).sum()
    for w in scored_weights(model).values():
        w.data.zero_()
    change = (before - logits(model, problem).sum()).item()
    assert sum(s.sum().item() for s in scores.values()) == pytest.approx(change, rel=1e-2)


def test_deeplift_of_a_linear_network_is_its_change_by_the_inputs():
    torch.manual_seed(2)
    model, images = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(7, 5)
    labels = torch.arange(7) % 3
    change = (images - images.mean(0)).abs()
    through = (model[1].weight @ model[0].weight)[labels]
    expected = torch.zeros(4, 5)
    for n in range(7):
        outgoing = model[1].weight[labels[n]].detach()[:, None]
        expected += (model[0].weight.detach() * outgoing).abs() * change[n]
    scores = CRITERIA["deeplift"](model, images, labels)
    torch.testing.assert_close(scores["0.weight"], expected)
    assert through.shape == (7, 5)


class Functional(nn.Module):
    """Functional, in-place and reused activations, a residual sum."""

    def __init__(self, shared):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relus = nn.ModuleList([nn.ReLU() for _ in range(3)])
        self.shared = shared

    def forward(self, x):
        if self.shared:
            x = F.relu(self.a(x), inplace=True)
            y = self.relus[0](self.b(x))
            return self.c(self.relus[0](y + x - 1))
        x = self.relus[0](self.a(x))
        return self.c(self.relus[2](self.relus[1](self.b(x)) + x - 1))


def test_deeplift_sees_functional_and_reused_activations():
    torch.manual_seed(3)
    plain, other = Functional(False).double(), Functional(True).double()
    other.load_state_dict(plain.state_dict())
    images, labels = torch.randn(8, 6).double(), torch.arange(8) % 3
    near(*(CRITERIA["deeplift"](m, images, labels) for m in (other, plain)))


def test_deeplift_refuses_what_captum_does_not_know():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="Captum"):
        CRITERIA["deeplift"](model, 3 * torch.randn(8, 6).double(), torch.arange(8) % 3)


def test_hessian_trace_nears_the_exact_one():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    images, labels = torch.randn(9, 3).double(), torch.arange(9) % 3
    w = model[2].weight
    hidden = model[:2](images).detach()

    def loss(flat):
        return F.cross_entropy(hidden @ flat.view_as(w).T + model[2].bias, labels)

    trace = torch.autograd.functional.hessian(loss, w.detach().flatten()).trace()
    scores = hessian_trace(model, images, labels, probes=300)
    measured = scores["2.weight"] / w.detach() ** 2 * w.numel()
    torch.testing.assert_close(measured, trace.expand_as(w), rtol=0.1, atol=0)


def test_random_scores_do_not_touch_the_generator():
    model = build("lenet300")
    torch.manual_seed(6)
    expected = torch.rand(3)
    torch.manual_seed(6)
    for name in ("random", "hessian-trace"):
        CRITERIA[name](model, torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))
    assert torch.equal(torch.rand(3), expected)


def test_random_scores_are_standard_normal_and_know_nothing_of_the_weights():
    model = build("lenet5")
    scores = CRITERIA["random"](model, torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))
    weights = scored_weights(model)
    for name, score in scores.items():
        flat, spread = score.flatten(), score.numel() ** -0.5
        for sample in (flat, (flat.square() - 1) / 2**0.5, flat.sign()):
            assert abs(float(sample.mean())) < 4 * spread
        for other in (weights[name].detach(), weights[name].detach().abs()):
            pair = torch.stack([flat, other.flatten()])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 * spread
    assert not torch.equal(*(scores[name].flatten()[:100] for name in list(scores)[:2]))
