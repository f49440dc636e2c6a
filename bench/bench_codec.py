"""Bytes and coding speed of the codec: against order-0 entropy and against zstd -19.

    python bench/bench_codec.py [checkpoint.safetensors …]

Writes results/bench/codec.csv. Tensors are made up with known structure; checkpoints, if given,
are quantized at 4 bits, dense and with the largest tenth of their weights kept.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import zstandard
from safetensors.torch import load_file

from lib.codec.entropy import decode, encode
from lib.masks import keep_top
from lib.quantize import uniform

OUTPUT = Path(__file__).parents[1] / "results/bench/codec.csv"
REPEATS = 5


def made_up():
    """Names and int32 symbols of matrices with independent and with structured entries."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((512, 4608), dtype=np.float32)
    scale = np.exp(rng.normal(0, 0.5, (512, 1)) + rng.normal(0, 0.5, 4608)).astype(np.float32)
    for bits, step in ((8, 0.03), (4, 0.4), (2, 1.5)):
        limit = 2 ** (bits - 1) - 1
        for name, values in (("independent", noise), ("rows and columns differ", noise * scale)):
            symbols = np.rint(values / step).clip(-limit, limit)
            yield f"512x4608, {bits} bits, {name}", symbols.astype(np.int32)
    kept = np.where(np.abs(noise * scale) > 2.5, np.sign(noise), 0)
    yield "512x4608, ternary, few kept", kept.astype(np.int32)
    yield "20x1x5x5, 8 bits", np.rint(noise[:20, :25] * 40).clip(-127, 127).astype(np.int32)


def trained(path):
    """Names and 4-bit symbols of a checkpoint's layers, dense and pruned by magnitude."""
    weights = {name: value for name, value in load_file(path).items() if value.ndim > 1}
    for fraction in (1.0, 0.1):
        masks = keep_top({name: value.abs() for name, value in weights.items()}, fraction)
        for name, value in weights.items():
            symbols = uniform(value, 4, mask=masks[name]).symbols.numpy()
            yield f"{Path(path).stem} {name}, {fraction:.0%} kept", symbols


def order0_bytes(symbols):
    """Empirical order-0 entropy in bytes."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def zstd_bytes(symbols):
    """Size of the bit-packed integers after zstd -19."""
    offset = symbols.ravel() - symbols.min()
    width = max(int(offset.max()).bit_length(), 1)
    packed = np.packbits(offset[:, None] >> np.arange(width) & 1)
    return len(zstandard.ZstdCompressor(level=19).compress(packed.tobytes()))


def fastest(function, *arguments):
    """Result, and the least processor time of several calls in seconds."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        result = function(*arguments)
        seconds.append(time.process_time() - started)
    return result, min(seconds)


def measure(name, symbols):
    """One row of the table."""
    stream, encoding = fastest(encode, symbols)
    (decoded, _), decoding = fastest(decode, stream, symbols.shape)
    assert np.array_equal(decoded, symbols)
    entropy, packed = order0_bytes(symbols), zstd_bytes(symbols)
    return {
        "tensor": name,
        "weights": symbols.size,
        "bytes": len(stream),
        "order-0 entropy": round(entropy, 1),
        "bytes / entropy": round(len(stream) / entropy, 4),
        "zstd -19": packed,
        "bytes / zstd": round(len(stream) / packed, 4),
        "encode M weights/s": round(symbols.size / encoding / 1e6, 1),
        "decode M weights/s": round(symbols.size / decoding / 1e6, 1),
        "encode s": round(encoding, 4),
        "decode s": round(decoding, 4),
    }


def processor():
    """The processor's name."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(checkpoints):
    torch.set_num_threads(1)
    tensors = [*made_up(), *(item for path in checkpoints for item in trained(path))]
    table = pd.DataFrame([measure(name, symbols) for name, symbols in tensors])
    print(table.to_string(index=False))
    packages = ("constriction", "numpy", "torch", "zstandard")
    table["versions"] = ", ".join(f"{name} {version(name)}" for name in packages)
    table["cpu"], table["python"] = processor(), platform.python_version()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUTPUT, index=False)


if __name__ == "__main__":
    main(sys.argv[1:])
