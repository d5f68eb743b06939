"""Freed memory stays with a process that asked for it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline import train_worker

ROUNDS = 20
SCRIPT = f"""
import resource, sys, threading
import torch
from pipeline.process_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def page_faults():
    for round in range({ROUNDS} + 5):
        if round == 5:  # the first ones have to ask for memory
            before = faults()
        tensors = [torch.ones(size) for size in (12_000_000, 3_000_000, 100_000)]
        del tensors
    found.append(faults() - before)

found = []
if sys.argv[1] == "keep":
    assert keep_freed_memory()
if sys.argv[2] == "thread":
    thread = threading.Thread(target=page_faults)
    thread.start()
    thread.join()
else:
    page_faults()
print(found[0])
"""
TENSOR_PAGES = 15_100_000 * 4 // 4096


def page_faults(*args: str) -> int:
    """Of all rounds, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_not_asked_for_again(where):
    assert page_faults("keep", where) < TENSOR_PAGES / 2  # less than one round's
    assert page_faults("let go", where) > ROUNDS * TENSOR_PAGES / 2  # what it is for


@pytest.mark.parametrize("device, calls", [("cpu", ["keep", "onednn"]), ("cuda", [])])
def test_training_workers_are_eager_and_on_cpus_keep_memory_and_use_onednn(
    device, calls, monkeypatch
):
    called, undone = [], []
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    session = SimpleNamespace(sign_on=lambda: "not today")
    monkeypatch.setattr(train_worker, "keep_freed_memory", lambda: called.append("keep"))
    monkeypatch.setattr(train_worker, "use_onednn", lambda: called.append("onednn"))
    monkeypatch.setattr(train_worker, "undo_niceness", lambda: undone.append(1))
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device(device))
    job = {"session": lambda job, worker: session}
    assert train_worker.train_worker(job) == {"error": "not today"}
    assert called == calls
    assert undone == [1]
