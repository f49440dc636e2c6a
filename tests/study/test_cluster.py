"""The same list of jobs through a Dask cluster: a scheduler and workers on the loopback."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import joblib
import pytest

from lib import Recipe
from lib.prune import KeepTop
from lib.quantize import Uniform
from study import jobs, records
from study.paths import ROOT

pytest.importorskip("distributed")
RECIPES = {
    f"top {density}": Recipe(KeepTop("taylor", density=density), store=Uniform())
    for density in (0.2, 0.4, 0.6, 0.8)
}


@pytest.fixture
def cluster(tmp_path):
    """Address of a scheduler with two workers, and their processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "notebooks"), os.environ.get("PYTHONPATH", "")])
    # No data and no disk in common: what a worker needs has to be sent.
    apart = {"PYTHONPATH": path, "CACHE_ROOT": str(tmp_path / "w"), "DATA_ROOT": "/nonexistent"}
    environment = {k: v for k, v in os.environ.items() if k != "SCHEDULER"} | apart

    def start(kind, *words):
        command = [sys.executable, "-m", "distributed.cli." + kind, *words, "--no-dashboard"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    host, port = address.split(":")
    processes = [start("dask_scheduler", "--host", host, "--port", port)]
    for _ in range(2):
        alone = ("--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path / "dask"))
        processes.append(start("dask_worker", f"tcp://{address}", *alone))
    yield f"tcp://{address}", processes
    for process in processes:
        process.kill()
        process.wait()


def plain(study):
    return [
        {key: value for key, value in row.items() if key != "provenance"}
        for row in records.read_records(study.runs)
    ]


def test_a_cluster_gives_the_same_records_though_a_worker_dies(
    study, cluster, tmp_path, monkeypatch
):
    from distributed import Client

    address, (_, first, _) = cluster
    with Client(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
    knobs = {"uniform": (3, 4, 5)}
    alone = study.sweep(RECIPES, knobs)

    monkeypatch.setattr(jobs, "Parallel", joblib.Parallel)
    monkeypatch.setenv("SCHEDULER", address)
    study.runs, before = tmp_path / "cluster" / "runs", plain(study)
    killed = []

    def kill_one_in_the_middle():
        while not list(study.runs.rglob("*.json")):
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        killed.append(len(list(study.runs.rglob("*.json"))))

    watch = threading.Thread(target=kill_one_in_the_middle, daemon=True)
    watch.start()
    study._states.clear()
    again = study.sweep(RECIPES, knobs)
    watch.join()
    assert killed and killed[0] < 12 and first.wait() == -signal.SIGKILL
    assert again.equals(alone) and plain(study) == before and len(before) == 12
