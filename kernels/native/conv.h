/* Depthwise causal convolution over a window of earlier rows and the rows of the batch. */
#ifndef HYBRID_CACHE_CONV_H
#define HYBRID_CACHE_CONV_H

#include "layout.h"
#include "vec.h"

#define MAX_WIDTH 8

/* Where the rows t - width + 1 ... of one run lie: `window` holds those before its first row (null: zeros). */
typedef struct {
    const void *window;  /* [width - 1, channels] */
    const void *rows;    /* first row of the run, `stride` elements apart */
    int64_t stride, channels, width;
} Signal;

/* Columns [c, c + n) of row t, t >= 1 - width. */
INLINE vf signal(const Signal *s, int64_t t, int64_t c, int64_t n, int bf16) {
    if (t >= 0) return load_n(s->rows, t * s->stride + c, n, bf16);
    if (!s->window) return splat(0);
    return load_n(s->window, (t + s->width - 1) * s->channels + c, n, bf16);
}

INLINE void conv_block(const Signal *s, const float *taps, const float *bias, int64_t first, int64_t num_rows,
                       int64_t c, int64_t n, float *out, int64_t ldo, int activation, int bf16,
                       const int64_t width) {
    vf w[MAX_WIDTH], x[MAX_WIDTH];
    vf offset = load_n(bias, c, n, 0);
    for (int64_t k = 0; k < width; k++) w[k] = load_n(taps, k * s->channels + c, n, 0);
    for (int64_t k = 0; k + 1 < width; k++) x[k] = signal(s, first - width + 1 + k, c, n, bf16);
    for (int64_t t = 0; t < num_rows; t++) {
        x[width - 1] = load_n(s->rows, (first + t) * s->stride + c, n, bf16);
        vf y = offset;
        for (int64_t k = 0; k < width; k++) y += w[k] * x[k];
        store_f32(out + t * ldo, activation ? vsilu(y) : y);
        for (int64_t k = 0; k + 1 < width; k++) x[k] = x[k + 1];
    }
}

/* The convolution, or its silu, of rows [first, first + num_rows), columns [c, c + min(n, 16)) -> 16 columns of out,
 * rows ldo apart. */
INLINE void conv_columns(const Signal *s, const float *taps, const float *bias, int64_t first, int64_t num_rows,
                         int64_t c, int64_t n, float *out, int64_t ldo, int activation, int bf16) {
    if (n >= LANES && s->width == 4)
        conv_block(s, taps, bias, first, num_rows, c, LANES, out, ldo, activation, bf16, 4);
    else
        conv_block(s, taps, bias, first, num_rows, c, n, out, ldo, activation, bf16, s->width);
}

/* The window after `num_tokens` rows; `to` may be the signal's own window. */
static inline void save_window(const Signal *s, int64_t num_tokens, void *to, int bf16) {
    const int64_t size = s->channels * (bf16 ? 2 : 4);
    for (int64_t k = 0; k + 1 < s->width; k++) {
        int64_t t = num_tokens - s->width + 1 + k;
        char *row = (char *)to + k * size;
        if (t >= 0)
            memcpy(row, at(s->rows, t * s->stride, bf16), size);
        else if (s->window)
            memmove(row, at(s->window, (t + s->width - 1) * s->channels, bf16), size);
        else
            memset(row, 0, size);
    }
}

INLINE Signal chunk_signal(const Layout *l, int64_t chunk, const void *x, int64_t stride, const Pool *conv,
                           int64_t channels, int64_t width, int bf16) {
    Signal s = {0, at(x, l->chunk_row[chunk] * stride, bf16), stride, channels, width};
    if (!l->chunk_fresh[chunk]) s.window = at(conv->data, l->chunk_slot[chunk] * conv->stride, bf16);
    return s;
}

INLINE Signal decode_signal(const Layout *l, int64_t i, const void *x, int64_t stride, const Pool *conv,
                            int64_t channels, int64_t width, int bf16) {
    Signal s = {at(conv->data, l->decode_slot[i] * conv->stride, bf16),
                at(x, (l->decode_row + i) * stride, bf16), stride, channels, width};
    return s;
}

/* All windows that a batch leaves behind. Call it when no window is needed any more. */
static inline void save_windows(const Layout *l, const void *x, int64_t stride, const Pool *conv, int64_t channels,
                                int64_t width, int bf16) {
    for (int64_t i = 0; i < l->num_captures; i++) {
        Signal s = chunk_signal(l, l->capture_chunk[i], x, stride, conv, channels, width, bf16);
        save_window(&s, tokens_before(l, l->capture_chunk[i], l->capture_tiles[i]),
                    at_mut(conv->data, l->capture_slot[i] * conv->stride, bf16), bf16);
    }
    for (int64_t c = 0; c < l->num_chunks; c++) {
        Signal s = chunk_signal(l, c, x, stride, conv, channels, width, bf16);
        save_window(&s, l->chunk_len[c], at_mut(conv->data, l->chunk_slot[c] * conv->stride, bf16), bf16);
    }
    for (int64_t i = 0; i < l->num_decode; i++) {
        Signal s = decode_signal(l, i, x, stride, conv, channels, width, bf16);
        save_window(&s, 1, at_mut(conv->data, l->decode_slot[i] * conv->stride, bf16), bf16);
    }
}

#endif
