// Products of a few rows with weights that are read once.

#include "kernels.h"

#include <math.h>
#include <string.h>

#define ROWS 4       // rows of x in one tile
#define OUTS 4       // rows of w in one tile
#define CHUNK 65536  // bytes of w that a thread takes at a time

// One tile: mr rows of x times nr rows of w, both constants at each call.

INLINE float bf16(uint16_t bits) {
  union { uint32_t u; float f; } both = {(uint32_t)bits << 16};
  return both.f;
}

INLINE void tile_f32(int mr, int nr, const float* x, const float* w, int64_t inner, float* sums) {
#ifdef WIDE
  __m512 acc[ROWS][OUTS], row[OUTS];
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) acc[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inner; k += 16) {
    __mmask16 in = inner - k >= 16 ? 0xffff : (__mmask16)((1u << (inner - k)) - 1);
UNROLL
    for (int n = 0; n < nr; n++) {
      row[n] = _mm512_maskz_loadu_ps(in, w + n * inner + k);
      fetch(w + n * inner + k);
    }
UNROLL
    for (int m = 0; m < mr; m++) {
      __m512 left = _mm512_maskz_loadu_ps(in, x + m * inner + k);
UNROLL
      for (int n = 0; n < nr; n++) acc[m][n] = _mm512_fmadd_ps(left, row[n], acc[m][n]);
    }
  }
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) sums[m * OUTS + n] = _mm512_reduce_add_ps(acc[m][n]);
#else
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < inner; k++) sum += x[m * inner + k] * w[n * inner + k];
      sums[m * OUTS + n] = sum;
    }
#endif
}

INLINE void tile_bf16(int mr, int nr, const uint16_t* x, const uint16_t* w, int64_t inner,
                      float* sums) {
#if defined(WIDE) && defined(__AVX512BF16__)
  __m512 acc[ROWS][OUTS];
  __m512i row[OUTS];
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) acc[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inner; k += 32) {
    __mmask32 in = inner - k >= 32 ? 0xffffffff : (1u << (inner - k)) - 1;
UNROLL
    for (int n = 0; n < nr; n++) {
      row[n] = _mm512_maskz_loadu_epi16(in, w + n * inner + k);
      fetch(w + n * inner + k);
    }
UNROLL
    for (int m = 0; m < mr; m++) {
      __m512i left = _mm512_maskz_loadu_epi16(in, x + m * inner + k);
UNROLL
      for (int n = 0; n < nr; n++)
        acc[m][n] = _mm512_dpbf16_ps(acc[m][n], (__m512bh)left, (__m512bh)row[n]);
    }
  }
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) sums[m * OUTS + n] = _mm512_reduce_add_ps(acc[m][n]);
#else
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < inner; k++) sum += bf16(x[m * inner + k]) * bf16(w[n * inner + k]);
      sums[m * OUTS + n] = sum;
    }
#endif
}

INLINE void tile_s8(int mr, int nr, const uint8_t* x, const int8_t* w, int64_t inner,
                    int32_t* sums) {
#if defined(WIDE) && defined(__AVX512VNNI__)
  // The instruction multiplies unsigned by signed bytes, and x is 128 too large: 128 times the sum
  // of w is subtracted at the end.
  const __m512i offset = _mm512_set1_epi8((char)128);
  __m512i acc[ROWS][OUTS], row[OUTS], over[OUTS];
UNROLL
  for (int n = 0; n < nr; n++) {
    over[n] = _mm512_setzero_si512();
UNROLL
    for (int m = 0; m < mr; m++) acc[m][n] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < inner; k += 64) {
    __mmask64 in = inner - k >= 64 ? ~0ull : (1ull << (inner - k)) - 1;
UNROLL
    for (int n = 0; n < nr; n++) {
      row[n] = _mm512_maskz_loadu_epi8(in, w + n * inner + k);
      fetch(w + n * inner + k);
      over[n] = _mm512_dpbusd_epi32(over[n], offset, row[n]);
    }
UNROLL
    for (int m = 0; m < mr; m++) {
      __m512i left = _mm512_maskz_loadu_epi8(in, x + m * inner + k);
UNROLL
      for (int n = 0; n < nr; n++) acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], left, row[n]);
    }
  }
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++)
      sums[m * OUTS + n] = _mm512_reduce_add_epi32(_mm512_sub_epi32(acc[m][n], over[n]));
