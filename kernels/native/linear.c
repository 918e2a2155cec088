/* y = x W^T + b with rows of bfloat16, on CPUs with AVX-512: pairs of bfloat16 at a time where there is an instruction
 * for it (AVX512-BF16), else both of a pair in turn, in float32.
 *
 * W is packed in panels of 64 outputs, so a panel is read as one stream: in bfloat16 [panels, in / 2, 64, 2], in fewer
 * bits as low_bit.h says. Each output is one accumulator that takes the inputs in order, two at a time, whatever the
 * number of rows: bits cannot depend on it.
 */
#include <stdlib.h>

#include "calls.h"
#include "vec.h"

#define PANEL 64
#define BLOCK_ROWS 6
#define EXPANDED 0 /* in place of a number of bits */
#define PAIRS_AHEAD 8192 /* bytes that are asked for before they are needed */

#ifdef __AVX512F__
#include <immintrin.h>

#include "low_bit.h"

int64_t linear_supported(void) { return 1; }
int64_t low_bit_supported(void) { return HAS_LOW_BIT; }

/* Outputs [num_columns] of some rows: x `stride` elements apart, y `ldy`. */
typedef struct {
    int64_t in, stride, ldy, num_columns;
    const void *weight;
    const float *bias;
    const Values *values;
    const float *scales; /* of an expanded panel */
} Panel;

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

/* acc[i][j] = num_rows rows of x times one panel of bfloat16. */
INLINE void add_panel(__m512 acc[][4], const uint16_t *x, int64_t stride, int64_t in, const uint16_t *panel,
                      const int num_rows, const int ahead) {
    for (int64_t k = 0; k < in; k += 2) {
        const uint16_t *pairs = panel + k * PANEL;
        if (ahead)
            for (int j = 0; j < 4; j++) _mm_prefetch((const char *)(pairs + 32 * j) + PAIRS_AHEAD, _MM_HINT_T0);
        add_pairs(acc, x + k, stride, pairs, num_rows);
    }
}

/* num_rows rows of x times one panel; num_rows, bits and ahead are constant after inlining. */
INLINE void panel_rows(const Panel *p, const uint16_t *x, uint16_t *y, const int bits, const int num_rows,
                       const int ahead) {
    __m512 acc[BLOCK_ROWS][4];
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_ps();
    if (bits == 16)
        add_panel(acc, x, p->stride, p->in, p->weight, num_rows, ahead);
    else if (bits == EXPANDED)
        add_expanded(acc, x, p->stride, p->in, p->weight, p->scales, num_rows);
    else
        add_groups(acc, x, p->stride, p->in, p->weight, p->values, bits, num_rows, ahead);
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 4; j++)
            if (LANES * j < p->num_columns) {
                vf v = (vf)acc[i][j];
                if (p->bias) v += load_n(p->bias, LANES * j, p->num_columns - LANES * j, 0);
                store_n(y + i * p->ldy, LANES * j, v, p->num_columns - LANES * j, 1);
            }
}

#define ROWS(n)                                   \
    case n:                                       \
        panel_rows(p, x, y, bits, n, ahead);      \
        break

INLINE void some_rows(const Panel *p, const uint16_t *x, uint16_t *y, int64_t num_rows, const int bits,
                      const int ahead) {
    switch (num_rows) {
        ROWS(1);
        ROWS(2);
        ROWS(3);
        ROWS(4);
        ROWS(5);
        default: panel_rows(p, x, y, bits, BLOCK_ROWS, ahead);
    }
}

INLINE void all_rows(const Panel *p, const uint16_t *x, uint16_t *y, int64_t num_rows, const int bits) {
    if (num_rows > 0) some_rows(p, x, y, num_rows, bits, 1);
    for (int64_t r = BLOCK_ROWS; r < num_rows; r += BLOCK_ROWS)
        some_rows(p, x + r * p->stride, y + r * p->ldy, num_rows - r, bits, 0);
}

static void rows_of_4(const Panel *p, const uint16_t *x, uint16_t *y, int64_t num_rows) {
    all_rows(p, x, y, num_rows, 4);
}

static void rows_of_8(const Panel *p, const uint16_t *x, uint16_t *y, int64_t num_rows) {
    all_rows(p, x, y, num_rows, 8);
}

static void rows_expanded(const Panel *p, const uint16_t *x, uint16_t *y, int64_t num_rows) {
    all_rows(p, x, y, num_rows, EXPANDED);
}

static void rows_of_16(const Panel *p, const uint16_t *x, uint16_t *y, int64_t num_rows) {
    all_rows(p, x, y, num_rows, 16);
}

static int64_t panel_bytes(const Linear *w) {
    return w->bits == 16 ? 2 * w->in * PANEL : w->in / GROUP * group_bytes(w->bits);
}

/* Whether so many rows make up for it. */
static int expands(const Linear *w, int64_t num_rows) { return w->bits != 16 && num_rows >= (w->bits == 4 ? 128 : 32); }

static size_t expanded_bytes(int64_t in) {
    return (size_t)in * PANEL * sizeof(uint16_t) + (size_t)(in / GROUP) * PANEL * sizeof(float);
}

/* rows of x `stride` elements apart; y [num_rows, out] contiguous. Without memory for panels that are expanded, codes are
 * read for each block of rows: slower, and the same sums. */
void linear(const Linear *w, const uint16_t *x, int64_t stride, int64_t num_rows, uint16_t *y, int64_t num_threads) {
    const int64_t num_panels = (w->out + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
        const Values v = w->bits == 16 ? (Values){0} : values();
        float *scales = expands(w, num_rows) ? malloc(expanded_bytes(w->in)) : 0;
        uint16_t *pairs = scales ? (uint16_t *)(scales + w->in / GROUP * PANEL) : 0;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_panels; i++) {
            const int64_t first = i * PANEL;
            Panel p = {
                .in = w->in,
                .stride = stride,
                .ldy = w->out,
                .num_columns = w->out - first < PANEL ? w->out - first : PANEL,
                .weight = (const char *)w->weight + i * panel_bytes(w),
                .bias = w->bias ? w->bias + first : 0,
                .values = &v,
                .scales = scales,
            };
            if (pairs) {
                if (w->bits == 4)
                    expand(p.weight, p.in, &v, 4, pairs, scales);
                else
                    expand(p.weight, p.in, &v, 8, pairs, scales);
                p.weight = pairs;
            }
            switch (pairs ? EXPANDED : w->bits) {
                case 4: rows_of_4(&p, x, y + first, num_rows); break;
                case 8: rows_of_8(&p, x, y + first, num_rows); break;
                case EXPANDED: rows_expanded(&p, x, y + first, num_rows); break;
                default: rows_of_16(&p, x, y + first, num_rows);
            }
        }
        free(scales);
    }
}

#else

int64_t linear_supported(void) { return 0; }
int64_t low_bit_supported(void) { return 0; }

void linear(const Linear *w, const uint16_t *x, int64_t stride, int64_t num_rows, uint16_t *y, int64_t num_threads) {
    (void)w, (void)x, (void)stride, (void)num_rows, (void)y, (void)num_threads;
}

#endif
