"""Arguments, images, models and files that ``compress`` and its files refuse by name."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lib.codec import CompressedFileError
from lib.compress import compress
from lib.relevance import UnsupportedLayerError
from study.networks import build

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recipe": "lrp"}, "unknown recipe 'lrp'; known: .*lrp-paper"),
        ({"recipe": "lrp-paper-finetuned"}, "trains: give it train="),
        ({"bits": 3, "ratio": 9}, "one budget, not bits and ratio"),
        ({"bits": 0}, "bits must be a positive number"),
        ({"bits": float("nan")}, "bits must be a positive number"),
        ({"ratio": -1}, "ratio must be a positive number"),
        ({"ratio": float("inf")}, "ratio must be a positive number"),
        ({"ratio": "8"}, "ratio must be a number, not '8'"),
        ({"bits": True}, "bits must be a number, not True"),
        (
            {"train": (torch.zeros(2), torch.zeros(2), torch.zeros(2))},
            "train must be .*not 3 parts",
        ),
        ({"max_drop": 1.0}, "give val="),
        ({"max_drop": -1.0}, "max_drop must be a positive number"),
        ({"recipe": "lrp-rd", "ratio": 1e6}, "ratio=1e.06 cannot be met.*smallest file has"),
        ({"recipe": "uniform", "bits": 0.1}, "bits=0.1 cannot be met.*smallest file has"),
    ],
)
def test_unusable_arguments_name_the_way_out(arguments, message, trained, references):
    with pytest.raises(ValueError, match=message):
        compress(trained, *references, **arguments)


def test_unusable_images_labels_and_models(trained, references):
    images, labels = references
    for bad_images, bad_labels, message in [
        (images, labels + 5, "label"),
        (images * torch.nan, labels, "NaN|finite"),
        (images[:0], labels[:0], "empty|no "),
    ]:
        for recipe in ("lrp-sequential", "lrp-root-rd", "lrp-paper"):
            with pytest.raises(ValueError, match=message):
                compress(trained, bad_images, bad_labels, recipe)
    with pytest.raises(ValueError, match="the model has no linear, convolution"):
        compress(nn.Sequential(nn.Flatten(), nn.ReLU()), images, labels)
    with pytest.raises(UnsupportedLayerError, match="odd"):
        first, last = nn.Conv2d(1, 1, 1), nn.Linear(196, 10)
        odd = nn.FractionalMaxPool2d(2, output_size=14)
        layers = {"first": first, "odd": odd, "flat": nn.Flatten(), "last": last}
        compress(nn.Sequential(OrderedDict(layers)), images, labels)


def test_file_of_another_architecture_is_refused(trained, references):
    compressed = compress(trained, *references, "uniform")
    with pytest.raises(CompressedFileError, match="architecture"):
        compressed.to_model(build("lenet5"))
