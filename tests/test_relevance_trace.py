"""Networks as users write them: every layer is scored, or refused by name."""

import ast
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as shelf
from torch import nn

from lib import relevance
from lib.relevance import (
    AGGREGATES,
    UnsupportedLayerError,
    input_relevance,
    totals,
    unit_sensitivity,
    weight_relevance,
)
from lib.relevance.collectors import Collected
from lib.relevance.layers import Collector
from lib.relevance.trace import Propagation

SHELF = ("resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "swin_t")


def alone(model, images, labels, aggregate, **options):
    """What samples scored one at a time add up to."""
    pairs = zip(images.split(1), labels.split(1), strict=True)
    samples = [weight_relevance(model, x, y, **options) for x, y in pairs]
    power = 2 if aggregate == "rms" else 1
    total = {n: sum(s[n].abs() ** power for s in samples) for n in samples[0]}
    return {n: (t / len(samples)).sqrt() if power == 2 else t for n, t in total.items()}


@pytest.mark.parametrize("name", SHELF)
def test_networks_from_the_shelf(name):
    torch.manual_seed(0)
    model = getattr(shelf, name)(num_classes=5).double().eval()
    images, labels = torch.randn(2, 3, 48, 48).double(), torch.tensor([3, 1])
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight)
    nn.init.zeros_(head.bias)
    started = model(images).gather(1, labels[:, None]).sum().item()
    scores = weight_relevance(model, images, labels)
    assert all(score.isfinite().all() and score.any() for score in scores.values())
    assert list(scores.values())[-1].sum().item() == pytest.approx(started, rel=1e-10)
    heatmap = input_relevance(model, images, labels, rule="epsilon-plus")
    assert heatmap.shape == images.shape and heatmap.isfinite().all()


