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

#include "kernels_products.h"
#include "kernels_attention.h"

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
