"""What our verbs tell a Hopper GPU is what Triton's compiler tells it: somebody else's reading of the same manual."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from emulator.trial import trial

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++")
# The offset from atom to atom along m or n: without meaning where one atom holds all of them, and where k is contiguous.
LEADING = 0x3FFF << 16


def without_leading(descriptors: list[int]) -> list[int]:
    return [d & ~LEADING for d in descriptors]


def test_descriptors_are_those_of_triton(tmp_path: Path) -> None:
    script = Path(__file__).with_name("triton_witness.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    said = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True).stdout
    usual, turned, halves = json.loads(said)
    out = torch.zeros(24, dtype=torch.int64)
    trial("descriptors_kernel", out, file="hopper_verbs.cuh")
    ours = [d % (1 << 64) for d in out.tolist()]
    assert without_leading(ours[:8]) == without_leading(usual["a"])
    assert ours[8:16] == usual["b"]
    assert without_leading(ours[16:20]) == without_leading(turned["a"])
    assert without_leading(ours[20:]) == without_leading(turned["b"])
    # scale-a, scale-b, transpose-a, transpose-b; and the swizzles of a, b, c: 3 is 128 bytes, 2 is 64
    assert set(usual["immediates"]) == {"1, 1, 0, 1"} and set(turned["immediates"]) == {"1, 1, 1, 1"}
    assert usual["swizzles"] == [3, 3, 3] and turned["swizzles"] == [3, 2, 2]
    # Two warpgroups share an atom of 64 columns: a product may read a part of one.
    assert set(halves["shapes"]) == {"m64n32k16"} and halves["swizzles"] == [3, 3, 3]
    assert without_leading(halves["b"]) == without_leading(ours[8:12])
