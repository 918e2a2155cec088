/* Products with weights of 4 or 8 bits, on CPUs with AVX512-BF16: included by linear.c.
 *
 * A panel of 64 outputs holds, for each group of 32 inputs, 64 scales in float16 and then the codes, integers that are
 * exact in bfloat16. A group's products are summed as in linear.c, two inputs at a time, and the sum goes into the total
 * by one fused multiply-add with its scale: the same operations in the same order for any number of rows.
 *
 *     4 bits   64 bytes for 8 inputs of 16 outputs: lane 2 o + half has input 2 t + half of output o in its nibble t
 *     8 bits   64 bytes for 2 inputs of 32 outputs, in the order that unpacking bytes leaves them in; the sign, then the
 *              magnitude, and 0x80 for -128
 */
#ifndef HYBRID_CACHE_LOW_BIT_H
#define HYBRID_CACHE_LOW_BIT_H

#include "vec.h"

#define GROUP 32
#define SCALE_BYTES (2 * PANEL)
#define CODES_AHEAD 4096 /* bytes that are asked for before they are needed */

INLINE int64_t group_bytes(int64_t bits) { return SCALE_BYTES + GROUP * PANEL * bits / 8; }

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define HAS_LOW_BIT 1

/* What codes stand for, as the bytes of bfloat16. */
typedef struct {
    __m512i four;           /* by the lower 4 of 5 bits */
    __m512i upper[2], lower[2]; /* by 7 bits of magnitude */
} Values;

INLINE uint16_t bits_of(float value) { /* of an integer that bfloat16 holds */
    uint32_t all;
    memcpy(&all, &value, sizeof all);
    return (uint16_t)(all >> 16);
}

static inline Values values(void) {
    uint16_t four[32];
    uint8_t upper[128], lower[128];
    for (int i = 0; i < 32; i++) four[i] = bits_of((float)((i & 7) - (i & 8)));
    for (int i = 0; i < 128; i++) {
        upper[i] = (uint8_t)(bits_of((float)i) >> 8);
        lower[i] = (uint8_t)bits_of((float)i);
    }
    Values v = {.four = _mm512_loadu_si512(four)};
    for (int i = 0; i < 2; i++) {
        v.upper[i] = _mm512_loadu_si512(upper + 64 * i);
        v.lower[i] = _mm512_loadu_si512(lower + 64 * i);
    }
    return v;
}

INLINE __m512bh pair_at(const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* Two of eight inputs of 16 outputs. */
INLINE __m512bh pairs_of_4(__m512i codes, const int t, const Values *v) {
    return (__m512bh)_mm512_permutexvar_epi16(t ? _mm512_srli_epi16(codes, 4 * t) : codes, v->four);
}

/* Two inputs of 32 outputs. */
INLINE void pairs_of_8(__m512i codes, const Values *v, __m512bh *w) {
    const __m512i sign = _mm512_set1_epi8((char)0x80), least = _mm512_set1_epi8((char)(bits_of(-128) >> 8));
    __m512i upper = _mm512_permutex2var_epi8(v->upper[0], codes, v->upper[1]);
    const __m512i lower = _mm512_permutex2var_epi8(v->lower[0], codes, v->lower[1]);
    upper = _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8); /* upper | (codes & sign) */
    upper = _mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask(codes, sign), upper, least);
    w[0] = (__m512bh)_mm512_unpacklo_epi8(lower, upper);
    w[1] = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}

INLINE __m512 scales_at(const uint8_t *group, int j) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(group + 32 * j)));
}

/* sums[i][j] += the next 32 inputs times `columns` vectors of outputs. */
INLINE void add_group_of_4(__m512 sums[][4], const uint16_t *x, int64_t stride, const uint8_t *codes, const Values *v,
                           const int num_rows, const int columns, const int ahead) {
    for (int k = 0; k < GROUP; k += 8, codes += 64 * columns) {
        __m512i q[4];
        for (int j = 0; j < columns; j++) {
            q[j] = _mm512_loadu_si512(codes + 64 * j);
            IN_REGISTER(q[j]);
            if (ahead) _mm_prefetch((const char *)(codes + 64 * j) + CODES_AHEAD, _MM_HINT_T0);
        }
        for (int t = 0; t < 4; t++) {
            __m512bh w[4];
            for (int j = 0; j < columns; j++) w[j] = pairs_of_4(q[j], t, v);
            for (int i = 0; i < num_rows; i++) {
                const __m512bh both = pair_at(x + i * stride + k + 2 * t);
                for (int j = 0; j < columns; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, w[j]);
            }
        }
    }
}

INLINE void add_group_of_8(__m512 sums[][4], const uint16_t *x, int64_t stride, const uint8_t *codes, const Values *v,
                           const int num_rows, const int columns, const int ahead) {
    for (int k = 0; k < GROUP; k += 2, codes += 2 * 64) {
        __m512bh w[4];
        for (int j = 0; j < columns; j += 2) {
            pairs_of_8(_mm512_loadu_si512(codes + 32 * j), v, w + j);
            if (ahead) _mm_prefetch((const char *)(codes + 32 * j) + CODES_AHEAD, _MM_HINT_T0);
        }
        for (int i = 0; i < num_rows; i++) {
            const __m512bh both = pair_at(x + i * stride + k);
            for (int j = 0; j < columns; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, w[j]);
        }
    }
}

