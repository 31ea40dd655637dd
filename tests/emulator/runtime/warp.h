// Where the lanes of a warp meet.
#pragma once
#include "state.h"

namespace emulator {

// The running lane waits until every lane of `mask` that has not exited is here; the last one calls finish, which finds
// what each gave as `slot`. `aligned`: an instruction that the whole warp must execute.
void gather(const char* verb, u32 mask, bool aligned, void (*finish)(Gather&), void* slot, Pc pc);

}  // namespace emulator
