// Between the generic proxy (loads and stores of threads, ldmatrix, stmatrix) and the async proxy (TMA, bulk copies, and
// wgmma's operands in shared memory): accesses of one are ordered before accesses of the other only by such a fence (sm_90).
// In the other direction, waiting on an mbarrier or for wgmma is enough.
#pragma once
#include <ptx/core.cuh>

// This thread's writes to the block's shared memory -> whatever is issued to the async proxy after it; when another thread
// issues, each writer fences and then joins a barrier with the issuer.
__forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory too, in both directions.
__forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
