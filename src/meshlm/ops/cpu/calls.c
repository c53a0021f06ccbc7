// The calls that XLA makes, and the threads that share their work.
//
// Decoding on a CPU is as fast as weights and cache can be read. XLA converts or repacks them on
// every call; here they are read as they lie, weights as [out, in], all of a layer's products in one
// call, and of a cache the places in use alone. core/kernels.py compiles these files on the user's
// machine, for its processor (-march=native).
//
// A number of the result is summed in the same order whatever the number of rows beside it.

#include "kernels.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

// All else is hidden: another library's function of the same name cannot take its place.
#define EXPORTED __attribute__((visibility("default")))

// The work of one call in chunks, which XLA's threads share. The calling thread can do all of it
// alone: a thread that starts late finds no chunk left. At the end the caller waits only for chunks
// that other threads have begun.
typedef struct {
  Product products[MAX_PRODUCTS];
  Attention attention;
  int64_t count, chunks;  // count: of products; 0: it is attention
  float* scores;          // of attention: for each thread a float for every place
  atomic_long next, done, holders, workers;
} Job;

static void work(Job* job) {
  int64_t worker = atomic_fetch_add(&job->workers, 1);
  for (;;) {
    int64_t chunk = atomic_fetch_add(&job->next, 1);
    if (chunk >= job->chunks) return;
    int i = 0;
    if (job->count) {
      for (; chunk >= job->products[i].chunks; i++) chunk -= job->products[i].chunks;
      multiply_chunk(&job->products[i], chunk);
    } else {
      attend_chunk(&job->attention, chunk, job->scores + worker * job->attention.places);
    }
    atomic_fetch_add(&job->done, 1);
  }
}

static void discard(Job* job) {
  if (job) free(job->scores);
  free(job);
}

static void let_go(Job* job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) discard(job);
}

static void help(void* job) {
  work(job);
  let_go(job);
}

// True where a call of XLA's interface failed; frees the error.
static int failed(XLA_FFI_CallFrame* frame, XLA_FFI_Error* error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args args = {.struct_size = sizeof args, .error = error};
  frame->api->XLA_FFI_Error_Destroy(&args);
  return 1;
}

static XLA_FFI_Error* refuse(XLA_FFI_CallFrame* frame, XLA_FFI_Error_Code code,
                             const char* message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = sizeof args, .message = message, .errc = code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// Also frees the job.
static XLA_FFI_Error* no_memory(XLA_FFI_CallFrame* frame, Job* job) {
  discard(job);
  return refuse(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "meshlm's kernels: out of memory");
}

static XLA_FFI_Error* run(XLA_FFI_CallFrame* frame, Job* job) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args ask = {.struct_size = sizeof ask, .ctx = frame->ctx,
                                            .num_threads = &threads};
  if (failed(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&ask))) threads = 1;
  int64_t helpers = (threads < job->chunks ? threads : job->chunks) - 1;
  if (helpers < 0) helpers = 0;
  if (!job->count) {
    job->scores = malloc((helpers + 1) * job->attention.places * sizeof(float));
    if (!job->scores) return no_memory(frame, job);
  }
  atomic_store(&job->holders, 1);
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args give = {.struct_size = sizeof give, .ctx = frame->ctx,
                                             .task = help, .data = job};
    atomic_fetch_add(&job->holders, 1);
    if (failed(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&give))) let_go(job);
  }
  work(job);
  for (long spins = 0; atomic_load(&job->done) < job->chunks; spins++)
    if (spins > 10000) sched_yield();
  let_go(job);
  return NULL;
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
EXPORTED XLA_FFI_Error* meshlm_products(XLA_FFI_CallFrame* frame) {
  if (asks_for_version(frame)) return NULL;
  if (frame->rets.size > MAX_PRODUCTS) {
    const char* message = "meshlm_products: too many products";
    return refuse(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
  }
  Job* job = calloc(1, sizeof *job);
  if (!job) return no_memory(frame, job);
  float* rounded[MAX_PRODUCTS];  // the scales of an x's rows, then their bytes
  XLA_FFI_Error* error = NULL;
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
    if (w->dtype == XLA_FFI_DataType_S8) {
      p->w_scale = ((XLA_FFI_Buffer*)frame->args.args[at++])->data;
      int same = 0;
      while (same < made && quantised[same] != x->data) same++;
      if (same == made) {
        float* scale = malloc(p->rows * (sizeof(float) + p->inner));
        if (!scale) {
          error = no_memory(frame, job);
          goto end;
        }
        quantise_rows(x->data, p->rows, p->inner, (uint8_t*)(scale + p->rows), scale);
        quantised[made] = x->data;
        rounded[made++] = scale;
      }
      p->x = rounded[same] + p->rows;
      p->x_scale = rounded[same];
    }
    split_product(p);
    job->chunks += p->chunks;
  }
  error = run(frame, job);
end:
  while (made-- > 0) free(rounded[made]);
  return error;
}

// Arguments: q [B, N, H] float32, keys and values [B, N, S, H], the places in use [B] int32.
// Result: [B, N, H] float32.
EXPORTED XLA_FFI_Error* meshlm_attention(XLA_FFI_CallFrame* frame) {
  if (asks_for_version(frame)) return NULL;
  XLA_FFI_Buffer** in = (XLA_FFI_Buffer**)frame->args.args;
  Job* job = calloc(1, sizeof *job);
  if (!job) return no_memory(frame, job);
  job->attention = (Attention){.type = in[1]->dtype, .q = in[0]->data, .keys = in[1]->data,
                               .values = in[2]->data, .lengths = in[3]->data,
                               .y = ((XLA_FFI_Buffer*)frame->rets.rets[0])->data,
                               .heads = in[1]->dims[1], .places = in[1]->dims[2],
                               .width = in[1]->dims[3]};
  job->chunks = in[1]->dims[0] * in[1]->dims[1];
  return run(frame, job);
}
