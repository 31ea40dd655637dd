"""The measurements that need a GPU: `python -m fastattn.benchmarks.gpu PART --out FOLDER`."""