/* acc[i][j] = num_rows rows of x times one panel. Few vectors of outputs at a time, so that sums stay in registers. */
INLINE void add_groups(__m512 acc[][4], const uint16_t *x, int64_t stride, int64_t in, const uint8_t *panel,
                       const Values *v, const int bits, const int num_rows, const int ahead) {
    const int columns = bits == 8 && num_rows <= 4 ? 4 : 2;
    for (int64_t k = 0; k < in; k += GROUP, x += GROUP, panel += group_bytes(bits)) {
        for (int first = 0; first < 4; first += columns) {
            const uint8_t *codes = panel + SCALE_BYTES + first * (bits == 8 ? 32 : 8 * GROUP);
            __m512 sums[BLOCK_ROWS][4];
            for (int i = 0; i < num_rows; i++)
                for (int j = 0; j < columns; j++) sums[i][j] = _mm512_setzero_ps();
            if (bits == 4)
                add_group_of_4(sums, x, stride, codes, v, num_rows, columns, ahead);
            else
                add_group_of_8(sums, x, stride, codes, v, num_rows, columns, ahead);
            for (int j = 0; j < columns; j++) {
                const __m512 scale = scales_at(panel, first + j);
                for (int i = 0; i < num_rows; i++)
                    acc[i][first + j] = _mm512_fmadd_ps(sums[i][j], scale, acc[i][first + j]);
            }
        }
    }
}

/* A panel as pairs of bfloat16 [in / 2, 64, 2], and its scales [in / 32, 64]: for many rows. */
INLINE void expand(const uint8_t *panel, int64_t in, const Values *v, const int bits, uint16_t *pairs, float *scales) {
    for (int64_t k = 0; k < in; k += GROUP, panel += group_bytes(bits), scales += PANEL, pairs += GROUP * PANEL) {
        const uint8_t *codes = panel + SCALE_BYTES;
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(scales + 16 * j, scales_at(panel, j));
        if (bits == 4) {
            for (int first = 0; first < 4; first += 2)
                for (int i = 0; i < GROUP; i += 8, codes += 128)
                    for (int j = 0; j < 2; j++)
                        for (int t = 0; t < 4; t++) {
                            const __m512bh w = pairs_of_4(_mm512_loadu_si512(codes + 64 * j), t, v);
                            _mm512_storeu_si512(pairs + (i + 2 * t) * PANEL + 32 * (first + j), (__m512i)w);
                        }
        } else {
            for (int i = 0; i < GROUP; i += 2, codes += 128)
                for (int j = 0; j < 4; j += 2) {
                    __m512bh w[2];
                    pairs_of_8(_mm512_loadu_si512(codes + 32 * j), v, w);
                    for (int h = 0; h < 2; h++)
                        _mm512_storeu_si512(pairs + i * PANEL + 32 * (j + h), (__m512i)w[h]);
                }
        }
    }
}

/* Of two vectors of outputs. */
INLINE void add_half_expanded(__m512 acc[][4], const uint16_t *x, int64_t stride, int64_t in, const uint16_t *pairs,
                              const float *scales, const int num_rows, const int first) {
    __m512 total[BLOCK_ROWS][2];
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++) total[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += GROUP, scales += PANEL) {
        __m512 sums[BLOCK_ROWS][2];
        for (int i = 0; i < num_rows; i++)
            for (int j = 0; j < 2; j++) sums[i][j] = _mm512_setzero_ps();
        for (int64_t p = k; p < k + GROUP; p += 2) {
            __m512bh w[2];
            for (int j = 0; j < 2; j++) {
                w[j] = (__m512bh)_mm512_loadu_si512(pairs + p * PANEL + 32 * (first + j));
                IN_REGISTER(w[j]);
            }
            for (int i = 0; i < num_rows; i++) {
                const __m512bh both = pair_at(x + i * stride + p);
                for (int j = 0; j < 2; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, w[j]);
            }
        }
        for (int j = 0; j < 2; j++) {
            const __m512 scale = _mm512_loadu_ps(scales + 16 * (first + j));
            for (int i = 0; i < num_rows; i++) total[i][j] = _mm512_fmadd_ps(sums[i][j], scale, total[i][j]);
        }
    }
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++) acc[i][first + j] = total[i][j];
}

/* As add_groups, from an expanded panel: the same sums. */
INLINE void add_expanded(__m512 acc[][4], const uint16_t *x, int64_t stride, int64_t in, const uint16_t *pairs,
                         const float *scales, const int num_rows) {
    add_half_expanded(acc, x, stride, in, pairs, scales, num_rows, 0);
    add_half_expanded(acc, x, stride, in, pairs, scales, num_rows, 2);
}

#else
#define HAS_LOW_BIT 0

typedef struct {
    char none;
} Values;

static inline Values values(void) { return (Values){0}; }

#ifdef __AVX512F__
INLINE void add_groups(__m512 acc[][4], const uint16_t *x, int64_t stride, int64_t in, const uint8_t *panel,
                       const Values *v, const int bits, const int num_rows, const int ahead) {
    (void)acc, (void)x, (void)stride, (void)in, (void)panel, (void)v, (void)bits, (void)num_rows, (void)ahead;
}

INLINE void expand(const uint8_t *panel, int64_t in, const Values *v, const int bits, uint16_t *pairs, float *scales) {
    (void)panel, (void)in, (void)v, (void)bits, (void)pairs, (void)scales;
}

INLINE void add_expanded(__m512 acc[][4], const uint16_t *x, int64_t stride, int64_t in, const uint16_t *pairs,
                         const float *scales, const int num_rows) {
    (void)acc, (void)x, (void)stride, (void)in, (void)pairs, (void)scales, (void)num_rows;
}
#endif
#endif

#endif