#else
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++) {
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < inner; k++)
        sum += ((int32_t)x[m * inner + k] - 128) * (int32_t)w[n * inner + k];
      sums[m * OUTS + n] = sum;
    }
#endif
}

INLINE void tile(int mr, int nr, const Product* p, int64_t first_row, int64_t first_out) {
  float sums[ROWS * OUTS];
  int64_t x_at = first_row * p->inner, w_at = first_out * p->inner;
  if (p->type == XLA_FFI_DataType_F32) {
    tile_f32(mr, nr, (const float*)p->x + x_at, (const float*)p->w + w_at, p->inner, sums);
  } else if (p->type == XLA_FFI_DataType_BF16) {
    tile_bf16(mr, nr, (const uint16_t*)p->x + x_at, (const uint16_t*)p->w + w_at, p->inner, sums);
  } else {
    int32_t whole[ROWS * OUTS];
    tile_s8(mr, nr, (const uint8_t*)p->x + x_at, (const int8_t*)p->w + w_at, p->inner, whole);
UNROLL
    for (int m = 0; m < mr; m++)
UNROLL
      for (int n = 0; n < nr; n++)
        sums[m * OUTS + n] = (float)whole[m * OUTS + n] *
                             (p->x_scale[first_row + m] * p->w_scale[first_out + n]);
  }
UNROLL
  for (int m = 0; m < mr; m++)
UNROLL
    for (int n = 0; n < nr; n++)
      p->y[(first_row + m) * p->outs + first_out + n] = sums[m * OUTS + n];
}

INLINE void all_rows(int nr, const Product* p, int64_t out) {
  int64_t row = 0;
  for (; row + ROWS <= p->rows; row += ROWS) tile(ROWS, nr, p, row, out);
  switch (p->rows - row) {
    case 3: tile(3, nr, p, row, out); break;
    case 2: tile(2, nr, p, row, out); break;
    case 1: tile(1, nr, p, row, out); break;
  }
}

void split_product(Product* p) {
  int64_t size = p->type == XLA_FFI_DataType_S8 ? 1 : p->type == XLA_FFI_DataType_F32 ? 4 : 2;
  p->chunk_outs = CHUNK / (p->inner * size) / OUTS * OUTS;
  if (p->chunk_outs < OUTS) p->chunk_outs = OUTS;
  p->chunks = (p->outs + p->chunk_outs - 1) / p->chunk_outs;
}

void multiply_chunk(const Product* p, int64_t chunk) {
  int64_t out = chunk * p->chunk_outs, end = out + p->chunk_outs;
  if (end > p->outs) end = p->outs;
  for (; out + OUTS <= end; out += OUTS) all_rows(OUTS, p, out);
  for (; out < end; out++) all_rows(1, p, out);
}

void quantise_rows(const float* x, int64_t rows, int64_t inner, uint8_t* bytes, float* scale) {
  for (int64_t m = 0; m < rows; m++, x += inner, bytes += inner) {
    uint32_t top = 0;  // as bits: a NaN is above all numbers
    for (int64_t k = 0; k < inner; k++) {
      uint32_t bits;
      memcpy(&bits, x + k, 4);
      bits &= 0x7fffffff;
      top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    scale[m] = largest * (1.0f / 127.0f);
    float factor = largest > 0 && isfinite(largest) ? 127.0f / largest : 0.0f;
    if (!isfinite(factor)) factor = 0.0f;
    for (int64_t k = 0; k < inner; k++) {
      float value = x[k] * factor;
      bytes[k] = value == value ? (uint8_t)((int)rintf(value) + 128) : 128;
    }
  }
}
