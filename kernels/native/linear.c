/* y = x W^T + b in bfloat16, on CPUs with AVX-512: pairs of bfloat16 at a time where there is an instruction for it
 * (AVX512-BF16), else both of a pair in turn, in float32.
 *
 * W is packed in panels of 64 outputs, [panels, in / 2, 64, 2], so a panel is read as one stream. Each output is one
 * accumulator that takes the inputs in order, two at a time, whatever the number of rows: bits cannot depend on it.
 */
#include "calls.h"
#include "vec.h"

#define PANEL 64
#define BLOCK_ROWS 6

#ifdef __AVX512F__
#include <immintrin.h>

int64_t linear_supported(void) { return 1; }

#ifdef __AVX512BF16__
/* acc[i][j] += the pair at x[i] times 16 pairs of the panel. */
INLINE void add_pairs(__m512 acc[][4], const uint16_t *x, int64_t stride, const uint16_t *pairs, const int num_rows) {
    __m512bh w[4];
    for (int j = 0; j < 4; j++) {
        w[j] = (__m512bh)_mm512_loadu_si512(pairs + 32 * j);
        IN_REGISTER(w[j]);
    }
    for (int i = 0; i < num_rows; i++) {
        int32_t pair;
        memcpy(&pair, x + i * stride, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < 4; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], both, w[j]);
    }
}
#else
INLINE void add_pairs(__m512 acc[][4], const uint16_t *x, int64_t stride, const uint16_t *pairs, const int num_rows) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    for (int odd = 0; odd < 2; odd++) {
        vf w[4];
        for (int j = 0; j < 4; j++) { /* read twice: the sums leave no registers for both */
            const __m512i both = _mm512_loadu_si512(pairs + 32 * j);
            w[j] = (vf)(odd ? _mm512_and_si512(both, upper) : _mm512_slli_epi32(both, 16));
            IN_REGISTER(w[j]);
        }
        for (int i = 0; i < num_rows; i++) {
            const uint32_t bits = (uint32_t)x[i * stride + odd] << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            const __m512 one = _mm512_set1_ps(value);
            for (int j = 0; j < 4; j++) acc[i][j] = _mm512_fmadd_ps(one, (__m512)w[j], acc[i][j]);
        }
    }
}
#endif

/* num_rows rows of x times one panel; num_rows is constant after inlining. */
INLINE void panel_rows(const uint16_t *x, int64_t stride, int64_t in, const uint16_t *panel, const float *bias,
                       uint16_t *y, int64_t ldy, int64_t num_columns, const int num_rows, const int ahead) {
    __m512 acc[BLOCK_ROWS][4];
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 2) {
        const uint16_t *pairs = panel + k * PANEL;
        if (ahead)
            for (int j = 0; j < 4; j++) _mm_prefetch((const char *)(pairs + 32 * j) + ahead, _MM_HINT_T0);
        add_pairs(acc, x + k, stride, pairs, num_rows);
    }
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 4; j++)
            if (LANES * j < num_columns) {
                vf v = (vf)acc[i][j];
                if (bias) v += load_n(bias, LANES * j, num_columns - LANES * j, 0);
                store_n(y + i * ldy, LANES * j, v, num_columns - LANES * j, 1);
            }
}

#define ROWS(n)                                                                                        \
    case n:                                                                                            \
        panel_rows(x, stride, in, panel, bias, y, ldy, num_columns, n, ahead);                         \
        break

INLINE void some_rows(const uint16_t *x, int64_t stride, int64_t in, const uint16_t *panel, const float *bias,
                      uint16_t *y, int64_t ldy, int64_t num_columns, int64_t num_rows, const int ahead) {
    switch (num_rows) {
        ROWS(1);
        ROWS(2);
        ROWS(3);
        ROWS(4);
        ROWS(5);
        default: panel_rows(x, stride, in, panel, bias, y, ldy, num_columns, BLOCK_ROWS, ahead);
    }
}

/* bias [out] float32 or null; rows of x `stride` elements apart; y [num_rows, out] contiguous. */
void linear(const uint16_t *x, int64_t stride, int64_t num_rows, int64_t in, int64_t out, const uint16_t *weight,
            const float *bias, uint16_t *y, int64_t num_threads) {
    const int64_t num_panels = (out + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < num_panels; p++) {
            const uint16_t *panel = weight + p * in * PANEL;
            const float *b = bias ? bias + p * PANEL : 0;
            const int64_t n = out - p * PANEL < PANEL ? out - p * PANEL : PANEL;
            some_rows(x, stride, in, panel, b, y + p * PANEL, out, n, num_rows, 8192);
            for (int64_t r = BLOCK_ROWS; r < num_rows; r += BLOCK_ROWS)
                some_rows(x + r * stride, stride, in, panel, b, y + r * out + p * PANEL, out, n, num_rows - r, 0);
        }
    }
}

#else

int64_t linear_supported(void) { return 0; }

void linear(const uint16_t *x, int64_t stride, int64_t num_rows, int64_t in, int64_t out, const uint16_t *weight,
            const float *bias, uint16_t *y, int64_t num_threads) {
    (void)x, (void)stride, (void)num_rows, (void)in, (void)out, (void)weight, (void)bias, (void)y, (void)num_threads;
}

#endif
