/* What adapters add to a product; `native_calls.py` declares the same. */
#ifndef HYBRID_CACHE_LOW_RANK_H
#define HYBRID_CACHE_LOW_RANK_H

#include <stdint.h>

/* Factors of one adapter at one place; rank 0 for nothing. */
typedef struct {
    int64_t rank;
    const uint16_t *A, *B;
} LowRank;

/* Rows of the pass under way that have an adapter, in blocks of rows of one adapter. */
typedef struct {
    int64_t num_rows, num_blocks;
    const int64_t *blocks; /* [num_blocks, 3]: address of factors by place, first of `rows`, number of them */
    const int64_t *rows;   /* [num_rows] */
} AdaptedRows;

/* What may stand beside one projection. */
typedef struct {
    const AdaptedRows *adapted;
    int64_t in, out, num_parts;
    const int64_t *parts; /* [num_parts, 3]: place, first column, columns */
} Beside;

void add_low_rank(const Beside *b, const uint16_t *x, int64_t stride, uint16_t *y, int64_t num_threads);

#endif
