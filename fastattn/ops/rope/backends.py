"""Who computes rope, best first. The reference takes every valid call."""

from fastattn.ops._dispatch import Backend
from fastattn.ops.rope.spec import cpu_objections, cuda_objections, triton_objections

BACKENDS = (
    Backend("cpu", "fastattn.ops.rope._cpu", cpu_objections),
    Backend("cuda", "fastattn.ops.rope._cuda", cuda_objections),
    Backend("triton", "fastattn.ops.rope._triton", triton_objections),
    Backend("reference", "fastattn.ops.rope.reference", lambda spec: []),
)
