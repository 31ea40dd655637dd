// Matrix products of a warpgroup (4 warps, the first with a number divisible by 4) that run while its threads go on (sm_90a):
// d [64, N] += a [64, 16] · b [16, N], N a multiple of 8 up to 256, T bf16 or f16, accumulated in float32. All 128 threads call
// each function, converged.
//
// d and an `a` in registers: warp w of the group holds rows 16 w … 16 w + 15, in the layout that mma.cuh's d and a have. With
// g = lane / 4 and t = 2 (lane % 4): d[4 j + 0, 1] = D[g][8 j + t, + 1], d[4 j + 2, 3] = D[g + 8][8 j + t, + 1]. So registers 8 i
// to 8 i + 7 of a D, packed in pairs, are the `a` of the columns 16 i … 16 i + 15.
//
// Operands in shared memory are named by descriptors (descriptor.cuh), the same for all threads.
//
// Order. wgmma_fence before the first product, and again whenever registers of d or a were written by other instructions since;
// not between products that accumulate into the same d. Products run in order as their groups are committed; wgmma_wait<n> waits
// for all but the n youngest groups. Until then neither d nor `a` may be read or written, and shared operands not overwritten.
// Operands that threads wrote to shared memory need fence_async_shared by the writers and a barrier first; those that TMA brought
// need nothing beyond waiting for their mbarrier.
#pragma once
#include <ptx/core.cuh>
#include <ptx/descriptor.cuh>

