"""The claims of each notebook, from what it measured; notebooks and ``make verify`` ask here."""

import operator
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from lib import Compressed
from lib.finetune import evaluate

from .data import split
from .jobs import float_bytes
from .paths import STANDARD
from .profiles import Case
from .readings import (
    headline,
    precision_claims,
    removal_claims,
    seeds_of,
    size_claims,
    worse_claims,
)
from .tables import NETWORK, each_network
from .verdicts import Claim, judge, single

LRP = "lrp-epsilon/contrastive"
GOALS = {
    ("mnist", "lenet300"): 98.2,
    ("mnist", "lenet5"): 99.2,
    ("cifar10", "resnet20"): 91.5,
    ("cifar10-jpeg", "resnet20"): 88.0,
    ("cifar10", "vgg16"): 93.0,
    ("cifar10-jpeg", "vgg16"): 89.0,
}
"""Test accuracy that base networks are known to reach with plain training; 96 % on digits."""
TIERED = "tiers by lrp-epsilon/contrastive/abs"
TIERS_CONTROLS = (
    "tiers by magnitude", "tiers by random", "tiers by reversed:lrp-epsilon/contrastive/abs",
)  # fmt: skip
OURS = ["lrp", "lrp, half pruned", "lrp, pruned", "lrp root", "lrp root, half pruned"]
OURS_TUNED = ["lrp, pruned, fine-tuned"]
BASELINE = ["deeplift 100%", "deeplift 80%"]
BASELINE_REFITTED = ["deeplift 80%, refit"]
BASELINE_TUNED = ["deeplift 100%, fine-tuned", "deeplift 80%, fine-tuned"]
WORKS = "all: contrastive, four rounds, refit"
INGREDIENTS = {
    "the contrastive start": "target start",
    "epsilon rather than z+": "z+ instead of epsilon",
    "rounds with scoring anew": "once instead of four rounds",
    "refit rather than renormalisation": "renormalised instead of refit",
    "repair at all": "no repair",
    "relevance rather than random scores": "random scores",
}
"""Of the reading that works, by what it is called: the recipe without it."""
WAYS = {"the root of relevance": "lrp root", "relevance": "lrp"}
"""Of weighing units by relevance: in words, and in the names of recipes of `06-beyond`."""
CRITERIA = ("alike", "fisher")
CONTROLS = ("shuffled root", "reversed")
SEQUENTIAL = {
    name: f"{name}, sequential" for name in (*WAYS.values(), *CRITERIA, *CONTROLS, "lrp, pruned")
}
"""Recipes that code all layers at once: the same layer after layer."""
CONTRIBUTION = [
    *((f"{ours}, sequential", f"{other}, sequential")
      for ours in WAYS.values() for other in (*CRITERIA, *CONTROLS)),
    *((f"{ours}, pruned, sequential", "alike, pruned, sequential") for ours in WAYS.values()),
]  # fmt: skip
"""Recipes that differ in how units are weighed alone."""
MORE = {
    name: f"{name}, sequential, more images" for name in (*WAYS.values(), *CRITERIA, CONTROLS[0])
}
"""Recipes that code layer after layer, with ten times the reference images."""
MORE_BRINGS = [(more, f"{name}, sequential") for name, more in MORE.items()]
MORE_CONTRIBUTION = [
    (MORE[ours], MORE[other]) for ours in WAYS.values() for other in (*CRITERIA, CONTROLS[0])
]
TRAINED = "lrp root, trained"
TRAINED_RIVALS = ("alike, trained", "fisher, trained", "shuffled root, trained", "ECQx")
"""Recipes that train: ours; those that weigh units otherwise, and the rival."""
BD_PAIRS = [
    *((sequential, name) for name, sequential in SEQUENTIAL.items()),
    *MORE_BRINGS,
    *CONTRIBUTION,
    *MORE_CONTRIBUTION,
]


def saved(case: Case, model: nn.Module, compressed: Compressed, path: Path) -> list[Claim]:
    """Q1 to Q3 of a file, measured on the network that is loaded from it."""
    network, expected = Compressed.load(path).to_model(model), compressed.to_model(model)
    before, after = (evaluate(n, *split(case.dataset, "test")) for n in (model, network))
    pairs = zip(network.state_dict().values(), expected.state_dict().values(), strict=True)
    identical = all(torch.equal(one, two) for one, two in pairs)
    ratio, lost = float_bytes(model) / path.stat().st_size, before - after
    return [
        single("Q1", "the file is at least 10 times smaller than the float32 weights", case, "10",
               f"{ratio:.1f}", ratio >= 10, case.seed),
        _little_lost("Q2", case, lost, case.seed), _equal("Q3", case, identical, case.seed),
    ]  # fmt: skip


