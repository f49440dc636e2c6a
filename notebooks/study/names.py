"""What things are called in figures: one table, so that a legend needs no code to be read."""

import re

import pandas as pd
from torch import nn

from lib.relevance import scored_weights

from .data import DATASETS

CRITERIA = {
    "lrp-epsilon": "relevance",
    "lrp-epsilon/contrastive": "contrastive relevance",
    "lrp-epsilon/contrastive/abs": "|contrastive relevance|",
    "lrp-epsilon/contrastive/rms": "contrastive relevance, root mean square",
    "magnitude": "|weight|",
    "magnitude-folded": "|weight|, BatchNorm folded",
    "literal": "literal rule",
    "all": "reading that works",
    "deeplift": "DeepLIFT",
    "taylor": "weight × gradient of the loss, squared",
    "fisher": "squared gradients (Fisher)",
    "hessian-trace": "trace of the Hessian",
    "alike": "all alike",
    "random": "random",
    "lrp": "relevance",
    "lrp contrastive": "contrastive relevance",
    "lrp root": "√ relevance",
    "shuffled root": "√ relevance, dealt out at random",
    "reversed": "relevance in reverse",
    "deeplift 100%": "XAI baseline, all filters",
    "deeplift 80%": "XAI baseline, 80 % of filters",
    "magnitude 20%": "largest fifth of |weight|",
}
"""By the name in a recipe: what scores weights, or weighs units; or how much of them is kept."""

WAYS = {"tiers by ": "tiers: ", "units by ": "units: ", "units ": "units: "}
"""Of storing: bits by the rank of a weight, or rounding weighed by unit."""

CHANGES = {"root:": "√ {}", "shuffled:": "{}, dealt out at random", "reversed:": "{}, in reverse"}

STAGES = {", sequential": ", layer after layer", ", trained": ", in training"}

PARTS = {
    "epsilon": "ε", "zplus": "z⁺", "gamma": "γ", "alpha2beta1": "α2β1",
    "target": "true class", "contrastive": "contrastive", "softmax-gradient": "softmax",
    "sum": "sum", "abs": "sum of |·|", "rms": "root mean square",
}  # fmt: skip
"""Of a score: rule / where propagation starts / how images are added up."""

WHOLE = {
    "uniform bits": "same bits for all",
    "nncodec": "NNCodec (ISO/IEC 15938-17)",
    "deep compression": "Deep Compression, no training",
    "gptq": "GPTQ",
    "target start": "start at the true class",
    "z+ instead of epsilon": "z⁺ instead of ε",
    "epsilon-plus-flat": "ε, z⁺, flat",
    "lenet300": "LeNet-300-100",
    "lenet5": "LeNet-5",
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
    "vgg16": "VGG-16",
    "mobilenet": "MobileNetV3-small",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}

WORDS = {r"\badam-slow\b": "Adam, a tenth of the rate", r"\badam\b": "Adam", r"\bsgd\b": "SGD",
         r"^1 images\b": "1 image"}  # fmt: skip
"""Patterns that are told otherwise wherever they stand."""

_CODED = re.compile(
    r"(?:(?:tiers|units) by )?(?:(?:shuffled|reversed|root):)*"
    r"\b(?:lrp-[\w/-]+|lrp root|shuffled root|lrp|alike|fisher|hessian-trace|deeplift"
    r"|uniform bits|(?<=s by )(?:random|magnitude))\b"
    r"(?:, pruned)?(?:, sequential|, trained)?(?:, more images)?"
)
"""What recipes are called in tables, wherever it stands in a sentence."""

TEXTS = ("dataset", "model", "recipe", "against", "criterion", "method", "start")
"""Columns of tables that hold names."""

CIFAR = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def readable(name: str) -> str:
    """What a recipe, criterion, rule, network or data set is called in figures.

    Of ``units by shuffled:root:lrp-epsilon/contrastive`` it is ``units: √ contrastive relevance,
    dealt out at random``; the name itself where nothing better is known.
    """
    for known in (WHOLE, CRITERIA):
        if name in known:
            return known[name]
    for prefix, shown in WAYS.items():
        if name.startswith(prefix):
            return shown + readable(name.removeprefix(prefix))
    for prefix, pattern in CHANGES.items():
        if name.startswith(prefix):
            return pattern.format(readable(name.removeprefix(prefix)))
    parts = re.split("[/ ]", name)
    if all(part in PARTS for part in parts):
        return ", ".join(PARTS[part] for part in parts)
    for word, said in STAGES.items():
        name = name.replace(word, said)
    for pattern, said in WORDS.items():
        name = re.sub(pattern, said, name)
    first, comma, rest = name.partition(", ")
    return CRITERIA.get(first, first) + comma + rest


def spelled_out(sentence: str) -> str:
    """A sentence that names recipes as tables do, with ``readable`` names in their place."""
    return _CODED.sub(lambda found: readable(found[0]), sentence)


def told(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose columns of names (``TEXTS``) say what they are called in figures."""
    return table.assign(**{name: table[name].map(readable) for name in TEXTS if name in table})


def glossary() -> pd.DataFrame:
    """All names that ``readable`` knows: as in tables and recipes, and as in figures."""
    known = (
        WHOLE | CRITERIA | {name: readable(name) for name in (*PARTS, "adam", "adam-slow", "sgd")}
    )
    changed = {f"{before}…": f"{said}…" for before, said in WAYS.items()}
    changed |= {f"{before}…": said.format("…") for before, said in CHANGES.items()}
    changed |= {f"…{before}": f"…{said}" for before, said in STAGES.items()}
    rows = (known | changed).items()
    return pd.DataFrame(rows, columns=["in recipes and tables of results/", "in figures and texts"])


def network(dataset: str, model: str) -> str:
    """Such as ``LeNet-5 on digits``."""
    return f"{readable(model)} on {readable(dataset)}"


def classes(dataset: str) -> list[str]:
    """What the labels of a data set stand for."""
    data = DATASETS[dataset]
    return list(CIFAR) if data.kind == "cifar" else [str(label) for label in range(data.classes)]


def place(where: str) -> str:
    """Where a claim was tested, such as ``digits-lenet5-s0``, as ``network`` says it."""
    dataset, _, model = re.sub(r"-s\d+$", "", where).rpartition("-")
    return network(dataset, model) if dataset else readable(where)


def layers(model: nn.Module) -> dict[str, str]:
    """By weight name the layer's place, counted from the input, and its kind: ``4 linear``."""
    kinds = {2: "linear", 3: "conv", 4: "conv"}
    weights = scored_weights(model)
    return {
        name: f"{place} {kinds.get(weight.ndim, 'layer')}"
        for place, (name, weight) in enumerate(weights.items(), 1)
    }
