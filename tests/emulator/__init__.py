"""Executes the CUDA C++ kernels of csrc/cuda on the CPU and reports what they do wrong. See README.md."""

from .build import available
from .run import EmulatorError, run

__all__ = ["EmulatorError", "available", "run"]
