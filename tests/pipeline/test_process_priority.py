"""Training workers take off the niceness that Ray puts on them."""

import os
import subprocess
import sys

import pytest
import ray

from pipeline.process_priority import undo_niceness

SCRIPT = """
import os, sys, threading
from pipeline.process_priority import undo_niceness

def niceness():
    return os.getpriority(os.PRIO_PROCESS, 0)

start, user = map(int, sys.argv[1:])
os.nice(start - niceness())
if user:
    os.setuid(user)
found = [undo_niceness(), niceness()]
thread = threading.Thread(target=lambda: found.append(niceness()))
thread.start()
thread.join()
print(*found)
"""
NOBODY = 65534
# Root of a container may lack the capability.
LOWER = "import os; os.nice(1); os.setpriority(os.PRIO_PROCESS, 0, os.nice(0) - 1)"
needs_right = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", LOWER], capture_output=True).returncode != 0,
    reason="no right to lower a niceness",
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a niceness of each thread")


def after_undoing(start: int, user: int = 0) -> str:
    """[is allowed] [niceness of the thread] [of one it starts], in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(start), str(user)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@needs_right
@pytest.mark.parametrize("start", [15, 0])
def test_a_thread_and_those_it_starts_become_as_eager_as_the_parent(start):
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert after_undoing(mine + start) == f"True {mine} {mine}"


@needs_right
def test_a_thread_that_is_more_eager_than_its_parent_stays_so():
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert after_undoing(mine - 5) == f"True {mine - 5} {mine - 5}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_without_the_right_to_it_nothing_changes():
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert after_undoing(mine + 15, NOBODY) == f"False {mine + 15} {mine + 15}"


@needs_right
def test_a_worker_of_ray_becomes_as_eager_as_the_services_of_ray(ray_cluster):
    @ray.remote(num_cpus=0)
    def niceness() -> tuple[int, bool, int]:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        return before, undo_niceness(), os.getpriority(os.PRIO_PROCESS, 0)

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    before, is_allowed, after = ray.get(niceness.remote())
    assert before > mine, "what it is for"
    assert is_allowed and after == mine
