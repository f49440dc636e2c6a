"""Fine-tuning under a mask, and accuracy."""

import copy

import pytest
import torch
from spread import assert_above
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lib.finetune import OPTIMISERS, batches, evaluate, finetune
from study.networks import build
from study.training import fit


def test_batches_are_whole_and_in_random_order():
    index = list(batches(10, 3, torch.Generator().manual_seed(0)))
    assert [len(i) for i in index] == [3, 3, 3]
    assert len(torch.cat(index).unique()) == 9
    assert len(next(batches(2, 3, torch.Generator()))) == 2
    other = list(batches(10, 3, torch.Generator().manual_seed(1)))
    assert not torch.equal(torch.cat(index), torch.cat(other))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("as_loader", [False, True])
def test_finetuning_recovers_and_keeps_removed_weights_at_zero(digits, as_loader, optimiser):
    images, labels = digits
    model = fit(build("lenet300"), images, labels, epochs=3, lr=0.05)
    masks = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.15
        for name, p in model.named_parameters()
        if p.ndim > 1
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    before = evaluate(model, images, labels)
    data = DataLoader(TensorDataset(images, labels), 64) if as_loader else (images, labels)
    finetune(model, masks, data, steps=120, optimiser=optimiser)
    gain = evaluate(model, images, labels) - before
    kind = f"{optimiser}, {'loader' if as_loader else 'tensors'}"
    assert_above(gain, 5, f"points that fine-tuning takes back, {kind}")
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()


def test_steps_and_the_order_are_as_asked(digits):
    images, labels = digits

    def tuned(**how):
        model = build("lenet300")
        finetune(model, {}, (images, labels), **how)
        return list(model.parameters())

    start, none = list(build("lenet300").parameters()), tuned(steps=0)
    assert all(map(torch.equal, none, start))
    first, again, other, longer = (
        tuned(steps=steps, seed=seed) for steps, seed in ((2, 0), (2, 0), (2, 1), (3, 0))
    )
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], longer[0])


def test_gradients_in_bfloat16_move_float32_weights_nearly_alike(digits):
    start = build("resnet8").eval()
    moves = []
    for bfloat16 in (False, True):
        model = copy.deepcopy(start)
        finetune(model, {}, digits, steps=1, optimiser="sgd", bfloat16=bfloat16)
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        moves.append(torch.cat([(after - before).flatten() for after, before in pairs]).detach())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(*moves)
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.99


def test_finetuning_that_diverges_is_an_error(digits):
    with pytest.raises(ValueError, match="with sgd diverged: take another of adam, adam-slow"):
        finetune(build("lenet300"), {}, digits, steps=20, optimiser="sgd", lr=1e12)


def test_finetuning_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        finetune(build("lenet300"), {}, [], steps=1)


def test_evaluate_counts_right_answers_and_keeps_the_mode():
    model = nn.Sequential(nn.Flatten(), nn.Identity()).train()
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    assert evaluate(model, logits, torch.tensor([0, 1, 2, 0, 1]), batch_size=2) == 60
    assert model.training
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, logits[:0], torch.tensor([], dtype=torch.int64))


def test_evaluate_is_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 4, bias=False))
    nn.init.eye_(model[1].weight)
    assert evaluate(model, torch.eye(4).repeat(50, 1), torch.arange(4).repeat(50)) == 100


@pytest.mark.parametrize("at", [0, 149])
def test_an_image_without_finite_logits_has_no_class(at):
    images = torch.ones(150, 2)
    images[at] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        evaluate(nn.Identity(), images, torch.zeros(150).long())


def test_images_that_the_network_cannot_take_are_told_of():
    with pytest.raises(ValueError, match=r"does not run on images like these, float32 \[3\]"):
        evaluate(nn.Linear(2, 2), torch.ones(5, 3), torch.zeros(5).long())
