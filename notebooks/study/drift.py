"""How errors add up from layer to layer of a coded network."""

from dataclasses import asdict

import pandas as pd
import torch
from torch import Tensor, nn

from lib.fold import fold_batchnorm
from lib.linear import hooked, layers_of

from .profiles import Case


def seen(network: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer with weights reads and puts out, by its path, in the order of the calls.

    ``images`` [N, ...] go all at once through the network in evaluation mode, whose layers are
    called once each; input and output have a row for each image.
    """
    found = {}

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found[name] = inputs[0].clone(), output.clone()  # both may be changed in place later

    with torch.no_grad(), hooked(network.eval(), layers_of(network), keep):
        network(images)
    return found


def drift(
    dense: nn.Module, coded: dict[str, nn.Module], images: Tensor, case: Case
) -> pd.DataFrame:
    """How far coded networks, by recipe, have drifted from the dense one, stage by stage.

    What a stage gives is what the next layer reads: after activation, pooling and the sum with a
    shortcut, so that an error that is made to cancel one of the shortcut does not count as one. The
    last stage gives the logits. ``images`` [N, ...] are other ones than those that the networks
    were coded with. Columns: dataset, model, seed, recipe, layer (the stage ends behind it), knob
    (its number) and error: the mean squared difference over the variance of the dense network's
    values.
    """
    truth, rows = _stages(dense, images), []
    for recipe, network in coded.items():
        for number, (layer, value) in enumerate(_stages(network, images).items(), 1):
            wanted = truth[layer]
            error = float((value - wanted).square().mean() / wanted.var())
            told = {"recipe": recipe, "layer": layer, "knob": number, "error": error}
            rows.append(asdict(case) | told)
    return pd.DataFrame(rows)


def _stages(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By the layer that a stage ends behind, what the stage gives."""
    layers = list(seen(fold_batchnorm(network), images).items())
    given = {name: read for (name, _), (_, (read, _)) in zip(layers, layers[1:], strict=False)}
    last, (_, logits) = layers[-1]
    return given | {last: logits}
