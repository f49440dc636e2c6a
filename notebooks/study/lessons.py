"""What notebooks compute to show how something works; no run of a recipe depends on it."""

import copy
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from lib.finetune import evaluate
from lib.fold import fold_batchnorm
from lib.linear import hooked
from lib.masks import apply, density
from lib.relevance import Rule, scored_weights, weight_relevance
from lib.repair import refit

from . import names
from .bases import schedule
from .data import split
from .networks import build
from .tables import NETWORK, points_lost, smallest
from .training import augment_crop_flip, fit

TURNED = {
    "images per class, to weigh units": ("images-tiers", r"(\d+) images a class"),
    "images per class, to remove": ("images-tiers", r"(\d+) images a class, pruned"),
    "rule": ("scores", r"(\w+) abs contrastive"),
    "where propagation starts": ("scores", r"epsilon abs (.+)"),
    "how images are added up": ("scores", r"epsilon (\w+) contrastive"),
    "ranked over": ("scope", r"lrp-epsilon/contrastive/abs, (\w+)"),
    "widths of tiers": ("images-tiers", r"tiers (\(.+\))"),
    "steps of fine-tuning": ("finetuning", r"all, adam: (\d+)"),
}
"""By setting: the ablation's table, and the recipes in which it alone differs, with its value."""
ORDERS = ("nearest zero first", "farthest first", "at random")


