// What the kernels of layer_norm and rms_norm are told. T is the dtype of x, W that of weight and bias. A tensor read by
// rows has sizes and strides (in elements) of three leading dimensions, merged where its strides allow: see row_start.
#pragma once
#include <ptx/core.cuh>

constexpr int kNormLongThreads = 512;  // of the kernels for rows that are read twice

struct NormFwdParams {
  const void* x;           // T [rows, cols]
  const void* residual;    // T [rows, cols], added to x; may be null
  const void* weight;      // W [cols]; may be null
  const void* bias;        // W [cols]; may be null
  void* y;                 // T [rows, cols], contiguous
  void* sum;               // T [rows, cols], contiguous: x + residual; null without residual
  float* mean;             // [rows]; null: the rows are not centred (rms_norm)
  float* rstd;             // [rows]
  u32 rows;                // at least 1
  u32 cols;                // at least 1
  u32 lanes;               // threads of a block that share a row: a power of two up to 32, or the whole block
  u32 piece;               // columns per block of norm_fwd_long_kernel, whole packs; others do not look at it
  u32 x_size[2];           // of the second and third dimension
  u32 residual_size[2];    // likewise
  i64 x_stride[3];         // of the three dimensions
  i64 residual_stride[3];  // likewise
  float eps;               // added to the variance (to the mean square)
  float weight_offset;     // added to weight; 0 without
  int round_first;         // x_hat is rounded to T before it is multiplied
};

struct NormBwdParams {
  const void* dy;       // T [rows, cols]
  const void* dsum;     // T [rows, cols], added to dx; may be null
  const void* x;        // T [rows, cols]: what was normalised
  const void* weight;   // W [cols]; may be null
  const float* mean;    // [rows]; null: the rows were not centred
  const float* rstd;    // [rows]
  void* dx;             // T [rows, cols], contiguous
  float* dweight;       // [groups of rows, cols]: partial sums; may be null
  float* dbias;         // [groups of rows, cols]: partial sums; may be null
  u32 rows;             // at least 1
  u32 cols;             // at least 1
  u32 lanes;            // threads of a block that share a row: a power of two up to 32, or whole warps
  u32 dy_size[2];       // of the second and third dimension
  u32 dsum_size[2];     // likewise
  u32 x_size[2];        // likewise
  i64 dy_stride[3];     // of the three dimensions
  i64 dsum_stride[3];   // likewise
  i64 x_stride[3];      // likewise
  float weight_offset;  // added to weight; 0 without
};

struct NormReduceParams {
  const float* dweight_partial;  // [groups, cols]; null: dweight is not wanted
  const float* dbias_partial;    // [groups, cols]; null: dbias is not wanted
  void* dweight;                 // W [cols]; null with its partial sums
  void* dbias;                   // W [cols]; likewise
  u32 groups;                    // at least 1
  u32 cols;                      // at least 1
  u32 helpers;                   // warps that share 32 columns: 1, 2, 4, 8 or 16
};
