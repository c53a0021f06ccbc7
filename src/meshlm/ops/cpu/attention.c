// The attention of one new token to a cache.

#include "kernels.h"

#include <math.h>

typedef float Lanes __attribute__((vector_size(64)));
typedef float LooseLanes __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE Lanes load(XLA_FFI_DataType type, const void* from, int64_t i) {
  fetch((const char*)from + i * (type == XLA_FFI_DataType_F32 ? 4 : 2));
  if (type == XLA_FFI_DataType_F32) return *(const LooseLanes*)((const float*)from + i);
  Halves bits = *(const Halves*)((const uint16_t*)from + i);
  return (Lanes)(__builtin_convertvector(bits, Words) << 16);
}

INLINE float sum_of(Lanes x) {
#ifdef WIDE
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return sum;
#endif
}

// exp(x) for x <= 0, to float32's precision: 2^n times a polynomial on [-1/2, 1/2].
INLINE float exponential(float x) {
  float t = fmaxf(x * 1.44269504f, -126.0f), n = rintf(t), f = t - n;
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  union { int32_t i; float f; } scale = {((int32_t)n + 127) << 23};
  return p * scale.f;
}

// y += weights times values, for 16 * blocks of a head's dims.
INLINE void mix(int blocks, XLA_FFI_DataType type, const float* weights, int64_t length,
                const void* values, int64_t at, int64_t width, float* y) {
  Lanes sums[4] = {{0}};
  for (int64_t s = 0; s < length; s++)
    UNROLL
    for (int i = 0; i < blocks; i++)
      sums[i] += weights[s] * load(type, values, at + s * width + 16 * i);
  for (int i = 0; i < blocks; i++) *(LooseLanes*)(y + 16 * i) = sums[i];
}

INLINE void attend(const Attention* a, XLA_FFI_DataType type, int64_t pair, float* scores) {
  int64_t width = a->width, length = a->lengths[pair / a->heads];
  if (length > a->places) length = a->places;
  int64_t start = pair * a->places * width, h = 0;
  const float* q = a->q + pair * width;
  float *y = a->y + pair * width, top = -INFINITY, total = 0, unit = 1 / sqrtf((float)width);
  for (int64_t s = 0; s < length; s++) {
    Lanes sum = {0};
    for (h = 0; h < width; h += 16)
      sum += *(const LooseLanes*)(q + h) * load(type, a->keys, start + s * width + h);
    scores[s] = sum_of(sum) * unit;
    top = scores[s] > top || scores[s] != scores[s] ? scores[s] : top;
  }
  if (length > 0 && !isfinite(top)) {
    // The exponential would make numbers of it.
    for (h = 0; h < width; h++) y[h] = NAN;
    return;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t s = 0; s < length; s++) {
    scores[s] = exponential(scores[s] - top);
    total += scores[s];
  }
  for (int64_t s = 0; s < length; s++) scores[s] /= total;
  for (h = 0; h + 64 <= width; h += 64)
    mix(4, type, scores, length, a->values, start + h, width, y + h);
  for (; h < width; h += 16) mix(1, type, scores, length, a->values, start + h, width, y + h);
}

void attend_chunk(const Attention* a, int64_t pair, float* scores) {
  if (a->type == XLA_FFI_DataType_F32)
    attend(a, XLA_FFI_DataType_F32, pair, scores);
  else
    attend(a, XLA_FFI_DataType_BF16, pair, scores);
}
