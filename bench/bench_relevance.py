"""Time and memory of weight relevance, as ratios to training steps on the same images.

    OMP_NUM_THREADS=2 python bench/bench_relevance.py [model ...]

One thread unless told otherwise: several wait for each other where other work has the cores.
Writes results/bench/relevance.csv. A training step is a forward and a backward pass with weight
gradients, in evaluation mode and without an optimiser. Every call of a method stands next to a
training step, and medians are taken over such pairs, so that other work on the machine cancels.
Memory is the highest that a fresh process needs beyond its state before the call.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as work

import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from lib.relevance import weight_relevance
from study.networks import build
from study.records import provenance

OUTPUT = Path(__file__).parents[1] / "results/bench/relevance.csv"
BATCH, REPEATS = 50, 3
SIZES = [BATCH * 2**k for k in range(4)]  # images, for the growth of time
# model: images at a time, and their side
MODELS = {
    "resnet20": (BATCH, 32),
    "vgg16": (BATCH, 32),
    "vit_b_16": (8, 224),
    "convnext_tiny": (8, 224),
}
# method: (rule, aggregate, highest ratio that is good enough)
METHODS = {
    "epsilon, sum": ("epsilon", "sum", 1.15),
    "zplus, sum": ("zplus", "sum", 1.5),
    "alpha2beta1, sum": ("alpha2beta1", "sum", 2.2),
    "epsilon, abs": ("epsilon", "abs", 2.5),
    "epsilon, rms": ("epsilon", "rms", 2.5),
}


def problem(name, images):
    """An untrained network with random images and labels."""
    generator, side = torch.Generator().manual_seed(0), MODELS[name][1]
    x = torch.randn(images, 3, side, side, generator=generator)
    torch.manual_seed(0)
    model = build(name) if side == 32 else getattr(torchvision.models, name)(num_classes=10)
    return model.eval(), x, torch.randint(10, (images,), generator=generator)


def train(model, images, labels):
    """Gradients of the loss for all weights, batch by batch."""
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()


def method(name):
    """The function that a row of the table is about."""
    if name == "training":
        return train
    rule, aggregate, _ = METHODS[name]
    return partial(weight_relevance, rule=rule, aggregate=aggregate)


def seconds(function, *arguments):
    """Elapsed and processor time of one call."""
    before = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - before[0], time.process_time() - before[1]


def status(field):
    """A memory size of this process in MiB, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(name, what, images):
    """MiB that a call needs at its highest; printed by the process that measures."""
    arguments = problem(name, images)
    before = status("VmRSS")
    method(what)(*arguments)
    return max(status("VmHWM") - before, 0)


def peak_elsewhere(name, what, images):
    """``peak`` in a process of its own."""
    command = [sys.executable, __file__, "peak", name, what, str(images)]
    # freed memory goes back to the system at once, or what is measured is the allocator
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def methods_of(name):
    """All, or those by which networks of ImageNet's size are judged."""
    large = MODELS[name][1] > 32
    return {k: v for k, v in METHODS.items() if not large or k in ("epsilon, sum", "epsilon, abs")}


def rows(name, bar):
    """Time and memory of every method on one network."""
    few = MODELS[name][0]
    arguments = problem(name, few)
    weights = sum(p.numel() for p in arguments[0].parameters()) * 4 / 2**20
    allowed = peak_elsewhere(name, "training", few) + weights
    for what, (_, _, target) in methods_of(name).items():
        pairs = []
        for repeat in range(REPEATS + 1):
            pair = np.array([seconds(train, *arguments), seconds(method(what), *arguments)])
            if repeat:  # the first warms caches up
                pairs.append(pair)
            bar.update()
        ratios = [pair[1] / pair[0] for pair in pairs]
        many = problem(name, 8 * few) if MODELS[name][1] == 32 else arguments
        growing = seconds(method(what), *many)[0] / seconds(train, *many)[0]
        memory = [peak_elsewhere(name, what, images) for images in (few, 8 * few)]
        yield {
            "model": name,
            "method": what,
            "ratio": round(statistics.median(r[0] for r in ratios), 3),
            "ratio, 8 x images": round(growing, 3) if many is not arguments else None,
            "processor time ratio": round(statistics.median(r[1] for r in ratios), 3),
            "target": target,
            "method seconds": round(statistics.median(pair[1, 0] for pair in pairs), 4),
            "training seconds": round(statistics.median(pair[0, 0] for pair in pairs), 4),
            "peak MiB": round(memory[0], 1),
            "peak MiB, 8 x images": round(memory[1], 1),
            "training peak + weights MiB": round(allowed, 1),
            "memory ratio": round(memory[0] / allowed, 3),
            "images": few,
        }


def slope(name, bar):
    """Exponent of the growth of time with the number of images, ε and sum."""
    times = []
    for images in SIZES:
        arguments = problem(name, images)
        measured = [seconds(method("epsilon, sum"), *arguments)[1] for _ in range(REPEATS)]
        times.append(statistics.median(measured))
        bar.update()
    return float(np.polyfit(np.log(SIZES), np.log(times), 1)[0])


def main():
    start, models = time.perf_counter(), sys.argv[1:] or list(MODELS)
    with tqdm(total=sum(len(methods_of(m)) for m in models) * (REPEATS + 1) + len(SIZES)) as bar:
        table = pd.DataFrame([row for name in models for row in rows(name, bar)])
        table["log-log slope over images"] = round(slope("resnet20", bar), 3)
    print(table.to_string(index=False))
    table["repeats"] = REPEATS
    for key, value in provenance(start).items():
        table[key] = str(value)
    if OUTPUT.exists():  # rows of other networks stay, each with where it was measured
        before = pd.read_csv(OUTPUT)
        table = pd.concat([table, before[~before["model"].isin(models)]]).dropna(axis=1, how="all")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUTPUT, index=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(peak(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        main()
