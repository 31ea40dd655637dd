"""Fast attention, RoPE and norms for PyTorch transformers."""

from fastattn._version import __version__
from fastattn.ops._dispatch import UnsupportedError, explain, use_backend

__all__ = ["UnsupportedError", "__version__", "explain", "use_backend"]
