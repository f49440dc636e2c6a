"""Budgets, validation data and files of models as users bring them."""

import pytest
import torch
from small import Tied
from small import small_data as _data
from small import small_net as _net
from spread import assert_below
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lib import Compressed, Recipe, Uniform, compress
from lib.relevance import weight_relevance

pytestmark = pytest.mark.filterwarnings("ignore:the model itself is near chance")


def test_wrappers_are_looked_through():
    x, y = _data(61)
    wanted, file = weight_relevance(_net(), x, y), compress(_net(), x, y).to_bytes()
    inner = nn.Sequential(torch.compile(_net(), backend="eager"))
    called = _net()
    called.compile(backend="eager")
    for wrapped in (nn.DataParallel(_net()), torch.compile(_net(), backend="eager"), called):
        torch.testing.assert_close(weight_relevance(wrapped, x, y), wanted, rtol=0, atol=0)
        compressed = compress(wrapped, x, y)
        assert compressed.to_bytes() == file
        assert type(compressed.to_model(wrapped)) is nn.Sequential
    found = weight_relevance(inner, x, y)
    assert {
        name.replace("0._orig_mod.", ""): s for name, s in found.items()
    }.keys() == wanted.keys()
    assert compress(inner, x, y).to_model(inner)(x).shape == (61, 4)


def test_an_activation_that_a_model_keeps_is_no_obstacle():
    model, (x, y) = _net(), _data(61)
    model.register_forward_hook(lambda module, inputs, outputs: setattr(module, "last", outputs))
    model(x)
    for recipe in ("uniform", "lrp-paper-finetuned"):
        assert compress(model, x, y, recipe, train=(x, y)).to_model(model)(x).isfinite().all()


def test_tied_weights_are_stored_once():
    model, t, y = Tied(), torch.randint(0, 50, (60, 7)), torch.arange(60) % 50
    compressed = compress(model, t, y, Recipe(store=Uniform(4)))
    assert compressed.nbytes < 1.1 * 50 * 32 / 2
    state = Compressed.from_bytes(compressed.to_bytes()).state_dict()
    assert torch.equal(state["e.weight"], state["f.weight"])
    assert compress(model, t, y, Recipe(store=Uniform(8)), ratio=8).nbytes <= 4 * 50 * 32 / 8


class Extra(nn.Sequential):
    def get_extra_state(self):
        return {"classes": ["a", "b"]}

    def set_extra_state(self, state):
        assert state == {"classes": ["a", "b"]}


def test_extra_state_stays_with_the_architecture():
    model, (x, y) = Extra(*_net(), nn.BatchNorm1d(4)).eval(), _data(61)
    decoded = compress(model, x, y, ratio=3).to_model(model)
    assert decoded(x).shape == (61, 4)
    assert decoded.state_dict()["_extra_state"] == {"classes": ["a", "b"]}


def test_validation_data_may_be_a_loader():
    model, (x, _) = _net(), _data(61)
    labels = model(x).argmax(1)
    for val in (DataLoader(TensorDataset(x, labels), batch_size=20), [x, labels], (x, labels)):
        found = compress(model, x, labels, "lrp-rd", val=val, max_drop=10)
        accuracy = 100 * float((found.to_model(model)(x).argmax(1) == labels).float().mean())
        assert accuracy >= 90
    with pytest.raises(ValueError, match="val can be read only once"):
        compress(model, x, labels, "lrp-rd", val=iter([(x, labels)]), max_drop=10)
    with pytest.raises(ValueError, match="train must be .*DataLoader, not a str"):
        compress(model, x, labels, "lrp-paper-finetuned", train="training/")
    exact = compress(model, x, labels, "lrp-rd", val=(x, labels), max_drop=0)
    assert_below(exact.nbytes, 1200, "bytes of the file that loses nothing")


def test_budgets_that_cannot_be_met_say_what_can():
    model, (x, y) = _net(), _data(61)
    with pytest.raises(ValueError, match=r"ratio=1000 cannot be met.* bytes, which is ratio=\d"):
        compress(model, x, y, ratio=1000)
    with pytest.raises(ValueError, match=r"bits=0.001 cannot be met.* bytes, which is bits=\d"):
        compress(model, x, y, bits=0.001)
    with pytest.raises(ValueError, match="must be a Recipe or a name"):
        compress(model, x, y, Uniform())
