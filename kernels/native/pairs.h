/* Products of a few rows with a matrix, in float32 or in pairs of bfloat16 with sums in float32 (AVX512-BF16).
 *
 * Each output is one accumulator that takes its terms in order, so a row's bits do not depend on the other rows.
 */
#ifndef HYBRID_CACHE_PAIRS_H
#define HYBRID_CACHE_PAIRS_H

#include "vec.h"

#define BLOCK 6 /* rows at a time: 6 x 4 sums fit the registers */

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAVE_PAIRS 1

INLINE void pairs_rows(float *const *out, const float *keep, const uint16_t *const *a, const float *x, int64_t ldx,
                       int64_t num_pairs, const int rows, const int nv) {
    __m512 acc[BLOCK][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < nv; j++) acc[i][j] = (__m512)(keep ? keep[i] * load_f32(out[i] + LANES * j) : splat(0));
    for (int64_t k = 0; k < num_pairs; k++) {
        __m512bh b[4];
        for (int j = 0; j < nv; j++) {
            b[j] = (__m512bh)load_f32(x + k * ldx + LANES * j);
            IN_REGISTER(b[j]);
        }
        for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, a[i] + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < nv; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], both, b[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < nv; j++) store_f32(out[i] + LANES * j, (vf)acc[i][j]);
}

/* Sixteen pairs (even[i], odd[i]), rounded to bfloat16. */
INLINE vf make_pairs(vf even, vf odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (vf)_mm512_permutexvar_epi16(order, both);
}
#else
#define HAVE_PAIRS 0
#define pairs_rows(...) (void)0
#define make_pairs(even, odd) (even)
#endif

INLINE void float_rows(float *const *out, const float *keep, const float *const *a, const float *x, int64_t ldx,
                       int64_t num_k, const int rows, const int nv) {
    vf acc[BLOCK][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < nv; j++) acc[i][j] = keep ? keep[i] * load_f32(out[i] + LANES * j) : splat(0);
    for (int64_t k = 0; k < num_k; k++) {
        vf b[4];
        for (int j = 0; j < nv; j++) {
            b[j] = load_f32(x + k * ldx + LANES * j);
            IN_REGISTER(b[j]);
        }
        for (int i = 0; i < rows; i++) {
            const vf both = splat(a[i][k]);
            for (int j = 0; j < nv; j++) acc[i][j] += both * b[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < nv; j++) store_f32(out[i] + LANES * j, acc[i][j]);
}

/* out[i] = keep[i] * out[i] + a[i] times x, for `rows` rows and `width` columns, a multiple of 16. x is [num_k, ldx],
 * or half as many rows of pairs. keep may be null: then 0. `pairs` and `rows` are constants after inlining. */
INLINE void multiply(float *const *out, const float *keep, const void *const *a, const float *x, int64_t ldx,
                     int64_t num_k, int64_t width, const int pairs, const int rows) {
    float *to[BLOCK];
    for (int64_t col = 0; col < width;) {
        const int nv = width - col >= 64 ? 4 : width - col >= 32 ? 2 : 1;
        for (int i = 0; i < rows; i++) to[i] = out[i] + col;
        if (pairs && nv == 4)
            pairs_rows(to, keep, (const uint16_t *const *)a, x + col, ldx, (num_k + 1) / 2, rows, 4);
        else if (pairs && nv == 2)
            pairs_rows(to, keep, (const uint16_t *const *)a, x + col, ldx, (num_k + 1) / 2, rows, 2);
        else if (pairs)
            pairs_rows(to, keep, (const uint16_t *const *)a, x + col, ldx, (num_k + 1) / 2, rows, 1);
        else if (nv == 4)
            float_rows(to, keep, (const float *const *)a, x + col, ldx, num_k, rows, 4);
        else if (nv == 2)
            float_rows(to, keep, (const float *const *)a, x + col, ldx, num_k, rows, 2);
        else
            float_rows(to, keep, (const float *const *)a, x + col, ldx, num_k, rows, 1);
        col += nv * LANES;
    }
}

/* The same for BLOCK rows, or the last four of a tile, of matrices with rows ldo and lda values apart; keep is 0. */
INLINE void pairs_block(float *out, int64_t ldo, const uint16_t *a, int64_t lda, const float *x, int64_t ldx,
                        int64_t num_k, int64_t width, int64_t rows) {
    float *to[BLOCK];
    const void *from[BLOCK];
    for (int i = 0; i < BLOCK; i++) to[i] = out + i * ldo, from[i] = a + i * lda;
    if (rows == TILE % BLOCK)
        multiply(to, 0, from, x, ldx, num_k, width, 1, TILE % BLOCK);
    else
        multiply(to, 0, from, x, ldx, num_k, width, 1, BLOCK);
}

#endif
