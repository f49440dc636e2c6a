"""Networks changed layer by layer: the order, where branches end, what each layer is aimed at."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.fold import fold_batchnorm
from lib.inputs import UnsupportedLayerError
from lib.lockstep import Plan, change_in_order, plan
from study.networks import build


class Branches(nn.Module):
    """A block with a projection on its shortcut, summed in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.large = nn.Conv2d(4, 6, 3, padding=1)
        self.small = nn.Conv2d(4, 6, 1)
        self.last = nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = self.large(x)
        shortcut = self.small(x)
        if self.how == "+":
            y = y + shortcut
        elif self.how == "+=":
            y += shortcut
        elif self.how == "add_ without its result":
            y.add_(shortcut)
        elif self.how == "torch.add":
            y = torch.add(shortcut, y)
        return self.last(F.relu(y).mean((2, 3)))


SUMS = ["+", "+=", "add_ without its result", "torch.add"]


def noise(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize("how", SUMS)
def test_the_larger_of_two_branches_takes_back_the_drift_of_the_other(how):
    dense, images = Branches(how).eval(), torch.randn(5, 1, 6, 6)
    network = noise(Branches(how).eval())
    route = plan(network, images)
    assert route.layers == ["first", "large", "small", "last"]
    assert route.branch_ends == {"large"}
    seen = []

    def change(name, layer, inputs, output, target):
        torch.testing.assert_close(layer.forward(inputs), output)
        seen.append((name, inputs.clone(), target.clone()))
        with torch.no_grad():
            layer.weight *= 1.01

    change_in_order(dense, network, images, route, change)
    assert [name for name, *_ in seen] == ["first", "small", "large", "last"]
    a = dense.first(images)
    torch.testing.assert_close(seen[0][2], a)
    coded = F.relu(network.first(images))  # as it is after the change
    torch.testing.assert_close(seen[1][1], coded)
    torch.testing.assert_close(seen[1][2], dense.small(F.relu(a)))
    whole = dense.large(F.relu(a)) + dense.small(F.relu(a))
    torch.testing.assert_close(seen[2][2], whole - network.small(coded))
    drifted = F.relu(network.large(coded) + network.small(coded)).mean((2, 3))
    torch.testing.assert_close(seen[3][1], drifted)
    torch.testing.assert_close(seen[3][2], dense(images))


def test_dropout_between_a_layer_and_the_sum_changes_nothing():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(self.two(self.one(x).relu()))

    assert plan(Dropped().eval(), torch.randn(3, 4)).branch_ends == {"two"}


def test_an_output_that_something_else_reads_ends_no_branch():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.one(x)
            return self.two(y + x) * y

    assert plan(Read().eval(), torch.randn(3, 4)).branch_ends == set()


@pytest.mark.parametrize("act", [F.relu, F.silu, F.leaky_relu, F.hardswish])
def test_an_output_that_is_changed_in_place_ends_no_branch(act):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.last = (nn.Conv2d(2, 2, 1) for _ in range(3))

        def forward(self, x):
            h = self.stem(x)
            return self.last(h + act(self.inner(h), inplace=True))

    dense, images = Block().eval(), torch.randn(4, 2, 3, 3)
    assert plan(dense, images).branch_ends == set()
    network = copy.deepcopy(dense)
    change_in_order(dense, network, images, plan(network, images), lambda *_: None)
    with torch.no_grad():
        torch.testing.assert_close(network(images), dense(images))


def test_scaled_and_broadcast_sums_end_no_branch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.add(x, self.two(self.one(x) + self.shift), alpha=2.0)

    assert plan(Scaled().eval(), torch.randn(3, 4)).branch_ends == set()


def test_branches_of_residual_networks_end_at_their_second_convolutions():
    network = fold_batchnorm(build("resnet8"))
    route = plan(network, torch.randn(2, 1, 28, 28))
    assert route.branch_ends == {name for name in route.layers if name.endswith("conv2")}
    assert len(route.branch_ends) == 3
    assert plan(build("lenet5").eval(), torch.randn(2, 1, 28, 28)).branch_ends == set()


def test_layers_called_twice_are_left_as_they_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.shared(self.shared(x)))

    assert plan(Twice().eval(), torch.randn(2, 4)).layers == ["last"]


def test_errors_of_either_pass_are_raised_and_no_thread_stays():
    class Odd(nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.one, self.two, self.limit = nn.Linear(4, 4), nn.Linear(4, 4), limit

        def forward(self, x):
            x = self.one(x)
            if len(x) > self.limit:
                raise RuntimeError("too many")
            return self.two(x)

    def keep(*arguments):
        return None

    def fail(*arguments):
        raise KeyError("stop")

    images, both = torch.randn(5, 4), Plan(["one", "two"], set())
    with pytest.raises(RuntimeError, match="too many"):
        change_in_order(Odd(2).eval(), Odd(9).eval(), images, both, keep)
    with pytest.raises(KeyError, match="stop"):
        change_in_order(Odd(9).eval(), Odd(9).eval(), images, both, fail)
    assert threading.active_count() == 1 or all(
        thread.daemon is False or thread is threading.main_thread()
        for thread in threading.enumerate()
        if "_run" in repr(thread)
    )


def test_the_dense_network_stays_as_it_is():
    dense = build("resnet8").eval()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    folded = fold_batchnorm(dense)

    def change(name, layer, *rest):
        layer.weight.zero_()

    network = fold_batchnorm(dense)
    route = plan(network, torch.randn(2, 1, 28, 28))
    change_in_order(folded, network, torch.randn(4, 1, 28, 28), route, change)
    assert all((network.get_submodule(name).weight == 0).all() for name in route.layers)
    assert all((folded.get_submodule(name).weight != 0).any() for name in route.layers)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


class Parting(nn.Module):
    """One of two layers, by what the first gives."""

    def __init__(self, threshold):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))
        self.last, self.threshold = nn.Linear(4, 4), threshold

    def forward(self, x):
        h = self.first(x)
        return self.last(self.one(h) if h.max() > self.threshold else self.two(h))


def test_networks_that_part_are_refused():
    route, images = Plan(["first", "one", "two", "last"], set()), torch.randn(4, 4)
    with pytest.raises(
        UnsupportedLayerError, match="'one' cannot be coded.*which images it reads depends.*lrp-rd"
    ):
        change_in_order(Parting(100).eval(), Parting(-100).eval(), images, route, lambda *_: None)
