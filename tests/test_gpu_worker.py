"""Who hangs or crashes the GPU must not end the measurement. No skip here: the worker's process imports this file."""

from __future__ import annotations

import os
import time

import torch

from fastattn.benchmarks.case import OURS
from fastattn.benchmarks.gpu import attention, hopper, run
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
    worker = Worker(_hangs_at_one, patience=10.0)
    try:
        assert hopper.contest_of_survivors(worker, group, facts, 96) == [0, 3]
    finally:
        worker.stop()
    assert [facts[c].get("refused", "") for c in group] == ["", "lost: no word for 10 s", "lost: the process ended", ""]


def _crashes(tell, part, index, device, quick, budget_s, lost):
    """Stands in for `run.measured`: the contender b ends the process, and in the case 1 the timing does."""
    for name in ("a", "b"):
        if name not in lost:
            tell(name)
            if name == "b":
                os._exit(3)
    tell(run.TIMING)
    if index == 1:
        os._exit(3)
    return [part, index, lost]


def test_a_contender_that_crashes_fails_alone_and_a_case_whose_timing_does_is_given_up():
    case = attention.cases("forward", torch.device("cpu"))[0]
    worker = Worker(_crashes, patience=60.0)
    order = ("forward", "cpu", True, 1.0)
    try:
        assert run.rows_of_survivors(worker, case, 0, *order) == ["forward", 0, {"b": "lost: the process ended"}]
        (row,) = run.rows_of_survivors(worker, case, 1, *order)
    finally:
        worker.stop()
    assert (row.contender, row.status, row.label) == (OURS, "failed", case.label)
    assert row.reason == "lost while all were timed: the process ended"
