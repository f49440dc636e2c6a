"""Time, memory and files of ``compress(ratio=8)`` on networks of ImageNet's size.

    OMP_NUM_THREADS=2 python bench/bench_compress.py [--images 50] [model ...]

Writes results/bench/compress.csv. Untrained torchvision networks of 1,000 classes, random images of
224 x 224: what is measured does not depend on what the weights know. Each network is compressed in
a process of its own, whose highest memory beyond that of the network and the images is the peak.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as work

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
import torchvision
from bench_relevance import status

from lib import compress
from lib.advice import float_bytes
from study.records import provenance

OUTPUT = Path(__file__).parents[1] / "results/bench/compress.csv"
RATIO = 8
TARGETS = {"resnet50": 120, "vit_b_16": 240}  # seconds that are good enough


def measured(name, images):
    """One row of the table."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    for weight in model.parameters():  # torchvision's ViT begins with a head of zeros
        if weight.dim() > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    x, y = torch.randn(images, 3, 224, 224), torch.arange(images) % 1000
    before, start = status("VmRSS"), (time.perf_counter(), time.process_time())
    made, whole = [], sys.modules["lib.compress"].encode

    def encode(*arguments):
        began = time.perf_counter(), time.process_time()
        result = whole(*arguments)
        made.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return result

    sys.modules["lib.compress"].encode = encode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained network is near chance
        packed = compress(model, x, y, ratio=RATIO)
    elapsed, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1) / 1e6
    each = pd.DataFrame(made).mean() / weights  # seconds
    return {
        "model": name,
        "images": images,
        "million weights": round(weights, 2),
        "ratio": round(float_bytes(model) / packed.nbytes, 3),
        "files": len(made),
        "elapsed seconds": round(elapsed, 1),
        "processor seconds": round(cpu, 1),
        "target seconds": TARGETS.get(name),
        "seconds a million weights and file": round(each[0], 2),
        "processor seconds a million weights and file": round(each[1], 2),
        "peak MiB": round(status("VmHWM") - before),
        "weights MiB": round(float_bytes(model) / 2**20),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(TARGETS))
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--here", action="store_true", help="measure in this process; print JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measured(given.models[0], given.images)))
        return
    start, rows = time.perf_counter(), []
    for name in given.models:
        command = [sys.executable, __file__, "--here", "--images", str(given.images), name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    table = pd.DataFrame(rows).assign(**{k: str(v) for k, v in provenance(start).items()})
    if OUTPUT.exists():  # rows of other networks stay, each with where it was measured
        before = pd.read_csv(OUTPUT)
        table = pd.concat([table, before[~before["model"].isin(table["model"])]])
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    table.sort_values("model").to_csv(OUTPUT, index=False)


if __name__ == "__main__":
    main()
