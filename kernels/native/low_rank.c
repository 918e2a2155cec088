/* What adapters add to the rows of a product, y += B A x, in bfloat16 on CPUs with AVX-512 (see kernels/low_rank.py).
 *
 * A is packed in panels of 16 outputs, [panels, in / 2, 16, 2], B in panels of 64, [panels, rank / 2, 64, 2]. A x is
 * rounded to bfloat16; y takes the sum of B times it in one step. Rows are taken a few at a time, all of one adapter;
 * each output is one accumulator that takes the inputs in order, so its bits do not depend on the rows beside it.
 */
#include "low_rank.h"
#include "vec.h"

#define PANEL 64
#define MAX_ROWS 6 /* of a block; BLOCK_ROWS in native_products.py */

#ifdef __AVX512F__
#include <immintrin.h>

/* The pair of bfloat16 at x, sixteen times. */
INLINE __m512i repeated(const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_set1_epi32(pair);
}

/* acc += one pair times sixteen. */
INLINE __m512 add_pair(__m512 acc, __m512i pair, __m512i pairs) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)pair, (__m512bh)pairs);
#else
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    acc = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(pair, 16), (__m512)_mm512_slli_epi32(pairs, 16), acc);
    return _mm512_fmadd_ps((__m512)_mm512_and_si512(pair, upper), (__m512)_mm512_and_si512(pairs, upper), acc);
#endif
}

/* u [num_rows, width] = A times rows of x; width: the rank, rounded up to 16. */
INLINE void into_rank(const uint16_t *const *x, int64_t in, const uint16_t *A, int64_t width, uint16_t *u,
                      const int num_rows) {
    for (int64_t r = 0; r < width; r += LANES, A += in * LANES) {
        __m512 acc[MAX_ROWS];
        for (int i = 0; i < num_rows; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < in; k += 2) {
            const __m512i pairs = _mm512_loadu_si512(A + k * LANES);
            for (int i = 0; i < num_rows; i++) acc[i] = add_pair(acc[i], repeated(x[i] + k), pairs);
        }
        for (int i = 0; i < num_rows; i++) store(u + i * width, r, (vf)acc[i], 1);
    }
}

/* y += B times rows of u, for `size` columns. */
INLINE void out_of_rank(const uint16_t *u, int64_t width, int64_t rank, const uint16_t *B, int64_t size,
                        uint16_t *const *y, const int num_rows) {
    const int64_t num_pairs = (rank + 1) / 2;
    for (int64_t c = 0; c < size; c += PANEL, B += num_pairs * 2 * PANEL) {
        __m512 acc[MAX_ROWS][4];
        for (int i = 0; i < num_rows; i++)
            for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_ps();
        for (int64_t p = 0; p < num_pairs; p++) {
            __m512i pairs[4];
            for (int j = 0; j < 4; j++) {
                pairs[j] = _mm512_loadu_si512(B + (4 * p + j) * 2 * LANES);
                IN_REGISTER(pairs[j]);
            }
            for (int i = 0; i < num_rows; i++) {
                const __m512i pair = repeated(u + i * width + 2 * p);
                for (int j = 0; j < 4; j++) acc[i][j] = add_pair(acc[i][j], pair, pairs[j]);
            }
        }
        for (int i = 0; i < num_rows; i++)
            for (int j = 0; j < 4; j++) {
                const int64_t from = c + LANES * j;
                if (from < size)
                    store_n(y[i], from, load_n(y[i], from, size - from, 1) + (vf)acc[i][j], size - from, 1);
            }
    }
}

INLINE void add_pair_of(const LowRank *f, const uint16_t *const *x, int64_t in, int64_t size, uint16_t *const *y,
                        const int num_rows) {
    const int64_t width = ROUND_UP(f->rank);
    uint16_t u[MAX_ROWS * width]; /* ranks are bounded, see MAX_RANK in low_rank.py */
    into_rank(x, in, f->A, width, u, num_rows);
    out_of_rank(u, width, f->rank, f->B, size, y, num_rows);
}

#define ROWS(n)                                          \
    case n:                                              \
        add_pair_of(f, from, b->in, part[2], to, n);     \
        break

/* block: the adapter's factors by place, then the first and the number of its rows in the list of adapted rows */
static void add_to_block(const Beside *b, const int64_t *block, const uint16_t *x, int64_t stride, uint16_t *y) {
    const LowRank *factors = (const LowRank *)(intptr_t)block[0];
    const int64_t *rows = b->adapted->rows + block[1];
    for (const int64_t *part = b->parts; part < b->parts + 3 * b->num_parts; part += 3) {
        const LowRank *f = factors + part[0];
        if (!f->rank) continue;
        const uint16_t *from[MAX_ROWS];
        uint16_t *to[MAX_ROWS];
        for (int64_t i = 0; i < block[2]; i++) {
            from[i] = x + rows[i] * stride;
            to[i] = y + rows[i] * b->out + part[1];
        }
        switch (block[2]) {
            ROWS(1);
            ROWS(2);
            ROWS(3);
            ROWS(4);
            ROWS(5);
            default: add_pair_of(f, from, b->in, part[2], to, MAX_ROWS);
        }
    }
}

/* rows of x `stride` elements apart; y [R, out] contiguous: those of the pass that are adapted change. */
void add_low_rank(const Beside *b, const uint16_t *x, int64_t stride, uint16_t *y, int64_t num_threads) {
    const AdaptedRows *a = b->adapted;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->num_blocks; i++) add_to_block(b, a->blocks + 3 * i, x, stride, y);
    }
}

#else

void add_low_rank(const Beside *b, const uint16_t *x, int64_t stride, uint16_t *y, int64_t num_threads) {
    (void)b, (void)x, (void)stride, (void)y, (void)num_threads;
}

#endif
