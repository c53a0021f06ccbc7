// What the kernels' sources share: macros, and the functions that compute one chunk of a call.

#pragma once

#include <stdint.h>

#include "xla/ffi/api/c_api.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

// Without it sums live in memory instead of registers.
#define UNROLL _Pragma("GCC unroll 4")
#define INLINE static inline __attribute__((always_inline))
#define AHEAD 8192  // bytes from what is used to what is fetched: four times the speed of none
#define MAX_PRODUCTS 8

INLINE void fetch(const void* used) { __builtin_prefetch((const char*)used + AHEAD); }

// products.c: a product of a few rows with a weight, y[m][n] = sum_k x[m][k] w[n][k].

typedef struct {
  XLA_FFI_DataType type;  // of w: F32, BF16 or S8
  const void* x;          // of w's type; for S8 unsigned bytes, 128 above the signed ones
  const float* x_scale;   // S8 alone: of each row of x
  const void* w;
  const float* w_scale;   // S8 alone: of each row of w
  float* y;
  int64_t rows, outs, inner;
  int64_t chunk_outs, chunks;
} Product;

// Sets chunk_outs and chunks from type, outs and inner.
void split_product(Product* product);

void multiply_chunk(const Product* product, int64_t chunk);

// Bytes from floats [rows, inner], and a scale for each row: the largest |x| becomes 127.
void quantise_rows(const float* x, int64_t rows, int64_t inner, uint8_t* bytes, float* scale);

// attention.c: one query against a cache of one head, softmax(q k / sqrt(H)) v over the first
// `length` places. H is a multiple of 16. A chunk is a row's head.

typedef struct {
  XLA_FFI_DataType type;  // of keys and values: F32 or BF16
  const float* q;
  const void *keys, *values;
  const int32_t* lengths;
  float* y;
  int64_t heads, places, width;
} Attention;

// scores: room for one float a place.
void attend_chunk(const Attention* attention, int64_t chunk, float* scores);
