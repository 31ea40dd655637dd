"""Who computes rms_norm, best first. The reference takes every valid call."""

from fastattn.ops._dispatch import Backend
from fastattn.ops._norm import cpu_objections, cuda_objections, triton_objections

BACKENDS = (
    Backend("cpu", "fastattn.ops.rms_norm._cpu", cpu_objections),
    Backend("cuda", "fastattn.ops.rms_norm._cuda", cuda_objections),
    Backend("triton", "fastattn.ops.rms_norm._triton", triton_objections),
    Backend("reference", "fastattn.ops.rms_norm.reference", lambda spec: []),
)
