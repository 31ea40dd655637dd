"""One room per operation. Start with `_op.py` (the life of a call) and any room's `__init__.py`."""
