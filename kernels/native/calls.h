/* Entry points that other files call too. */
#ifndef HYBRID_CACHE_CALLS_H
#define HYBRID_CACHE_CALLS_H

#include "layout.h"
#include "low_rank.h"

/* A weight in the panels of linear.c, and what may stand beside it, or null. */
typedef struct {
    int64_t in, out, bits; /* 16 for bfloat16, 8 and 4 for codes */
    const void *weight;
    const float *bias; /* [out] or null */
    const Beside *beside;
} Linear;

void linear(const Linear *w, const uint16_t *x, int64_t stride, int64_t num_rows, uint16_t *y, int64_t num_threads);

void rms_norm(const void *x, int64_t stride, int64_t num_rows, int64_t size, const void *weight, float eps, void *out,
              int64_t num_threads, int64_t bf16);

void silu_mul(const void *x, int64_t stride, int64_t num_rows, int64_t size, void *out, int64_t num_threads,
              int64_t bf16);

void mamba2(const Layout *l, const Mamba2 *w, const void *rows, void *out, void *conv, int64_t conv_stride,
            float *state, int64_t state_stride, float *scratch, int64_t num_threads, int64_t bf16);

void mamba2_log_decay(const Mamba2 *w, const void *rows, int64_t num_rows, int64_t row_width, float *log_decay,
                      int64_t bf16);

int64_t mamba2_scratch(const Layout *l, const Mamba2 *w, int64_t num_threads);

#endif
