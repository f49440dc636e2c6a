"""ONNX files: the same function as the decoded model, and nothing half-written."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from spread import assert_above, assert_below
from torch import nn

from lib.codec import Compressed
from lib.finetune import evaluate
from lib.fold import fold_batchnorm
from lib.onnx import run_onnx, to_onnx
from lib.quantize import Codes, kmeans, score_tiers, uniform
from study.data import load
from study.networks import build
from study.training import fit


def separable(classes=10):
    """A small network with a depthwise convolution."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1152, classes)),
    )


def compress(model, quantizer, kept=0.5, fold=True):
    """Codes for convolutions and linear layers, pruned by magnitude, of the folded model."""
    model = fold_batchnorm(model) if fold else model.eval()
    weights = {
        f"{path}.weight": module.weight.detach()
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    sizes = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort().values
    least = sizes[int((1 - kept) * len(sizes)) :][0]
    codes = {name: quantizer(weight, weight.abs() >= least) for name, weight in weights.items()}
    return Compressed(model.state_dict() | codes), model


def eight_bit(weight, mask):
    return uniform(weight, 8, mask=mask)


def per_channel(weight, mask):
    rows = [uniform(row, 6, mask=kept) for row, kept in zip(weight, mask, strict=True)]
    symbols, steps = torch.stack([row.symbols for row in rows]), [row.grid for row in rows]
    return Codes(symbols, torch.cat(steps), "channel")


def tiers(weight, mask):
    return score_tiers(weight, weight.abs(), mask=mask, widths=(4, 6, 8))


def shared(weight, mask):
    return kmeans(weight, 6, mask=mask)


QUANTIZERS = (eight_bit, per_channel, tiers, shared)


def graph(path):
    """Counts of operations and arrays of a file, after the checker of onnx has passed it."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    operations = [node.op_type for node in model.graph.node]
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return operations, arrays


@pytest.fixture(scope="module")
def good(digits):
    """The depthwise network, trained well enough for its accuracy to mean something."""
    return fit(separable(), *digits, epochs=6, lr=0.05, batch_size=64)


@pytest.fixture(scope="module")
def unseen():
    """Validation and test images and labels of digits: 720, so that a point is seven images."""
    return [
        torch.cat(pair) for pair in zip(load("digits", "val"), load("digits", "test"), strict=True)
    ]


@pytest.mark.parametrize("name", ["lenet5", "resnet8", "separable"])
def test_float_file_computes_the_decoded_model(name, trained, references, unseen, tmp_path):
    torch.manual_seed(0)
    model = {"lenet5": lambda: build("lenet5"), "resnet8": lambda: trained, "separable": separable}[
        name
    ]()
    compressed, architecture = compress(model, eight_bit, fold=False)
    path = tmp_path / "model.onnx"
    assert to_onnx(compressed, architecture, references[0], path) == path.stat().st_size
    decoded = compressed.to_model(architecture).eval()
    with torch.no_grad():
        for images in (unseen[0][:1], unseen[0][:100]):  # the first axis is free
            error = (run_onnx(path, images) - decoded(images)).abs().max()
            assert_below(error, 1e-4, f"largest error of a logit, {name}, images: {len(images)}")
    operations, arrays = graph(path)
    assert "BatchNormalization" not in operations
    folded = fold_batchnorm(decoded).state_dict()
    weights = [key for key in compressed if not torch.is_tensor(compressed[key])]
    assert weights
    for key in weights:
        assert np.array_equal(arrays[key] == 0, compressed[key].symbols.numpy() == 0)
        assert np.allclose(arrays[key], folded[key].numpy(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_int8_file_is_as_accurate_as_the_decoded_model(
    quantizer, good, references, unseen, tmp_path
):
    compressed, architecture = compress(good, quantizer)
    files = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    sizes = [
        to_onnx(compressed, architecture, references[0], path, int8=int8)
        for path, int8 in zip(files, (False, True), strict=True)
    ]
    images, labels = unseen
    decoded = evaluate(compressed.to_model(architecture), images, labels)
    kind = quantizer.__name__
    assert_above(decoded, 90, f"accuracy of the decoded model, {kind}")
    accuracy = 100 * (run_onnx(files[1], images).argmax(1) == labels).double().mean()
    assert_below(abs(accuracy - decoded), 0.5, f"points between the two, {kind}")
    assert_below(sizes[1] / sizes[0], 0.5, f"int8 file over the float one, {kind}")
    operations, arrays = graph(files[1])
    assert operations.count("QuantizeLinear") >= 5
    assert operations.count("DequantizeLinear") >= 9
    for key, entry in compressed.items():
        if not torch.is_tensor(entry):
            stored = arrays[f"{key}_quantized"]
            assert stored.dtype == np.int8
            assert not arrays[f"{key}_zero_point"].any()
            assert not stored[(entry.decode() == 0).numpy()].any()
    assert run_onnx(files[1], images[:1]).shape == (1, 10)


@pytest.mark.parametrize("quantizer", [eight_bit, per_channel])
@pytest.mark.parametrize("fold", [True, False])
def test_int8_weights_are_the_codes_own_integers(quantizer, fold, good, references, tmp_path):
    compressed, architecture = compress(good, quantizer, fold=fold)
    to_onnx(compressed, architecture, references[0], tmp_path / "a.onnx", int8=True)
    arrays = graph(tmp_path / "a.onnx")[1]
    folded = fold_batchnorm(compressed.to_model(architecture)).state_dict()
    for key, entry in compressed.items():
        if torch.is_tensor(entry):
            continue
        stored, scale = arrays[f"{key}_quantized"], arrays[f"{key}_scale"]
        assert np.array_equal(np.abs(stored), entry.symbols.abs().numpy())
        if fold:  # the steps themselves; otherwise times the gains of BatchNorm
            used = entry.symbols.flatten(1).any(1).numpy()
            assert np.array_equal(
                (scale * np.ones(len(used)))[used], (entry.grid.numpy() * np.ones(len(used)))[used]
            )
        decoded = stored * scale.reshape(-1, *[1] * (stored.ndim - 1))
        assert np.allclose(decoded, folded[key].numpy(), rtol=1e-5, atol=0)


def test_int8_rounds_symbols_that_do_not_fit_by_channel(good, references, tmp_path):
    def wide(weight, mask):
        codes = uniform(weight, 8, mask=mask)
        return type(codes)(codes.symbols * 4, codes.grid / 4, "uniform")

    compressed, architecture = compress(good, wide)
    to_onnx(compressed, architecture, references[0], tmp_path / "a.onnx", int8=True)
    arrays = graph(tmp_path / "a.onnx")[1]
    for key in ("0.weight", "11.weight"):
        weight, scale = compressed[key].decode().numpy(), arrays[f"{key}_scale"]
        assert scale.shape == weight.shape[:1]
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert (np.abs(arrays[f"{key}_quantized"] * scale - weight) <= 0.501 * scale).all()


def test_int8_keeps_the_bias_of_a_layer_without_weights(references, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 10)).eval()
    with torch.no_grad():
        model[1].weight[2:] *= 0
        model[3].weight.zero_()
    compressed, _ = compress(model, per_channel, kept=1.0)
    to_onnx(compressed, model, references[0], tmp_path / "a.onnx", int8=True)
    expected = compressed.to_model(model)[3].bias.detach()
    found = run_onnx(tmp_path / "a.onnx", references[0][:3])
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_leaves_model_and_caller_alone(references, tmp_path):
    model = separable().train()
    compressed, _ = compress(model, eight_bit, fold=False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, attention = references[0].clone(), torch.backends.mha.get_fastpath_enabled()
    to_onnx(compressed, model, images, tmp_path / "a.onnx", int8=True)
    assert model.training and torch.equal(images, references[0])
    assert torch.backends.mha.get_fastpath_enabled() == attention
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_attention_and_odd_layers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 8, 3), nn.BatchNorm1d(8),
        nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(96, 1),
    ).eval()  # fmt: skip
    images = torch.randn(20, 2, 12)
    compressed = Compressed(model.state_dict())
    with torch.no_grad():
        expected = model(images)
    for int8, tolerance in ((False, 1e-5), (True, 0.1)):
        to_onnx(compressed, model, images, tmp_path / "a.onnx", int8=int8)
        assert (run_onnx(tmp_path / "a.onnx", images) - expected).abs().max() < tolerance


class ReadTwice(nn.Module):
    """What a BatchNorm reads is read by another one as well; torch.fx cannot follow it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        assert x.shape[1] == 1
        h = self.body[0](x)
        return self.last(torch.cat([h, self.body[2](self.body[1](h))], 1).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
def test_batchnorm_is_folded_only_where_the_outputs_stay(tmp_path):
    torch.manual_seed(0)
    model = ReadTwice().eval()
    nn.init.uniform_(model.body[1].running_var, 0.3, 2)
    nn.init.normal_(model.body[1].running_mean)
    images = torch.randn(20, 1, 8, 8)
    small = Compressed(model.state_dict())
    to_onnx(small, model, images, tmp_path / "twice.onnx")
    torch.testing.assert_close(run_onnx(tmp_path / "twice.onnx", images), model(images).detach())


class Masked(nn.Module):
    """Attention in which a mask is added to the scores."""

    def __init__(self, value):
        super().__init__()
        self.read, self.last = nn.Linear(8, 24), nn.Linear(8, 3)
        self.register_buffer("mask", torch.full((5, 5), value).triu(1))

    def forward(self, x):
        q, k, v = self.read(x).chunk(3, -1)
        scores = 3 * q @ k.transpose(1, 2) + self.mask
        return self.last((scores.softmax(-1) @ v)[:, 2])


@pytest.mark.parametrize("value", [-1e4, torch.finfo(torch.float32).min])
def test_a_mask_of_any_size_leaves_attention_in_eight_bits_as_it_was(value, tmp_path):
    torch.manual_seed(0)
    model, images = Masked(value).eval(), torch.randn(100, 5, 8)
    codes = {f"{n}.weight": uniform(getattr(model, n).weight.detach(), 8) for n in ("read", "last")}
    small = Compressed(model.state_dict() | codes)
    to_onnx(small, model, images, tmp_path / "masked.onnx", int8=True)
    found, wanted = run_onnx(tmp_path / "masked.onnx", images), model(images).detach()
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_eight_bits_that_change_the_outputs_much_are_told(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x).relu()
            far = torch.nn.functional.pad(h[:, :1] * 0 + 1e6, (0, 8))  # one range for all
            return self.last((torch.nn.functional.pad(h, (1, 0)) + far)[:, 1:])

    torch.manual_seed(0)
    model, images = Wide().eval(), torch.randn(20, 8)
    with pytest.warns(UserWarning, match="8 bit file's outputs differ by .*run_onnx"):
        to_onnx(Compressed(model.state_dict()), model, images, tmp_path / "wide.onnx", int8=True)