// The registers that products use next have been written.
__forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of products since the last commit; an empty group counts.
__forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the kPending youngest groups are under way.
template <int kPending>
__forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler takes asm's results as ready at once: reads of d that belong behind a wait must not move before it, and writes
// that belong before a fence not behind it. Name the accumulators (or an `a`) here after the one and before the other.
template <int kCount>
__forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__forceinline__ void wgmma_pin(u32 (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// The operands of d in an asm statement, and the text that names them, for 4 to 128 registers.
#define FASTATTN_NAMES_4 "%0, %1, %2, %3"
#define FASTATTN_D_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTATTN_NAMES_8 FASTATTN_NAMES_4 ", %4, %5, %6, %7"
#define FASTATTN_D_8 FASTATTN_D_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTATTN_NAMES_12 FASTATTN_NAMES_8 ", %8, %9, %10, %11"
#define FASTATTN_D_12 FASTATTN_D_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTATTN_NAMES_16 FASTATTN_NAMES_12 ", %12, %13, %14, %15"
#define FASTATTN_D_16 FASTATTN_D_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTATTN_NAMES_20 FASTATTN_NAMES_16 ", %16, %17, %18, %19"
#define FASTATTN_D_20 FASTATTN_D_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTATTN_NAMES_24 FASTATTN_NAMES_20 ", %20, %21, %22, %23"
#define FASTATTN_D_24 FASTATTN_D_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTATTN_NAMES_28 FASTATTN_NAMES_24 ", %24, %25, %26, %27"
#define FASTATTN_D_28 FASTATTN_D_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTATTN_NAMES_32 FASTATTN_NAMES_28 ", %28, %29, %30, %31"
#define FASTATTN_D_32 FASTATTN_D_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTATTN_NAMES_36 FASTATTN_NAMES_32 ", %32, %33, %34, %35"
#define FASTATTN_D_36 FASTATTN_D_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTATTN_NAMES_40 FASTATTN_NAMES_36 ", %36, %37, %38, %39"
#define FASTATTN_D_40 FASTATTN_D_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTATTN_NAMES_44 FASTATTN_NAMES_40 ", %40, %41, %42, %43"
#define FASTATTN_D_44 FASTATTN_D_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTATTN_NAMES_48 FASTATTN_NAMES_44 ", %44, %45, %46, %47"
#define FASTATTN_D_48 FASTATTN_D_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTATTN_NAMES_52 FASTATTN_NAMES_48 ", %48, %49, %50, %51"
#define FASTATTN_D_52 FASTATTN_D_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTATTN_NAMES_56 FASTATTN_NAMES_52 ", %52, %53, %54, %55"
#define FASTATTN_D_56 FASTATTN_D_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTATTN_NAMES_60 FASTATTN_NAMES_56 ", %56, %57, %58, %59"
#define FASTATTN_D_60 FASTATTN_D_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTATTN_NAMES_64 FASTATTN_NAMES_60 ", %60, %61, %62, %63"
#define FASTATTN_D_64 FASTATTN_D_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTATTN_NAMES_68 FASTATTN_NAMES_64 ", %64, %65, %66, %67"
#define FASTATTN_D_68 FASTATTN_D_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTATTN_NAMES_72 FASTATTN_NAMES_68 ", %68, %69, %70, %71"
#define FASTATTN_D_72 FASTATTN_D_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTATTN_NAMES_76 FASTATTN_NAMES_72 ", %72, %73, %74, %75"
#define FASTATTN_D_76 FASTATTN_D_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTATTN_NAMES_80 FASTATTN_NAMES_76 ", %76, %77, %78, %79"
#define FASTATTN_D_80 FASTATTN_D_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTATTN_NAMES_84 FASTATTN_NAMES_80 ", %80, %81, %82, %83"
#define FASTATTN_D_84 FASTATTN_D_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTATTN_NAMES_88 FASTATTN_NAMES_84 ", %84, %85, %86, %87"
#define FASTATTN_D_88 FASTATTN_D_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTATTN_NAMES_92 FASTATTN_NAMES_88 ", %88, %89, %90, %91"
#define FASTATTN_D_92 FASTATTN_D_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTATTN_NAMES_96 FASTATTN_NAMES_92 ", %92, %93, %94, %95"
#define FASTATTN_D_96 FASTATTN_D_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTATTN_NAMES_100 FASTATTN_NAMES_96 ", %96, %97, %98, %99"
#define FASTATTN_D_100 FASTATTN_D_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTATTN_NAMES_104 FASTATTN_NAMES_100 ", %100, %101, %102, %103"
#define FASTATTN_D_104 FASTATTN_D_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTATTN_NAMES_108 FASTATTN_NAMES_104 ", %104, %105, %106, %107"
#define FASTATTN_D_108 FASTATTN_D_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTATTN_NAMES_112 FASTATTN_NAMES_108 ", %108, %109, %110, %111"
#define FASTATTN_D_112 FASTATTN_D_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTATTN_NAMES_116 FASTATTN_NAMES_112 ", %112, %113, %114, %115"
#define FASTATTN_D_116 FASTATTN_D_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTATTN_NAMES_120 FASTATTN_NAMES_116 ", %116, %117, %118, %119"
#define FASTATTN_D_120 FASTATTN_D_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTATTN_NAMES_124 FASTATTN_NAMES_120 ", %120, %121, %122, %123"
#define FASTATTN_D_124 FASTATTN_D_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTATTN_NAMES_128 FASTATTN_NAMES_124 ", %124, %125, %126, %127"
#define FASTATTN_D_128 FASTATTN_D_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// One value of N: R registers of d; what follows are the numbers of the operands behind them.
#define FASTATTN_WGMMA_SS(TYPE, N, R, I0, I1, I2, I3, I4, I5, I6)                                                         \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" FASTATTN_NAMES_##R "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";}"                             \
               : FASTATTN_D_##R                                                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA), "n"(kTransposeB))
#define FASTATTN_WGMMA_RS(TYPE, N, R, I0, I1, I2, I3, I4, I5, I6)                                                         \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #I5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" FASTATTN_NAMES_##R "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";}"       \
               : FASTATTN_D_##R                                                                                           \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB))
#define FASTATTN_WGMMA_CASE(KIND, N, R, ...) \
  else if constexpr (kN == N) {              \
    if constexpr (kIsBf16<T>) {              \
      KIND("bf16", N, R, __VA_ARGS__);       \
    } else {                                 \
      KIND("f16", N, R, __VA_ARGS__);        \
    }                                        \
  }
#define FASTATTN_WGMMA_CASES(KIND)                                       \
  if constexpr (false) {                                                 \
  }                                                                      \
  FASTATTN_WGMMA_CASE(KIND, 8, 4, 4, 5, 6, 7, 8, 9, 10)                  \
  FASTATTN_WGMMA_CASE(KIND, 16, 8, 8, 9, 10, 11, 12, 13, 14)             \
  FASTATTN_WGMMA_CASE(KIND, 24, 12, 12, 13, 14, 15, 16, 17, 18)          \
  FASTATTN_WGMMA_CASE(KIND, 32, 16, 16, 17, 18, 19, 20, 21, 22)          \
  FASTATTN_WGMMA_CASE(KIND, 40, 20, 20, 21, 22, 23, 24, 25, 26)          \
  FASTATTN_WGMMA_CASE(KIND, 48, 24, 24, 25, 26, 27, 28, 29, 30)          \
  FASTATTN_WGMMA_CASE(KIND, 56, 28, 28, 29, 30, 31, 32, 33, 34)          \
  FASTATTN_WGMMA_CASE(KIND, 64, 32, 32, 33, 34, 35, 36, 37, 38)          \
  FASTATTN_WGMMA_CASE(KIND, 72, 36, 36, 37, 38, 39, 40, 41, 42)          \
  FASTATTN_WGMMA_CASE(KIND, 80, 40, 40, 41, 42, 43, 44, 45, 46)          \
  FASTATTN_WGMMA_CASE(KIND, 88, 44, 44, 45, 46, 47, 48, 49, 50)          \
  FASTATTN_WGMMA_CASE(KIND, 96, 48, 48, 49, 50, 51, 52, 53, 54)          \
  FASTATTN_WGMMA_CASE(KIND, 104, 52, 52, 53, 54, 55, 56, 57, 58)         \
  FASTATTN_WGMMA_CASE(KIND, 112, 56, 56, 57, 58, 59, 60, 61, 62)         \
  FASTATTN_WGMMA_CASE(KIND, 120, 60, 60, 61, 62, 63, 64, 65, 66)         \
  FASTATTN_WGMMA_CASE(KIND, 128, 64, 64, 65, 66, 67, 68, 69, 70)         \
  FASTATTN_WGMMA_CASE(KIND, 136, 68, 68, 69, 70, 71, 72, 73, 74)         \
  FASTATTN_WGMMA_CASE(KIND, 144, 72, 72, 73, 74, 75, 76, 77, 78)         \
  FASTATTN_WGMMA_CASE(KIND, 152, 76, 76, 77, 78, 79, 80, 81, 82)         \
  FASTATTN_WGMMA_CASE(KIND, 160, 80, 80, 81, 82, 83, 84, 85, 86)         \
  FASTATTN_WGMMA_CASE(KIND, 168, 84, 84, 85, 86, 87, 88, 89, 90)         \
  FASTATTN_WGMMA_CASE(KIND, 176, 88, 88, 89, 90, 91, 92, 93, 94)         \
  FASTATTN_WGMMA_CASE(KIND, 184, 92, 92, 93, 94, 95, 96, 97, 98)         \
  FASTATTN_WGMMA_CASE(KIND, 192, 96, 96, 97, 98, 99, 100, 101, 102)      \
  FASTATTN_WGMMA_CASE(KIND, 200, 100, 100, 101, 102, 103, 104, 105, 106) \
  FASTATTN_WGMMA_CASE(KIND, 208, 104, 104, 105, 106, 107, 108, 109, 110) \
  FASTATTN_WGMMA_CASE(KIND, 216, 108, 108, 109, 110, 111, 112, 113, 114) \
  FASTATTN_WGMMA_CASE(KIND, 224, 112, 112, 113, 114, 115, 116, 117, 118) \
  FASTATTN_WGMMA_CASE(KIND, 232, 116, 116, 117, 118, 119, 120, 121, 122) \
  FASTATTN_WGMMA_CASE(KIND, 240, 120, 120, 121, 122, 123, 124, 125, 126) \
  FASTATTN_WGMMA_CASE(KIND, 248, 124, 124, 125, 126, 127, 128, 129, 130) \
  FASTATTN_WGMMA_CASE(KIND, 256, 128, 128, 129, 130, 131, 132, 133, 134)

template <class T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16> = true;

// d = a · b (+ d when `accumulate`, which is the same for all threads). kTransposeA, kTransposeB: 0 where the operand is k-major,
// 1 where it is mn-major.
template <class T, int kTransposeA, int kTransposeB, int kCount>
__forceinline__ void wgmma_ss(float (&d)[kCount], u64 a, u64 b, bool accumulate) {
  constexpr int kN = 2 * kCount;
  static_assert(kN % 8 == 0 && kN <= 256);
  FASTATTN_WGMMA_CASES(FASTATTN_WGMMA_SS)
}
// The same with `a` in registers: a0 … a3 as mma.cuh's a[0] … a[3].
template <class T, int kTransposeB, int kCount>
__forceinline__ void wgmma_rs(float (&d)[kCount], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
  constexpr int kN = 2 * kCount;
  static_assert(kN % 8 == 0 && kN <= 256);
  FASTATTN_WGMMA_CASES(FASTATTN_WGMMA_RS)
}
