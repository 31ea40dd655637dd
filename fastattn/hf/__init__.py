"""Hugging Face transformers on fastattn: one line registers the attention, another swaps norms and RoPE of a model.

>>> fastattn.hf.register()                       # attn_implementation="fastattn" is known from here on
>>> report = fastattn.hf.patch(model)            # this model, attention and norms and RoPE
>>> print(report)                                # what was replaced, what was not, and why
>>> fastattn.hf.unpatch(model)                   # as it was, bit for bit
"""

from fastattn.hf.attention import register
from fastattn.hf.patching import patch, unpatch
from fastattn.hf.report import Report, Row

__all__ = ["Report", "Row", "patch", "register", "unpatch"]
