"""One job of a sweep, and how a list of jobs gets done: on this machine, or on a Dask cluster."""

import os
import pickle
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor, nn

from lib import Compressed, Recipe
from lib.compress import encode, prepare, remove
from lib.finetune import evaluate
from lib.masks import density
from lib.quantize import Quantizer

from . import digests
from .bases import stream
from .data import SPLITS, sample, split
from .profiles import Case
from .records import flat, provenance
from .training import pick_device

DEATHS = 3  # as often may a worker take a job with it before a sweep gives up
_LOST = ("FutureCancelledError", "KilledWorker")  # of distributed, which may not be installed

Splits = dict[str, tuple[Tensor, Tensor]]
Result = tuple[dict, bytes]


@dataclass(frozen=True)
class Job:
    """Runs that share what is removed, so that it is computed once."""

    case: Case
    per_class: int  # reference images
    variants: tuple[Recipe, ...]
    """All of one ``remove`` and ``repair``; those that differ in their quantizer's knob alone also
    share its preparation."""
    bases: dict[str, float]  # base_val_accuracy and base_test_accuracy, in percent
    code: str  # digest of the code that the results are to come from


def without_knob(recipe: Recipe) -> Recipe:
    """The recipe with its quantizer's knob at one end: equal for those that share work."""
    return recipe.at(recipe.store.settings[0])


def grouped(
    missing: dict[Path, tuple[Case, Recipe]],
) -> Iterator[tuple[Case, dict[Path, Recipe]]]:
    """Put runs together that share work: what is removed, and within it what is prepared.

    Where nothing is removed and nothing trained, jobs are as many as can be; each run of a
    quantizer that trains is its own job, since it shares next to nothing.
    """
    groups: dict[tuple, dict[Quantizer, dict[Path, Recipe]]] = {}
    for path, (case, variant) in missing.items():
        alike = without_knob(variant)
        idle = variant.remove is None and not variant.repair.finetune
        shared = alike if idle else (alike.remove, alike.repair)
        key = (case, variant if variant.store.trains else shared)
        groups.setdefault(key, {}).setdefault(alike.store, {})[path] = variant
    for (case, _), stores in groups.items():
        yield case, {path: v for variants in stores.values() for path, v in variants.items()}


def device() -> torch.device:
    """Where networks are run, with convolutions in float32 proper rather than TF32."""
    torch.backends.cudnn.allow_tf32 = False
    return pick_device()


def float_bytes(model: nn.Module) -> int:
    """Bytes of a network's ``state_dict`` at four bytes an element: what ratios refer to."""
    return sum(4 * value.numel() for value in model.state_dict().values())


def execute(job: Job, network: bytes, splits: Splits | str) -> list[Result]:
    """Do all runs of a job: for each variant its record and its file.

    Accuracies are those of the network read from that file. A RuntimeError says that this worker's
    code is not the caller's.

    Parameters
    ----------
    job : Job
        What to do.
    network : bytes
        The base network, pickled here rather than by Dask, whose own way of sending modules turns
        their ordered dictionaries into plain ones, which take no hooks.
    splits : dict of str to tuple of Tensor, or str
        Images and labels of all ``SPLITS``, or the name of a data set that this machine can read.
    """
    if job.code != digests.of_code():
        raise RuntimeError("this worker runs other code than the sweep asks for: update it")
    torch.set_num_threads(1)
    start, name = time.perf_counter(), secrets.token_hex(4)
    if isinstance(splits, str):
        splits = {part: split(splits, part) for part in SPLITS}
    model = pickle.loads(network).to(device())
    references = sample(*splits["train"], job.per_class, job.case.seed)
    first, floats = job.variants[0], float_bytes(model)
    train = splits["train"]
    if first.store.trains:
        train = stream(job.case.dataset, job.case.model, *train, job.case.seed)
    removed = remove(model, *references, first, train, job.case.seed)
    weights = sum(mask.numel() for mask in removed.masks.values())
    prepared, results = {}, []
    for variant in job.variants:
        alike = without_knob(variant).store
        if alike not in prepared:
            prepared = {alike: prepare(removed, *references, variant)}  # the one before is done
        data = encode(prepared[alike], variant).to_bytes()
        loaded = Compressed.from_bytes(data).to_model(model)
        record = asdict(job.case) | {
            "knob": variant.store.value,
            "per_class": job.per_class,
            "density": density(removed.masks),
            "file_bytes": len(data),
            "ratio": floats / len(data),
            "bits": 8 * len(data) / weights,
            "val_accuracy": evaluate(loaded, *splits["val"]),
            "test_accuracy": evaluate(loaded, *splits["test"]),
            **job.bases,
            "provenance": provenance(start) | {"recipe": flat(variant), "job": name},
        }
        results.append((record, data))
    return results


def numbered(place: int, *arguments) -> tuple[int, list[Result]]:
    """``execute``, with the job's place in the list: results arrive in any order."""
    return place, execute(*arguments)


def done(jobs: list[Job], networks: dict[Case, bytes]) -> Iterator[tuple[int, list[Result]]]:
    """Do independent jobs side by side: place in the list and results, as they get done.

    On the cores of this machine, each of which reads the data once; or, with the environment
    variable ``SCHEDULER=tcp://host:port``, on the workers of that Dask cluster, to which data and
    ``networks``, pickled as for ``execute``, are sent once (they need this code, and no disk in
    common). A job whose worker died is done again.
    """
    left = dict(enumerate(jobs))
    splits: dict[str, Splits | str] = {job.case.dataset: job.case.dataset for job in jobs}
    if scheduler := os.environ.get("SCHEDULER"):
        splits = {name: {part: split(name, part) for part in SPLITS} for name in splits}
    for deaths in range(DEATHS):
        try:
            with _workers(scheduler, [*networks.values(), *splits.values()]) as workers:
                asked = (
                    delayed(numbered)(place, job, networks[job.case], splits[job.case.dataset])
                    for place, job in list(left.items())
                )
                for place, results in workers(asked):
                    del left[place]
                    yield place, results
            return
        except Exception as error:
            # Dask does most jobs of a dead worker again, and forgets those it had just finished.
            lost = isinstance(error, TerminatedWorkerError) or type(error).__name__ in _LOST
            if not lost or deaths + 1 == DEATHS:
                raise


@contextmanager
def _workers(scheduler: str | None, inputs: list) -> Iterator[Parallel]:
    settings = {"return_as": "generator_unordered", "batch_size": 1}
    if not scheduler:
        yield Parallel(n_jobs=cpu_count(), **settings)
        return
    from distributed import Client

    with Client(scheduler), parallel_config(backend="dask", scatter=inputs):
        yield Parallel(n_jobs=-1, **settings)
