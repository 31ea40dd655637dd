// The table of this instruction set's kernels. A new family adds its declaration and its row here and in kernels.h.
#include "kernels.h"

namespace fastattn {
namespace FASTATTN_ISA {

void attention_fwd(const AttentionParams&);
void attention_bwd(const AttentionBwdParams&);
bool attention_is_decode(const AttentionParams&);
void attention_decode(const AttentionParams&);
void attention_weights(const AttentionParams&);
void norm_fwd(const NormParams&);
void norm_bwd(const NormBwdParams&);
void rope(const RopeParams&);
double fma_flops(bool bf16, int64_t iterations);
void copy_bytes(char* to, const char* from, int64_t bytes, bool around_cache, int64_t ahead);

#define FASTATTN_NAME(isa) FASTATTN_STRING(isa)
#define FASTATTN_STRING(text) #text

extern const Kernels table;
const Kernels table = {
    FASTATTN_NAME(FASTATTN_ISA),
    attention_fwd,
    attention_bwd,
    attention_is_decode,
    attention_decode,
    attention_weights,
    norm_fwd,
    norm_bwd,
    rope,
    fma_flops,
    copy_bytes,
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