def your_model(ratio: float, equal: bool, lost: float, seed: int) -> list[Claim]:
    """Y1 to Y3, from how many times smaller a file is, whether bits agree, and points lost."""
    where = "digits-mobilenet"
    sentence = "a torchvision network meets a given ratio"
    return [
        single("Y1", sentence, where, "16", f"{ratio:.2f}", ratio >= 16, seed),
        _equal("Y2", where, equal, seed),
        _little_lost("Y3", where, lost, seed),
    ]


def _little_lost(identifier: str, where: object, lost: float, seed: int) -> Claim:
    sentence = "at most 1 point of test accuracy is lost"
    return single(identifier, sentence, where, "1.0", f"{lost:.2f}", lost <= 1, seed)


def _equal(identifier: str, where: object, equal: bool, seed: int) -> Claim:
    sentence = "the loaded network equals the saved one, bit for bit"
    said = "equal" if equal else "not equal"
    return single(identifier, sentence, where, "equal", said, equal, seed)


def base_networks(bases: pd.DataFrame) -> list[Claim]:
    """B1, from the table ``bases``."""
    sentence, claims = "the base network is as accurate as it is known to be", []
    for where, part in each_network(bases):
        goal, reached = GOALS.get(tuple(part[NETWORK].iloc[0]), 96.0), part["test"]
        said, verdict = f"{reached.mean():.2f}", judge(reached, goal)
        claims.append(Claim("B1", sentence, where, f"{goal}", said, verdict, seeds_of(part)))
    return claims


def relevance(case: Case, worst: float, difference: float, needed: pd.DataFrame) -> list[Claim]:
    """R1 to R3, from the largest errors and the table ``relevance-references``."""
    return [
        single("R1", "relevance is conserved in every layer at zero bias", case,
               "relative error < 1e-4", f"{worst:.1e}", worst < 1e-4, case.seed),
        single("R2", "input relevance agrees with zennit", case, "relative difference < 1e-3",
               f"{difference:.1e}", difference < 1e-3, case.seed),
        *references(str(case), needed),
    ]  # fmt: skip


def references(where: str, needed: pd.DataFrame) -> list[Claim]:
    """R3, from the table ``relevance-references``: draws of images for one network."""
    goal, seed = "rank correlation > 0.95", int(where.rpartition("-s")[2])
    enough = needed[needed["knob"] == 20].groupby("scores")["rank correlation"].mean()
    sentence = "20 images of each class rank the weights as all reference images do"
    readings = {"sum": "signed sums, as in the paper", "abs": "sums of magnitudes"}
    return [
        single("R3", f"{sentence} ({reading})", where, goal, f"{enough[scores]:.3f}",
               bool(enough[scores] > 0.95), seed)
        for scores, reading in readings.items()
    ]  # fmt: skip


def pruning(removal: pd.DataFrame, steps: int) -> list[Claim]:
    """C4 and C4s, from the table ``removal`` and the number of steps of fine-tuning."""
    readings = {
        "lrp, at once (literal)": "literal, no training",
        "lrp, at once, fine-tuned": f"literal, {steps} steps of fine-tuning",
        "lrp contrastive, half, refit": "the half nearest zero, refit, no training",
        "lrp contrastive, gradual, refit": "four rounds, nearest zero first, refit, no training",
        "lrp contrastive, gradual, refit, fine-tuned": "the same and fine-tuned",
    }
    claims = [
        claim for name, what in readings.items() for claim in removal_claims(removal, name, what)
    ]
    for name, rival in [
        ("lrp, at once, refit", "reversed, at once, refit"),
        ("lrp contrastive, gradual, refit", "reversed, gradual, refit"),
    ]:
        reading = name.removeprefix("lrp").strip(" ,")
        rivals = {f"removing positive scores instead does more harm ({reading})": rival}
        claims += worse_claims(removal, "C4s", ">= 1.0 point worse", name, rivals)
    return claims


def precision(tiered: pd.DataFrame, distorted: pd.DataFrame) -> list[Claim]:
    """C5, from the tables ``tiers`` and ``rate-distortion``."""
    claims = precision_claims(
        tiered, TIERED, [*TIERS_CONTROLS, "uniform bits"], "tiers by |relevance|"
    )
    for name, way in [(LRP, "relevance"), (f"root:{LRP}", "the root of relevance")]:
        controls = ("alike", f"shuffled:{name}", f"reversed:{LRP}")
        rivals = [*(f"units by {control}" for control in controls), "uniform bits"]
        claims += precision_claims(
            distorted, f"units by {name}", rivals, f"rate-distortion by {way}"
        )
    return claims