class Classifier(nn.Module):
    """A body between two linear layers of the last axis, then the mean over positions."""

    def __init__(self, body, width=6):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, width), body, nn.Linear(width, 3)

    def forward(self, x):
        x = self.body(self.first(x))
        return self.last(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class PositionsFirst(nn.Module):
    """Attention and linear layers that see [positions, samples, width]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("samples", [3, 5])
@pytest.mark.parametrize("aggregate", ["abs", "rms"])
@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
def test_samples_are_told_apart_in_any_axis(aggregate, samples, rule):
    torch.manual_seed(1)
    folding = Call(lambda x: F.silu(x.flatten(0, 1)).unflatten(0, (len(x), -1)))
    model = Classifier(nn.Sequential(PositionsFirst(), folding)).double()
    images, labels = torch.randn(samples, 5, 4).double(), torch.arange(samples) % 3
    scores = weight_relevance(model, images, labels, aggregate=aggregate, rule=rule)
    expected = alone(model, images, labels, aggregate, rule=rule)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=1e-14)


def test_what_samples_share_is_refused_where_it_matters():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.mix = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.mix(self.places)

    model = Classifier(Shared())
    images, labels = torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(UnsupportedLayerError, match="body.mix.weight"):
        weight_relevance(model, images, labels, aggregate="abs")
    weight_relevance(model, images, labels)
    weight_relevance(model, images, labels, aggregate="abs", batch_size=1)


class Taking(nn.Module):
    """A part that takes one input twice, or gives several results."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x) if isinstance(self.inner, nn.Bilinear) else self.inner(x)[0]


@pytest.mark.parametrize(
    "body, advice",
    [
        (nn.LSTM(6, 6, batch_first=True), "recurrence"),
        (nn.LogSoftmax(-1), "logits"),
        (Call(lambda x: x * x * x.exp()), "exp"),
        (Call(lambda x: torch.einsum("...i,...i,...i->...i", x, x, x)), "3 activations"),
        (Call(lambda x: 1 / x), "divide that one"),
        (nn.Bilinear(6, 6, 6), "bilinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_advice(body, advice):
    model = Classifier(Taking(body) if isinstance(body, (nn.LSTM, nn.Bilinear)) else body)
    with pytest.raises(UnsupportedLayerError, match=advice) as caught:
        weight_relevance(model, torch.randn(3, 5, 4), torch.tensor([0, 1, 2]))
    assert "'body" in str(caught.value)


def test_result_of_an_operation_in_place_need_not_be_used():
    def forget(x):
        x.add_(1)
        return x

    model, data = Classifier(Call(forget)), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    found = weight_relevance(model, *data)
    model.body = Call(lambda x: x + 1)
    torch.testing.assert_close(found, weight_relevance(model, *data), rtol=0, atol=0)


def test_what_torch_functions_do_not_see_is_found_in_the_outputs():
    def hide(x):
        return x + 1 if torch.is_grad_enabled() else x

    with pytest.raises(UnsupportedLayerError, match="differs"):
        weight_relevance(Classifier(Call(hide)), torch.randn(3, 4), torch.tensor([0, 1, 2]))


def test_rules_that_fit_no_layer_are_refused():
    model = Classifier(nn.ReLU())
    data = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="first, last"):
        weight_relevance(model, *data, rule={"features.*": "zplus"})
    with pytest.raises(ValueError, match="images"):
        weight_relevance(model, *data, rule={"last": "flat"})
    with pytest.raises(ValueError, match="two classes"):
        single = nn.Sequential(nn.Linear(4, 1))
        weight_relevance(single, data[0], torch.zeros(3).long(), start="contrastive")


@pytest.mark.parametrize("call", [weight_relevance, input_relevance, unit_sensitivity])
def test_the_callers_modes_do_not_matter(call):
    torch.manual_seed(2)
    model = Classifier(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6)))
    images, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    expected = call(model, images, labels)
    found = []
    with torch.inference_mode():
        found += [call(model, images, labels), call(model, images.clone(), labels)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(call(model, images, labels))
    for other in found:
        torch.testing.assert_close(other, expected, rtol=0, atol=0)
        tensors = other.values() if isinstance(other, dict) else [other]
        assert not any(t.is_inference() or t.requires_grad for t in tensors)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_layers_that_do_not_run_have_no_relevance(aggregate):
    model = Classifier(nn.ReLU())
    model.spare = nn.Linear(2, 2)
    data = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert not weight_relevance(model, *data, aggregate=aggregate)["spare.weight"].any()


FLOORS = (
    *("kinds", "rules", "operations", "samples", "layers", "factors", "origins", "functions"),
    *(
        "norms",
        "weights",
        "changes",
        "passing",
        "trace",
        "collectors",
        "persample",
        "saved",
        "moving",
    ),
    *("collect", "deeplift", "__init__"),
)
ABOVE = ("fold", "inputs", "checks", "dense", "fields")


def test_no_file_imports_from_one_above_it():
    files = {path.stem: path for path in Path(relevance.__file__).parent.glob("*.py")}
    assert set(files) == set(FLOORS)
    found = set()
    for floor, name in enumerate(FLOORS):
        for node in ast.walk(ast.parse(files[name].read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                below = FLOORS[:floor] if node.level == 1 else ABOVE
                for module in [node.module] if node.module else [a.name for a in node.names]:
                    assert module in below, f"{name} imports {module}"
                    found.add((name, module))
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for module in names or [node.module]:
                    top = module.partition(".")[0]
                    assert top in ("torch", "captum") or top in sys.stdlib_module_names
                    assert top != "captum" or (name == "deeplift" and node.col_offset > 0)
    assert {("layers", "rules"), ("trace", "layers"), ("collect", "trace")} <= found


def _members(kind):
    return {name for name in (*vars(kind), *kind.__annotations__) if not name.startswith("_")}


def test_propagation_asks_of_a_collector_what_its_interface_has_and_no_more():
    asked = set()

    class Spy:
        sums, samplewise = True, True

        def __getattribute__(self, name):
            asked.add(name)
            return object.__getattribute__(self, name)

        def use(self, layer, a):
            layer.layout = None if a.dim() == 1 else (0, False)

        def unit(self, layer, g):
            assert layer.key is not None and g.shape[0] == 2

        def weight(self, layer, s, a, w, grad):
            assert w.shape == grad.shape == model.get_parameter(layer.key[0]).shape

        def done(self, layer):
            pass

        def rows(self, layer, indices, g, w):
            assert g.shape == w.shape == (*indices.shape, 4)

        def pixels(self, a, relevance):
            return a.shape == relevance.shape

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(12, 2)
            self.place = nn.Embedding(3, 4)

        def forward(self, x):
            return self.last((self.first(x) + self.place(torch.arange(3))).flatten(1))

    model = Net()
    names = {id(p): name for name, p in model.named_parameters() if p.ndim == 2}

    def choose(path, convolution, first):
        return relevance.Rule("flat" if first else "epsilon")

    images = torch.randn(2, 3, 4, requires_grad=True)
    Propagation(model, choose, Spy(), names)(images).sum().backward()
    assert asked == _members(Collector) and images.grad is None
    assert Collector in Collected.__mro__


@pytest.mark.parametrize("wanted", ["sum", "abs", "squares"])
def test_totals_are_what_aggregates_are_made_of(wanted):
    torch.manual_seed(4)
    model = Classifier(nn.ReLU()).double()
    data = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    aggregate = "rms" if wanted == "squares" else wanted
    scores = weight_relevance(model, *data, aggregate=aggregate, start="contrastive")
    with torch.inference_mode():
        sums = totals(model, *data, wanted=wanted, start="contrastive", batch_size=2)
    for name, score in scores.items():
        total = (sums[name] / 5).sqrt() if wanted == "squares" else sums[name]
        torch.testing.assert_close(total, score, rtol=1e-12, atol=1e-15)


def test_moments_are_squared_inputs():
    model = Classifier(nn.ReLU()).double()
    images = torch.randn(5, 3, 4).double()
    moments = totals(model, images, torch.zeros(5).long(), wanted="moments", batch_size=2)
    expected = images.square().sum((0, 1)).expand(6, 4)
    torch.testing.assert_close(moments["first.weight"], expected)


def test_ordinary_totals_of_the_loss_are_weight_times_gradient():
    torch.manual_seed(5)
    model = Classifier(nn.GELU()).double()
    images, labels = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    found = totals(model, images, labels, rule="lrp-0", start="loss", ordinary=True)
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    for name, total in found.items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(total, weight.detach() * weight.grad)
    with pytest.raises(ValueError, match="unknown start 'loss'"):
        totals(model, images, labels, start="loss")


def test_unknown_total_lists_the_known():
    with pytest.raises(
        ValueError, match="unknown total 'mean'; known: sum, abs, rms, squares, moments"
    ):
        totals(Classifier(nn.ReLU()), torch.randn(3, 4), torch.tensor([0, 1, 2]), wanted="mean")


def test_rows_of_a_constant_table_have_no_relevance():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(5, 6))

        def forward(self, x):
            return x + F.embedding(torch.arange(5), self.table)

    model, data = Classifier(Places()), (torch.randn(2, 5, 4), torch.tensor([0, 1]))
    assert weight_relevance(model, *data).keys() == {"first.weight", "last.weight"}
    assert unit_sensitivity(model, *data)["first.weight"].any()


def test_samples_are_told_apart_under_autocast():
    torch.manual_seed(6)
    model = Classifier(PositionsFirst())
    data = torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 0])
    expected = weight_relevance(model, *data, aggregate="abs")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = weight_relevance(model, *data, aggregate="abs")
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_relevance_is_that_of_the_function_where_batchnorm_cannot_be_folded():
    torch.manual_seed(7)
    norm = nn.BatchNorm1d(6)
    norm.running_var.copy_(torch.arange(1.0, 7.0))
    model = Classifier(norm).double().eval()  # its six positions, not the six features
    images, labels = torch.randn(3, 6, 4).double(), torch.tensor([0, 1, 2])
    model(images).gather(1, labels[:, None]).sum().backward()
    for name, score in weight_relevance(model, images, labels).items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(score, weight.detach() * weight.grad)


def test_without_captum_deeplift_says_what_to_install(monkeypatch):
    from lib.relevance.deeplift import deeplift

    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r'pip install "xai-compression\[study\]"'):
        deeplift(Classifier(nn.ReLU()), torch.randn(3, 4), torch.tensor([0, 1, 2]))