def weight_times_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Weight x gradient of the true classes' logits, summed over images; nothing of LRP is used.

    BatchNorm is folded already; images [N, ...], labels [N]. By weight name, shaped like the
    weight.
    """
    network = copy.deepcopy(model).eval()
    network(images).gather(1, labels[:, None]).sum().backward()
    return {name: w.detach() * w.grad for name, w in scored_weights(network).items()}


def learning(dataset: str, model: str, seed: int = 0, **changed) -> pd.DataFrame:
    """Train a network as ``bases.base`` does, for one cycle, and look at it after each epoch.

    ``changed`` are fields of its ``Schedule`` that differ, such as ``epochs`` and ``lr``. Columns:
    dataset, model, seed, recipe (the split), knob (the epoch; zero before the first) and accuracy
    (percent).
    """
    how, rows = replace(schedule(dataset, model), **changed), []
    network = build(model, channels=split(dataset, "train")[0].shape[1], seed=seed)

    def look(epoch: int) -> None:
        for part, called in (("train", "training images"), ("val", "validation images")):
            said = {"dataset": dataset, "model": model, "seed": seed, "recipe": called}
            accuracy = evaluate(network, *split(dataset, part))
            rows.append(said | {"knob": epoch, "accuracy": accuracy})

    look(0)
    fit(network, *split(dataset, "train"), epochs=how.epochs, lr=how.lr, batch_size=how.batch_size,
        augment=augment_crop_flip if how.augment else None, seed=seed, after=look)  # fmt: skip
    return pd.DataFrame(rows)


def whereabouts(
    model: nn.Module, images: Tensor, labels: Tensor, rule: Rule | str, zero_bias: bool = False
) -> pd.DataFrame:
    """Where the relevance of the logits is found again, at each layer on the way to the input.

    What biases take is reckoned without LRP, as bias x gradient of the layers from this one to
    the output; so what neither weights nor biases have is really lost on the way.

    The model is a chain of layers with piecewise linear activations; ``zero_bias`` sets all biases
    to zero first, on a copy. Columns: layer (from the input), and weights, biases and lost: shares
    of the logits, in percent.
    """
    chain = copy.deepcopy(fold_batchnorm(model)).double().eval()
    images = images.double()
    biases = {name: p for name, p in chain.named_parameters() if name.endswith("bias")}
    if zero_bias:
        for bias in biases.values():
            nn.init.zeros_(bias)
    logits = chain(images).gather(1, labels[:, None]).sum()
    logits.backward()
    total = float(logits.detach())
    rows, taken = [], 0.0
    scores = weight_relevance(chain, images, labels, rule=rule)
    for name, score in reversed(scores.items()):
        bias = biases.get(name.removesuffix("weight") + "bias")
        taken += 0.0 if bias is None else float((bias.detach() * bias.grad).sum())
        weights, share = float(score.sum()) / total, taken / total
        rows.append({"weights": weights, "biases": share, "lost": 1 - weights - share})
    called = names.layers(chain)
    table = 100 * pd.DataFrame(rows[::-1])
    table.insert(0, "layer", [called[name] for name in scores])
    return table


def negative_shares(network: nn.Module, scores: dict[str, Tensor]) -> tuple[float, float]:
    """Of the weights with score <= 0, and of the others, how many percent are negative."""
    weight = torch.cat([network.get_parameter(name).detach().flatten() for name in scores])
    kept = torch.cat([score.flatten() for score in scores.values()]) > 0
    removed, left = (100 * float((weight[part] < 0).float().mean()) for part in (~kept, kept))
    return removed, left


def activity(networks: dict[str, nn.Module], images: Tensor) -> pd.DataFrame:
    """What the units of each layer do, averaged over images [N, ...] and positions.

    Networks, by label, are of one architecture, BatchNorm folded. Columns: layer, network (the
    label), mean activation (the positive part of the layer's output), active (% of unit outputs
    above zero), variance between images (% of the activations' variance; the rest is between
    units).
    """
    rows = []
    for label, network in networks.items():
        called, seen = names.layers(network), {}

        def keep(name: str, layer: nn.Module, inputs: tuple, output: Tensor, seen=seen) -> None:
            seen[name] = output.relu().flatten(2).mean(2) if output.ndim > 2 else output.relu()
            seen[f"{name} active"] = (output > 0).float().mean()

        layers = [name.removesuffix(".weight") for name in called]
        with torch.no_grad(), hooked(network, layers, keep):
            network(images)
        for layer in layers:
            output = seen[layer]  # [images, units]
            between = output.var(0, unbiased=False).mean() / output.var(unbiased=False)
            told = {"layer": called[f"{layer}.weight"], "network": label}
            told |= {"mean activation": float(output.mean())}
            told |= {"active (%)": 100 * float(seen[f"{layer} active"])}
            rows.append(told | {"variance between images (%)": 100 * float(between)})
    return pd.DataFrame(rows)


def removed_share(study, shares: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)) -> pd.DataFrame:
    """Accuracy when only some of the weights with relevance <= 0 go, in different orders.

    Of the study's networks the first of each kind, except slow ones; ``shares`` of the non-positive
    weights. Columns: dataset, model, seed, recipe (the order; the first also refitted), knob (the
    share), density (of all weights), test_accuracy and base_test_accuracy (percent).
    """
    rows = []
    for case in study.cases:
        if case.seed != study.cases[0].seed or case.model in study.profile.slow:
            continue
        network, (images, labels) = fold_batchnorm(study.base(case)), study.references(case)
        scores = weight_relevance(network, images, labels)
        base = study.base_accuracy(case, "test")
        for order in (*ORDERS, f"{ORDERS[0]}, refit"):
            for share in shares:
                masks = _without(scores, order, share)
                pruned = apply(network, masks)
                if share and order.endswith("refit"):
                    pruned = refit(network, pruned, masks, images)
                row = {"recipe": order, "knob": share, "density": density(masks)}
                row["test_accuracy"] = evaluate(pruned, *split(case.dataset, "test"))
                rows.append(asdict(case) | row | {"base_test_accuracy": base})
    return pd.DataFrame(rows)


def _without(scores: dict[str, Tensor], order: str, share: float) -> dict[str, Tensor]:
    """Masks without a share of the non-positive scores, taken in an order."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    candidates = (flat <= 0).nonzero().squeeze(1)
    turns = flat[candidates].argsort(descending=order.startswith("nearest"), stable=True)
    if order == "at random":
        turns = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[candidates[turns[: round(share * len(candidates))]]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {n: p.reshape(s.shape) for p, (n, s) in zip(parts, scores.items(), strict=True)}


def same_bytes(table: pd.DataFrame, ours: str, others: Iterable[str]) -> pd.DataFrame:
    """What recipes are worth in files no larger than one of them needs.

    For each network and seed, ``ours`` sets the size by its smallest file within one point of
    validation accuracy (its most accurate one, if none is). Of each other recipe of ``table``, of
    ``Study.sweep``, stands the file no larger than that which is most accurate on validation; or
    its smallest, if none is so small. Its rows, ours first, with a column ``room``: the bytes that
    there were.
    """
    rows = []
    for _, part in table.groupby([*NETWORK, "seed"], sort=False):
        floor, mine = part["base_val_accuracy"] - 1, part["recipe"] == ours
        best = smallest(part[mine], (part["val_accuracy"] >= floor)[mine])
        room = best["file_bytes"].item()
        rows.append(best.assign(room=room))
        for name in others:
            files = part[part["recipe"] == name]
            fit = files[files["file_bytes"] <= room].nlargest(1, "val_accuracy")
            found = fit if len(fit) else files.nsmallest(1, "file_bytes")
            rows.append(found.assign(room=room))
    return pd.concat(rows, ignore_index=True)


def settings(folder: Path) -> pd.DataFrame:
    """Runs in which one setting of the method is turned, all from the same network.

    From the tables ``ablation-*.csv`` of a folder (FileNotFoundError where one was not written
    yet), as of ``Study.sweep``; recipe is the setting, value what it was set to.
    """
    tables = {name: pd.read_csv(folder / f"ablation-{name}.csv") for name, _ in TURNED.values()}
    parts = []
    for setting, (name, pattern) in TURNED.items():
        table = tables[name]
        values = table["recipe"].str.extract(rf"^{pattern}$")[0]
        chosen = values.notna() & (table["model"] == tables["scores"]["model"].iloc[0])
        parts.append(table[chosen].assign(recipe=setting, value=values))
    return pd.concat(parts, ignore_index=True)


def by_value(turned: pd.DataFrame) -> pd.DataFrame:
    """Of each of ``settings`` the value that loses least and the one that loses most.

    By setting: best, least lost, worst, most lost (points of test accuracy, mean over seeds).
    """
    means = turned.assign(lost=points_lost(turned)).groupby(["recipe", "value"], sort=False)
    means = means["lost"].mean().reset_index("value")
    ends = means.sort_values("lost").groupby(level=0, sort=False).agg(["first", "last"])
    ends.columns = ["best", "worst", "least lost", "most lost"]
    order = [setting for setting in TURNED if setting in ends.index]
    return ends.loc[order, ["best", "least lost", "worst", "most lost"]].rename_axis("setting")
