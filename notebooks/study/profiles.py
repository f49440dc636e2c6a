"""How much is run: data sets, networks, seeds, images, steps and settings of each profile."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch

from .paths import check_known


@dataclass(frozen=True)
class Profile:
    """How much is run."""

    networks: dict[str, dict[str, tuple[int, ...]]]
    """By data set and model the seeds, each of which trains and compresses its own network."""
    per_class: int  # reference images of each class, from the training split
    more: int  # so many, where it is asked what more of them bring
    finetune: int  # steps, for every recipe that fine-tunes
    knobs: dict[str, tuple[float, ...]]
    """By quantizer (a value of ``records.STORES``) settings of its knob that make a curve; others
    for "more images", which bear higher prices."""
    special: dict[str, dict[str, tuple[float, ...]]]
    """By model the knobs that differ: where a curve bends elsewhere, or a run takes long."""
    kept: dict[str, tuple[float, ...]]
    """By model shares of weights kept, for comparing criteria; "" stands for all others."""
    optimisers: dict[str, str] = field(default_factory=dict)
    """By model the optimiser of fine-tuning where the recipes' default does harm; chosen on the
    validation split."""
    trained: dict[str, dict[str, float]] = field(default_factory=dict)
    """By model settings of quantizers that train, where a recipe has their defaults: chosen on the
    validation split; "" stands for all models."""
    slow: tuple[str, ...] = ()  # models left out of what every run of a notebook computes anew
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By part of the study ("training", "more images") patterns of cases that go without it: they
    take hours without a GPU."""

    def takes(self, part: str, case: "Case") -> bool:
        """Whether a case takes part in what ``left_out`` names."""
        return not any(fnmatch(str(case), pattern) for pattern in self.left_out.get(part, ()))


def _prices(steps: Iterable[float], per_decade: int = 4) -> tuple[float, ...]:
    return tuple(10 ** (step / per_decade - 3) for step in steps)


PROFILES = {
    "quick": Profile(
        {"digits": {"lenet5": (0,), "resnet8": (0,)}},
        per_class=15,
        more=100,
        finetune=50,
        knobs={
            "tiers": (2.2, 3, 4),
            "uniform": (2, 3, 4, 5),
            "layers": (1.5, 2, 3, 5),
            "rate-distortion": (0.003, 0.01, 0.03),
            "Sequential": (0.01, 0.03),
            "more images": (0.03, 0.1),
            "Trained": (0.01, 0.03),
            "ECQx": (1, 10),
        },
        special={},
        kept={"": (0.4, 0.15)},
        trained={"": {"steps": 50}},
        left_out={"training": ("digits-lenet5*",)},
    ),
    "paper": Profile(
        {
            "mnist": {"lenet300": (0, 1, 2), "lenet5": (0, 1, 2)},
            "cifar10-jpeg": {"resnet20": (0, 1, 2), "vgg16": (0,)},
        },
        per_class=50,
        more=500,
        finetune=300,
        knobs={
            "tiers": (2.2, 3, 4),
            "uniform": (2, 3, 4, 5),
            "layers": (1, 2, 3, 4),
            "rate-distortion": _prices(range(9)),
            "Sequential": _prices(range(7, 26), 12),
            "more images": _prices((*range(15, 31), 32, 34, 36), 12),
            "Trained": _prices(range(5, 9)),
            "ECQx": _prices(range(7, 11), 2),
        },
        special={
            # units weighed alike need a lower price there: at a higher one a layer ends empty
            "lenet5": {"Trained": _prices((1, 3, 4, 5, 6, 8))},
            "resnet20": {
                "tiers": (3, 4, 5),
                "uniform": (3, 4, 5, 6),
                "layers": (3, 3.5, 4, 5, 6),
                "rate-distortion": _prices((0, 1, 2, 2.5, 3, 3.5, 4, 4.5)),
                "Sequential": _prices(range(12, 27), 16),
                "more images": _prices(range(6, 14), 8),
                "Trained": _prices((4, 6)),
                "ECQx": _prices(range(5, 8), 2),
            },
            "vgg16": {
                "tiers": (2.2, 3),
                "uniform": (4, 5, 6),
                "layers": (2, 2.5, 3, 4),
                "rate-distortion": _prices((0, 1, 2, 3, 4, 6)),
                "Sequential": _prices(range(24, 49, 3), 32),
                "Trained": _prices((4, 6)),
                "ECQx": _prices(range(5, 8), 2),
            },
        },
        kept={"": (0.1, 0.03), "resnet20": (0.4, 0.2), "vgg16": (0.2,)},
        optimisers={"vgg16": "adam-slow"},
        # from its weights it ends at chance; where codes move faster, accuracy is lost
        trained={"vgg16": {"steps": 300, "rate": 0.005, "coded": True, "bfloat16": True}},
        slow=("vgg16",),
        left_out={"more images": ("cifar10*resnet20-s[!0]", "cifar10*vgg16*")},
    ),
}


@dataclass(frozen=True)
class Case:
    """One base network: data set, model, seed."""

    dataset: str
    model: str
    seed: int

    def __str__(self):
        return f"{self.dataset}-{self.model}-s{self.seed}"


def folder_name(profile: str, seed: int = 0, per_class: int = 0) -> str:
    """Name of the folders of results and figures.

    Other seeds and other numbers of reference images than the profile's (for which zero stands)
    have folders of their own: ``<profile>-seed<seed>-images<per_class>``. A ValueError lists the
    known profiles.
    """
    check_known("profile", profile, PROFILES)
    own = per_class in (0, PROFILES[profile].per_class)
    return profile + (f"-seed{seed}" if seed else "") + ("" if own else f"-images{per_class}")


def cases(profile: Profile, datasets: str = "", seed: int = 0) -> list[Case]:
    """The base networks of a profile, ``seed`` added to its seeds.

    ``datasets`` are comma-separated names that replace the profile's own, such as ``mnist`` or, for
    one network only, ``cifar10-jpeg/resnet20``. A ValueError lists the known ones.
    """
    chosen = datasets.split(",") if datasets else profile.networks
    return [
        Case(name.partition("/")[0], model, seed + offset)
        for name in chosen
        for model, seeds in _networks(profile, *name.split("/", 1)).items()
        for offset in seeds
    ]


def _networks(profile: Profile, dataset: str, model: str = "") -> dict[str, tuple[int, ...]]:
    """Seeds by model: the profile's, else those of some profile for data of the same kind."""
    from .bases import SCHEDULES  # here, since to look up a profile needs no torch
    from .data import DATASETS, kind

    check_known("data set", dataset, DATASETS)
    trained = {name: (0,) for data, name in SCHEDULES if data == kind(dataset)}
    networks = trained
    for each in (*PROFILES.values(), profile):
        for name, models in each.networks.items():
            if kind(name) == kind(dataset):
                networks = models
    if not model:
        return networks
    known = trained | networks
    if model not in known:
        raise ValueError(f"unknown network {model!r} of {dataset}; known: {', '.join(known)}")
    return {model: known[model]}
