"""torch's operators on the GPUs of the rehearsal, served by torch's own CPU kernels on the same memory."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Tensor = torch.Tensor
Again = Callable[[], None]

# Fused attention has no kernel on the CPU under these names: who asks for torch's gets the refusal of its launch.
_TORCHS_OWN = ("flash_attention", "efficient_attention", "cudnn_attention", "_fused_sdp_choice", "_cudnn", "_cuda_")
_ALSO = ("aten::copy_",)  # one kernel for all devices, which launches on this one
_CPU_KEYS = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
# Made of views, allocations and copies alone.
_NO_KERNEL = (
    "empty",
    "resize_",
    "set_",
    "record_stream",
    "_pin_memory",
    "is_pinned",
    "_local_scalar_dense",
    "_copy_from",
)


def begin(captured: Callable[[], list[Again] | None]) -> torch.library.Library:
    """Put them in place of the CUDA kernels; in force while the result lives.

    captured: what a capture that is going on has recorded so far, to which an operator's work is added instead of done
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for op in _with_kernels():
            name, cpu = op.name(), op
            if not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _CPU_KEYS):
                if op not in decomposition_table:
                    continue
                cpu = decomposition_table[op]
            library.impl(name.removeprefix("aten::"), functools.partial(_serve, op, cpu, captured), "CUDA")
    return library


def on_host(t: Tensor) -> Tensor:
    """The same memory as a tensor of the CPU."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
    memory = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty_strided((0,), (1,), dtype=t.dtype, device="cpu")
    same = empty.set_(whole, t.storage_offset(), t.shape, t.stride())
    same = same.conj() if t.is_conj() else same
    return torch._neg_view(same) if t.is_neg() else same


def _with_kernels() -> Iterator[Any]:
    for name in torch._C._dispatch_get_all_op_names():
        base = name.removeprefix("aten::").split(".")[0]
        has = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") or name in _ALSO
        if not name.startswith("aten::") or not has:
            continue
        if any(word in base for word in _TORCHS_OWN) or base.startswith(_NO_KERNEL):
            continue
        packet = getattr(torch.ops.aten, base, None)
        overload = name.split(".")[1] if "." in name else "default"
        op = getattr(packet, overload, None)
        if op is None or _is_view(op._schema) or not any("Tensor" in str(a.type) for a in op._schema.arguments):
            continue
        yield op


def _is_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _serve(op: Any, cpu: Any, captured: Callable[[], list[Again] | None], *args: Any, **kwargs: Any) -> Any:
    flat, form = tree_flatten((args, kwargs))
    device = next((x.device for x in flat if isinstance(x, Tensor) and x.is_cuda), torch.device("cuda"))
    hosts = [_argument(x) for x in flat]
    recorded = captured()
    # What is captured happens later: now only the sizes of the results are wanted.
    trial = [x.clone() if isinstance(x, Tensor) else x for x in hosts] if recorded is not None else hosts
    result = _call(op, cpu, form, trial)
    for given, used in zip(flat, trial, strict=True):  # out= of the wrong size
        if isinstance(given, Tensor) and isinstance(used, Tensor) and given.shape != used.shape:
            given.resize_(used.shape)
            on_host(given).copy_(used)
    same = {id(used): given for given, used in zip(flat, trial, strict=True) if isinstance(given, Tensor)}
    fresh: list[tuple[Tensor, Tensor]] = []

    def returned(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in same:
            return same[id(x)]
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        fresh.append((out, x))
        return out

    outputs = tree_map(returned, result)
    if recorded is None:
        for out, x in fresh:
            on_host(out).copy_(x)
    else:
        places = [on_host(out) for out, _ in fresh]
        recorded.append(functools.partial(_again, op, cpu, form, hosts, places))
    return outputs


def _again(op: Any, cpu: Any, form: Any, hosts: list[Any], places: list[Tensor]) -> None:
    given = {id(x) for x in hosts}
    results = [x for x in tree_flatten(_call(op, cpu, form, hosts))[0] if isinstance(x, Tensor) and id(x) not in given]
    for place, x in zip(places, results, strict=True):
        place.copy_(x)


def _call(op: Any, cpu: Any, form: Any, flat: list[Any]) -> Any:
    """cpu: the operator itself, or what is to take its place."""
    args, kwargs = tree_unflatten(flat, form)
    declared = zip(args, op._schema.arguments, strict=False)
    scalars = any(isinstance(x, (int, float)) and isinstance(a.type, torch.TensorType) for x, a in declared)
    return (op.overloadpacket if scalars else cpu)(*args, **kwargs)


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return on_host(x) if x.is_cuda else x
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return None if isinstance(x, torch.Generator) and x.device.type == "cuda" else x