def against_baseline(table: pd.DataFrame, by_criterion: pd.DataFrame) -> list[Claim]:
    """C1, C2, C3 and C6, from the tables ``headline`` and ``criteria``."""
    everything = [*BASELINE, *BASELINE_REFITTED, *BASELINE_TUNED]
    refitted = [*BASELINE, *BASELINE_REFITTED]
    rivals = [name for name in by_criterion["recipe"].unique() if "lrp" not in name]
    pairs = {
        f"{what} needs no larger file than {rival.removeprefix('units by ')}": (ours, rival)
        for what, ours in [("relevance", f"units by {LRP}"),
                           ("the root of relevance", f"units by root:{LRP}")]
        for rival in rivals
    }  # fmt: skip
    return [
        *headline(table, OURS, BASELINE, "neither trained"),
        *headline(table, OURS, refitted, "neither trained, baseline refitted", loss=False),
        *headline(table, [*OURS, *OURS_TUNED], everything, "both may be fine-tuned"),
        *size_claims(by_criterion, "C6", pairs),
    ]


def beyond(table: pd.DataFrame, read: Callable[[str], pd.DataFrame]) -> list[Claim]:
    """L1, C5, C6 and C7, from the table ``sequential`` and, where there is one, ``nncodec``.

    ``read`` gives the table of a name; by a FileNotFoundError it says that it was not made.
    """
    needs_less = {
        f"coding layer after layer needs less than all at once ({name})": (sequential, name)
        for name, sequential in SEQUENTIAL.items()
        if name not in CONTROLS
    }
    claims = size_claims(table, "L1", needs_less, operator.lt)
    for what, name in WAYS.items():
        controls = [*(f"{other}, sequential" for other in ("alike", *CONTROLS)), "uniform bits"]
        claims += precision_claims(
            table, f"{name}, sequential", controls, f"layer after layer by {what}"
        )
    ends = [(other, "") for other in CRITERIA] + [(CRITERIA[0], ", pruned")]
    pairs = {
        f"{what}, layer after layer{pruned}, needs no larger file than {other}": (
            f"{name}{pruned}, sequential", f"{other}{pruned}, sequential")
        for what, name in WAYS.items() for other, pruned in ends
    }  # fmt: skip
    pairs |= {
        f"{what}, from more images, needs no larger file than {other}": (MORE[name], MORE[other])
        for what, name in WAYS.items()
        for other in CRITERIA
    }
    claims += size_claims(table, "C6", pairs)
    ours = {
        f"no larger than NNCodec's files at equal accuracy ({name})": (name, STANDARD)
        for name in ("lrp root, sequential", "lrp, pruned, sequential", MORE["lrp root"])
    }
    for standard in _there(read, STANDARD):  # its settings together make one curve
        both = pd.concat([table, standard.assign(recipe=STANDARD)])
        claims += size_claims(both, "C7", ours)
    return claims


def _there(read: Callable[[str], pd.DataFrame], name: str) -> list[pd.DataFrame]:
    """A table in a list, or no table where it was not made."""
    try:
        return [read(name)]
    except FileNotFoundError:
        return []


def in_training(learned: pd.DataFrame) -> list[Claim]:
    """C6 for weighing units in training, and C1 to C3 against ECQx, from the table ``trained``."""
    pairs = {
        f"the root of relevance, in training, needs no larger file than {other}": (TRAINED, other)
        for other in TRAINED_RIVALS
    }
    return [
        *size_claims(learned, "C6", pairs),
        *headline(learned, [TRAINED], [TRAINED_RIVALS[-1]], "against ECQx, both trained"),
    ]


def ablations(rule: pd.DataFrame) -> list[Claim]:
    """A1, from the table ``ablation-rule``."""
    rivals = {f"the reading that works needs {what}": name for what, name in INGREDIENTS.items()}
    return worse_claims(rule, "A1", ">= 1.0 point worse without", WORKS, rivals)


def from_tables(read: Callable[[str], pd.DataFrame], steps: int, rows: list[dict]) -> list[dict]:
    """Come to a profile's claims again from its tables alone, wherever that is possible.

    ``read`` gives the table of a name, ``steps`` are those of fine-tuning, ``rows`` the claims as
    written; of notebooks that have none there, none are made. R1 and R2, Q and Y rest on what no
    table holds. The result is as ``Claim.row`` gives it.
    """
    where = next((row["where"] for row in rows if row["id"] == "R3"), "")
    made = {
        "01-train": lambda: base_networks(read("bases")),
        "02-relevance": lambda: references(where, read("relevance-references")),
        "03-pruning": lambda: pruning(read("removal"), steps),
        "04-mixed-precision": lambda: precision(read("tiers"), read("rate-distortion")),
        "05-xai-baseline": lambda: against_baseline(read("headline"), read("criteria")),
        "06-beyond": lambda: [
            *beyond(read("sequential"), read),
            *(claim for learned in _there(read, "trained") for claim in in_training(learned)),
        ],
        "07-which-ingredient": lambda: ablations(read("ablation-rule")),
    }
    notebooks = dict.fromkeys(row["notebook"] for row in rows)
    asked = [(name, made[name]()) for name in notebooks if name in made]
    return [claim.row(name) for name, claims in asked for claim in claims]
