import pytest
import torch
from spread import assert_above, assert_below

from lib.finetune import evaluate
from study import bases, training
from study.networks import build
from study.training import augment_crop_flip, fit


def test_fit_learns_and_is_deterministic(digits):
    images, labels = digits
    models = [fit(build("lenet300"), images, labels, epochs=6, lr=0.05) for _ in range(2)]
    assert_above(evaluate(models[0], images, labels), 90, "accuracy on the training images")
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_fit_goes_on_where_it_was_interrupted(digits, tmp_path, monkeypatch):
    settings = {"epochs": 3, "lr": 0.05, "seed": 2}
    whole = fit(build("lenet300"), *digits, **settings)
    file, seen, original = tmp_path / "state.pt", [], training.batches

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(build("lenet300"), *digits, checkpoint=file, **settings)
    monkeypatch.setattr(training, "batches", original)
    resumed = fit(build("lenet300", seed=9), *digits, checkpoint=file, **settings)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_the_mean_of_the_weights_is_returned(digits, monkeypatch):
    seen, original = [], training.AveragedModel.update_parameters

    def spied(mean, model):
        seen.append([p.detach().clone() for p in model.parameters()])
        original(mean, model)

    monkeypatch.setattr(training.AveragedModel, "update_parameters", spied)
    model = fit(build("resnet8"), *digits, epochs=3, lr=0.02, average=True)
    assert len(seen) == 3 * (len(digits[1]) // 128)
    for parameter, passes in zip(model.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(parameter, torch.stack(passes).mean(0), rtol=1e-4, atol=1e-6)
    # in BatchNorms the statistics are those of the mean, estimated over one pass of the images
    inputs, norm = model[0](digits[0]), model[1]
    mean = inputs.mean((0, 2, 3))
    error = (norm.running_mean - mean).abs() / (0.02 + 0.05 * mean.abs())
    assert_below(error.max().item(), 1, "error of a statistic over what may be")


def test_averaging_goes_on_where_it_was_interrupted(digits, tmp_path, monkeypatch):
    settings = {"epochs": 3, "lr": 0.02, "average": True}
    whole = fit(build("resnet8"), *digits, **settings)
    file, original = tmp_path / "state.pt", training.AveragedModel.update_parameters

    def interrupted(mean, model):
        if mean.n_averaged == 12:
            raise KeyboardInterrupt
        original(mean, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.AveragedModel, "update_parameters", interrupted)
        fit(build("resnet8"), *digits, checkpoint=file, **settings)
    resumed = fit(build("resnet8", seed=9), *digits, checkpoint=file, **settings)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_augmentation_shifts_and_mirrors():
    images = torch.arange(2 * 64.0).reshape(2, 1, 8, 8) + 1
    moved = augment_crop_flip(images.repeat(100, 1, 1, 1), torch.Generator().manual_seed(0))
    assert moved.shape == (200, 1, 8, 8)
    inside = [moved[i, 0] for i in range(0, 200, 2) if (moved[i] > 0).all()]
    assert any(torch.equal(image, images[0, 0]) for image in inside) or any(
        torch.equal(image, images[0, 0].flip(1)) for image in inside
    )
    rows = torch.unique(moved[moved > 0])
    assert set(rows.tolist()) <= set(images.flatten().tolist())


def test_base_trains_once_and_reads_afterwards(tmp_path, monkeypatch):
    monkeypatch.setitem(bases.SCHEDULES, ("digits", "lenet300"), bases.Schedule(1, 0.05))
    first = bases.base("digits", "lenet300", 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits-lenet300-s0.safetensors"]
    monkeypatch.setattr(bases, "fit", None)
    second = bases.base("digits", "lenet300", 0, tmp_path)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_cycles_are_added_to_a_checkpoint_that_has_fewer(tmp_path, monkeypatch):
    def train(cycles):
        how = bases.Schedule(1, 0.05, cycles=cycles)
        monkeypatch.setitem(bases.SCHEDULES, ("digits", "lenet300"), how)
        return list(bases.base("digits", "lenet300", 0, tmp_path).parameters())

    once, twice = train(1), train(2)
    assert not torch.equal(once[0], twice[0])
    (tmp_path / "digits-lenet300-s0.safetensors").unlink()
    assert all(map(torch.equal, train(2), twice))
    monkeypatch.setattr(bases, "fit", None)
    assert all(map(torch.equal, train(2), twice))


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="no training schedule for digits/vgg16; known: .*lenet5"):
        bases.schedule("digits", "vgg16")


def test_a_cycle_that_is_added_is_averaged_anew(tmp_path, monkeypatch):
    def train(**how):
        monkeypatch.setitem(bases.SCHEDULES, ("digits", "lenet300"), bases.Schedule(1, 0.05, **how))
        assert not bases.is_trained("digits", "lenet300", 0, tmp_path)
        network = bases.base("digits", "lenet300", 0, tmp_path)
        assert bases.is_trained("digits", "lenet300", 0, tmp_path)
        return network

    train(averaged=1)
    seen, original = [], bases.fit

    def spied(*args, **settings):
        seen.append(settings["average"])
        return original(*args, **settings)

    monkeypatch.setattr(bases, "fit", spied)
    train(cycles=2, averaged=1)
    assert seen == [False, True]


def test_a_stage_does_not_go_on_from_another_ones_state(tmp_path, monkeypatch):
    key, original = ("digits", "lenet300"), training.batches

    def interrupted(*args):
        if list(tmp_path.glob("*.partial.pt")):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setitem(bases.SCHEDULES, key, bases.Schedule(1, 0.05))
    bases.base(*key, 0, tmp_path)
    monkeypatch.setitem(bases.SCHEDULES, key, bases.Schedule(2, 0.05, cycles=2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "batches", interrupted)
        bases.base(*key, 0, tmp_path)
    monkeypatch.setitem(bases.SCHEDULES, key, bases.Schedule(2, 0.05, averaged=1))
    bases.base(*key, 0, tmp_path)
    assert bases.is_trained(*key, 0, tmp_path)


def test_a_large_network_is_kept_compressed_and_is_what_was_kept(tmp_path, monkeypatch):
    key = ("digits", "lenet300")
    monkeypatch.setitem(bases.SCHEDULES, key, bases.Schedule(1, 0.05, averaged=1, bits=8))
    first = bases.base(*key, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".xaic"
    size = path.stat().st_size / sum(p.numel() for p in first.parameters())
    assert_below(size, 1.1, "bytes a weight")
    assert first[1].weight.unique().numel() <= 256
    monkeypatch.setattr(bases, "fit", None)
    again = bases.base(*key, 0, tmp_path)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
