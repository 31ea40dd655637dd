"""A candidate that hangs or crashes the GPU must not end the contest. No skip here: the worker's process imports this file."""

from __future__ import annotations

import os
import time

from fastattn.benchmarks.gpu import hopper
from fastattn.benchmarks.gpu.worker import Worker


def _hangs_at_one(tell, group, facts, seqlen, device):
    """Stands in for a contest on a GPU: the candidate 1 hangs, 2 ends the process."""
    found = []
    for i, c in enumerate(group):
        if "refused" not in facts[c]:
            tell(i)
            if i == 1:
                time.sleep(600)
            if i == 2:
                os._exit(3)
            found.append(i)
    return found


def test_a_candidate_that_hangs_or_crashes_is_refused_and_the_others_go_on():
    group = hopper.candidates("forward", 64, "dense", 4)
    facts: dict = {c: {} for c in group}
    worker = Worker(_hangs_at_one, patience=20.0)
    try:
        assert hopper.contest_of_survivors(worker, group, facts, 96) == [0, 3]
    finally:
        worker.stop()
    assert [facts[c].get("refused", "") for c in group] == ["", "lost: no word for 20 s", "lost: the process ended", ""]
