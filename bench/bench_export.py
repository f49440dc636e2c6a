"""Latency of the ONNX files, float and int8, and of torch, on one thread.

    python bench/bench_export.py

Writes results/bench/export.csv. Weights are random, quantized at 8 bits with the largest half
kept: time depends on shapes, not on values. The three take turns, and medians are taken over the
repetitions. Times in ms are processor time, which on one thread is the latency of an idle machine;
ratios are given for elapsed time too, which other work on the machine disturbs.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from tqdm import tqdm

from lib import Compressed
from lib.fold import fold_batchnorm
from lib.masks import keep_top
from lib.onnx import to_onnx
from lib.quantize import uniform
from study.networks import build
from study.records import provenance

OUTPUT = Path(__file__).parents[1] / "results/bench/export.csv"
SHAPES = {"lenet5": (1, 28, 28), "resnet20": (3, 32, 32), "vgg16": (3, 32, 32)}
BATCHES, CALIBRATION, REPEATS, SHORTEST = (1, 32), 64, 21, 0.02


def compressed(name):
    """A folded network with random weights, and its compressed form."""
    model = fold_batchnorm(build(name))
    weights = {key: value for key, value in model.state_dict().items() if value.ndim > 1}
    masks = keep_top({key: value.abs() for key, value in weights.items()}, 0.5)
    codes = {key: uniform(value, 8, mask=masks[key]) for key, value in weights.items()}
    return Compressed(model.state_dict() | codes), model


def runner(path):
    """A function that runs a file on images as numpy has them, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def seconds(function, images, calls):
    """Mean processor and elapsed time of a call."""
    before = np.array([time.process_time(), time.perf_counter()])
    for _ in range(calls):
        function(images)
    return (np.array([time.process_time(), time.perf_counter()]) - before) / calls


def rows(name, folder, bar):
    """Latency and size of one network's files."""
    packed, model = compressed(name)
    images = torch.randn(CALIBRATION, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    files = {False: Path(folder) / "float.onnx", True: Path(folder) / "int8.onnx"}
    sizes = {int8: to_onnx(packed, model, images, path, int8=int8) for int8, path in files.items()}
    float32, int8, decoded = runner(files[False]), runner(files[True]), packed.to_model(model)
    for batch in BATCHES:
        part = images[:batch]
        runs = [(float32, part.numpy()), (int8, part.numpy()), (decoded, part)]
        calls = [max(1, int(SHORTEST / seconds(*run, calls=1)[0])) for run in runs]
        times = []
        for _ in range(REPEATS + 1):  # the first warms caches up
            times.append([seconds(*run, n) for run, n in zip(runs, calls, strict=True)])
            bar.update()
        float_, int8_, torch_ = np.array(times[1:]).transpose(1, 2, 0)  # [processor, elapsed]
        yield {
            "model": name,
            "batch": batch,
            "float ONNX ms": round(1000 * np.median(float_[0]), 3),
            "int8 ONNX ms": round(1000 * np.median(int8_[0]), 3),
            "torch ms": round(1000 * np.median(torch_[0]), 3),
            "float / int8": round(np.median(float_[0] / int8_[0]), 2),
            "torch / int8": round(np.median(torch_[0] / int8_[0]), 2),
            "float / int8, elapsed": round(np.median(float_[1] / int8_[1]), 2),
            "torch / int8, elapsed": round(np.median(torch_[1] / int8_[1]), 2),
            "float ONNX bytes": sizes[False],
            "int8 ONNX bytes": sizes[True],
            "compressed bytes": packed.nbytes,
        }


def main():
    start = time.perf_counter()
    torch.set_num_threads(1)
    total = len(SHAPES) * len(BATCHES) * (REPEATS + 1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), tqdm(total=total) as bar:
        table = pd.DataFrame([row for name in SHAPES for row in rows(name, folder, bar)])
    print(table.to_string(index=False))
    table["repeats"] = REPEATS
    table["onnx versions"] = ", ".join(f"{n} {version(n)}" for n in ("onnx", "onnxruntime"))
    for key, value in provenance(start).items():
        table[key] = str(value)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUTPUT, index=False)


if __name__ == "__main__":
    main()
