"""How much of a busy CPU a training worker gets.

Surprising: Ray starts its workers at niceness 15, the training worker like the ones that decode for
it, and its own services at 0. On cores that all are busy any of them interrupts training, and a
thread that launches kernels, or computes, is late for all that follows.
"""

from __future__ import annotations

import os


def undo_niceness() -> bool:
    """Let this thread, and those it starts, be as eager as the process that started this one.

    For a training worker that is Ray's raylet, as eager as whoever started the cluster wanted it.

    Returns:
        Whether the system allows it: Linux wants root, CAP_SYS_NICE or a limit of `ulimit -e`.
        Otherwise nothing changes.
    """
    wanted = os.getpriority(os.PRIO_PROCESS, os.getppid())
    try:
        os.setpriority(os.PRIO_PROCESS, 0, min(wanted, os.getpriority(os.PRIO_PROCESS, 0)))
    except PermissionError:
        return False
    return True
