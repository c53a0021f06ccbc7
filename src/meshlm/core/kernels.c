// Products of a few rows with weights that are read once, y[m][n] = sum_k x[m][k] w[n][k], and the
// attention of one new token to a cache.
//
// Decoding on a CPU is as fast as weights and cache can be read. XLA converts or repacks them on
// every call; here they are read as they lie, weights as [out, in], all of a layer's products in one
// call, and of a cache the places in use alone. core/kernels.py compiles this file on the user's
// machine, for its processor (-march=native).
//
// A number of the result is summed in the same order whatever the number of rows beside it.

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

// Without it sums live in memory instead of registers.
#define UNROLL _Pragma("GCC unroll 4")
#define INLINE static inline __attribute__((always_inline))
#define ROWS 4         // rows of x in one tile
#define OUTS 4         // rows of w in one tile
#define CHUNK 65536    // bytes of w that a thread takes at a time
#define AHEAD 8192     // bytes from what is used to what is fetched: four times the speed of none
#define MAX_PRODUCTS 8

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

// One tile: mr rows of x times nr rows of w, both constants at each call.

INLINE float bf16(uint16_t bits) {
  union { uint32_t u; float f; } both = {(uint32_t)bits << 16};
  return both.f;
}

INLINE void fetch(const void* used) { __builtin_prefetch((const char*)used + AHEAD); }

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
  // The processor multiplies unsigned by signed bytes: 128 times the sum of w is too much.
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

static void run_chunk(const Product* p, int64_t chunk) {
  int64_t out = chunk * p->chunk_outs, end = out + p->chunk_outs;
  if (end > p->outs) end = p->outs;
  for (; out + OUTS <= end; out += OUTS) all_rows(OUTS, p, out);
  for (; out < end; out++) all_rows(1, p, out);
}

// Bytes from floats, a scale a row: the largest |x| becomes 127.
static void quantise(const float* x, int64_t rows, int64_t inner, uint8_t* bytes, float* scale) {
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

// One query against a cache of one head: softmax(q k / sqrt(H)) v over the first `length` places.
// H is a multiple of 16.

typedef struct {
  XLA_FFI_DataType type;  // of keys and values: F32 or BF16
  const float* q;
  const void *keys, *values;
  const int32_t* lengths;
  float* y;
  int64_t heads, places, width;
} Attention;

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

static void attend_chunk(const Attention* a, int64_t pair) {
  float* scores = malloc(a->places * sizeof(float));
  if (a->type == XLA_FFI_DataType_F32)
    attend(a, XLA_FFI_DataType_F32, pair, scores);
  else
    attend(a, XLA_FFI_DataType_BF16, pair, scores);
  free(scores);
}

// Chunks of a call, shared among XLA's threads. Whoever comes late finds nothing left: the caller
// can do all of it alone, and waits for chunks that have begun only.
typedef struct {
  Product products[MAX_PRODUCTS];
  Attention attention;
  int64_t count, chunks;  // count: of products; 0: it is attention
  atomic_long next, done, holders;
} Job;

static void work(Job* job) {
  for (;;) {
    int64_t chunk = atomic_fetch_add(&job->next, 1);
    if (chunk >= job->chunks) return;
    int i = 0;
    if (job->count) {
      for (; chunk >= job->products[i].chunks; i++) chunk -= job->products[i].chunks;
      run_chunk(&job->products[i], chunk);
    } else {
      attend_chunk(&job->attention, chunk);
    }
    atomic_fetch_add(&job->done, 1);
  }
}

static void let_go(Job* job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) free(job);
}

static void help(void* job) {
  work(job);
  let_go(job);
}

