"""The networks of the experiments; the table takes new ones: ``NETWORKS[name] = Network(...)``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .paths import check_known


def lenet300(classes: int, channels: int) -> nn.Module:
    """LeNet-300-100 for 28x28 images (LeCun et al. 1998): 266,200 weights at one channel."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784 * channels, 300), nn.ReLU()),
        *(nn.Linear(300, 100), nn.ReLU()),
        nn.Linear(100, classes),
    )


def lenet5(classes: int, channels: int) -> nn.Module:
    """LeNet-5 as in Caffe, for 28x28 images: 430,500 weights at one channel."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(800, 500), nn.ReLU()),
        nn.Linear(500, classes),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride, self.widen = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.widen:
            x = F.pad(x, (0, 0, 0, 0, self.widen // 2, self.widen - self.widen // 2))
        return self.relu2(y + x)


def _resnet(
    classes: int, channels: int, widths: tuple[int, ...], blocks: int, stride: int = 1
) -> nn.Module:
    layers = [nn.Conv2d(channels, widths[0], 3, stride, 1, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(inputs, width, 2 if stage > 0 and block == 0 else 1))
            inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def resnet8(classes: int, channels: int) -> nn.Module:
    """A ResNet of three blocks with 8, 16 and 32 channels: 18,824 weights at one channel.

    Its first convolution has stride 2, for digits enlarged to 28x28.
    """
    return _resnet(classes, channels, (8, 16, 32), blocks=1, stride=2)


def resnet20(classes: int, channels: int) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016): 268,336 weights in convolutions and classifier."""
    return _resnet(classes, channels, (16, 32, 64), blocks=3)


def vgg16(classes: int, channels: int) -> nn.Module:
    """VGG-16 with BatchNorm for 32x32 images, one linear layer: 14.7 million weights."""
    layers: list[nn.Module] = []
    for outputs, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


@dataclass(frozen=True)
class Network:
    """One architecture."""

    make: Callable[[int, int], nn.Module]  # (classes, channels) -> network
    channels: int  # of the images that it is known for


NETWORKS: dict[str, Network] = {
    "lenet300": Network(lenet300, 1),
    "lenet5": Network(lenet5, 1),
    "resnet8": Network(resnet8, 1),
    "resnet20": Network(resnet20, 3),
    "vgg16": Network(vgg16, 3),
}


def build(name: str, *, classes: int = 10, channels: int | None = None, seed: int = 0) -> nn.Module:
    """Make one of ``NETWORKS`` with freshly drawn weights: in training mode, on the CPU, float32.

    Images have by default the channels of the data that the network is known for. The seed is of
    the initial weights (He et al. 2015 for convolutions); the caller's generator is left as it was.
    A ValueError lists the known names.
    """
    check_known("model", name, NETWORKS)
    network = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.make(classes, network.channels if channels is None else channels)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