static void run(XLA_FFI_CallFrame* frame, Job* job) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args ask = {.struct_size = sizeof ask, .ctx = frame->ctx,
                                            .num_threads = &threads};
  if (frame->api->XLA_FFI_ThreadPool_NumThreads(&ask)) threads = 1;
  int64_t helpers = (threads < job->chunks ? threads : job->chunks) - 1;
  atomic_store(&job->holders, 1);
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args give = {.struct_size = sizeof give, .ctx = frame->ctx,
                                             .task = help, .data = job};
    atomic_fetch_add(&job->holders, 1);
    if (frame->api->XLA_FFI_ThreadPool_Schedule(&give)) let_go(job);
  }
  work(job);
  for (long spins = 0; atomic_load(&job->done) < job->chunks; spins++)
    if (spins > 10000) sched_yield();
  let_go(job);
}

static XLA_FFI_Error* refuse(XLA_FFI_CallFrame* frame, const char* message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = sizeof args, .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

static int asks_for_version(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Metadata_Extension* extension = (XLA_FFI_Metadata_Extension*)frame->extension_start;
  if (!extension || extension->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  extension->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  extension->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

// Arguments: x [M, K] and w [N, K] of each product, and for w of bytes its scales [N]; x then is
// float32. Results: y [M, N] of each, float32.
XLA_FFI_Error* meshlm_products(XLA_FFI_CallFrame* frame) {
  if (asks_for_version(frame)) return NULL;
  if (frame->rets.size > MAX_PRODUCTS) return refuse(frame, "meshlm_products: too many products");
  Job* job = calloc(1, sizeof *job);
  uint8_t* bytes[MAX_PRODUCTS];
  float* scales[MAX_PRODUCTS];
  const void* quantised[MAX_PRODUCTS];
  int made = 0;
  int64_t at = 0;
  job->count = frame->rets.size;
  for (int i = 0; i < job->count; i++) {
    XLA_FFI_Buffer* x = frame->args.args[at++];
    XLA_FFI_Buffer* w = frame->args.args[at++];
    Product* p = &job->products[i];
    *p = (Product){.type = w->dtype, .x = x->data, .w = w->data,
                   .y = ((XLA_FFI_Buffer*)frame->rets.rets[i])->data,
                   .rows = x->dims[0], .outs = w->dims[0], .inner = w->dims[1]};
    int64_t size = 1;
    if (w->dtype == XLA_FFI_DataType_S8) {
      p->w_scale = ((XLA_FFI_Buffer*)frame->args.args[at++])->data;
      int same = 0;
      while (same < made && quantised[same] != x->data) same++;
      if (same == made) {
        bytes[made] = malloc(p->rows * p->inner);
        scales[made] = malloc(p->rows * sizeof(float));
        quantise(x->data, p->rows, p->inner, bytes[made], scales[made]);
        quantised[made++] = x->data;
      }
      p->x = bytes[same];
      p->x_scale = scales[same];
    } else {
      size = w->dtype == XLA_FFI_DataType_F32 ? 4 : 2;
    }
    p->chunk_outs = CHUNK / (p->inner * size) / OUTS * OUTS;
    if (p->chunk_outs < OUTS) p->chunk_outs = OUTS;
    p->chunks = (p->outs + p->chunk_outs - 1) / p->chunk_outs;
    job->chunks += p->chunks;
  }
  run(frame, job);
  while (made-- > 0) {
    free(bytes[made]);
    free(scales[made]);
  }
  return NULL;
}

// Arguments: q [B, N, H] float32, keys and values [B, N, S, H], the places in use [B] int32.
// Result: [B, N, H] float32.
XLA_FFI_Error* meshlm_attention(XLA_FFI_CallFrame* frame) {
  if (asks_for_version(frame)) return NULL;
  XLA_FFI_Buffer** in = (XLA_FFI_Buffer**)frame->args.args;
  Job* job = calloc(1, sizeof *job);
  job->attention = (Attention){.type = in[1]->dtype, .q = in[0]->data, .keys = in[1]->data,
                               .values = in[2]->data, .lengths = in[3]->data,
                               .y = ((XLA_FFI_Buffer*)frame->rets.rets[0])->data,
                               .heads = in[1]->dims[1], .places = in[1]->dims[2],
                               .width = in[1]->dims[3]};
  job->chunks = in[1]->dims[0] * in[1]->dims[1];
  run(frame, job);
  return NULL;
}
