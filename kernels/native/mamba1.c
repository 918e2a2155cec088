/* Mamba-1: depthwise convolution, and the selective scan of Gu and Dao 2023.
 *
 * The scan is the plain recurrence, token by token, for sixteen channels at a time; nothing depends on where a prompt
 * was cut.
 */
#include "conv.h"
#include "layout.h"
#include "vec.h"

INLINE void convolve(const Layout *l, const void *x, int64_t stride, int64_t channels, int64_t width, const float *taps,
                     const float *bias, void *out, Pool conv, int64_t num_threads, int bf16) {
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < l->num_rows; r++)
            if (!row_is_token(l, r))
                memset(at_mut(out, r * channels, bf16), 0, (size_t)channels * (bf16 ? 2 : 4));
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < l->num_tiles; tile++) {
            const int64_t chunk = chunk_of(l, tile), i = tile - l->chunk_tile[chunk], n = tokens_in(l, chunk, i);
            const Signal s = chunk_signal(l, chunk, x, stride, &conv, channels, width, bf16);
            float y[TILE * LANES];
            for (int64_t c = 0; c < channels; c += LANES) {
                conv_columns(&s, taps, bias, i * TILE, n, c, channels - c, y, LANES, bf16);
                for (int64_t t = 0; t < n; t++)
                    store_n(out, (row_of(l, chunk, i) + t) * channels + c, load_f32(y + t * LANES), channels - c, bf16);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < l->num_decode; i++) {
            const Signal s = decode_signal(l, i, x, stride, &conv, channels, width, bf16);
            float y[LANES];
            for (int64_t c = 0; c < channels; c += LANES) {
                conv_columns(&s, taps, bias, 0, 1, c, channels - c, y, LANES, bf16);
                store_n(out, (l->decode_row + i) * channels + c, load_f32(y), channels - c, bf16);
            }
        }
#pragma omp single
        save_windows(l, x, stride, &conv, channels, width, bf16);
    }
}

/* taps [width, channels] and bias [channels] float32; rows of x `stride` elements apart; out is contiguous. */
void causal_conv(const Layout *l, const void *x, int64_t stride, int64_t channels, int64_t width, const float *taps,
                 const float *bias, void *out, void *conv, int64_t conv_stride, int64_t num_threads, int64_t bf16) {
    const Pool windows = {conv, conv_stride};
    if (bf16)
        convolve(l, x, stride, channels, width, taps, bias, out, windows, num_threads, 1);
    else
        convolve(l, x, stride, channels, width, taps, bias, out, windows, num_threads, 0);
}

/* Rows of x, dt, B, C, z, each `*_stride` elements apart. A [channels, d_state]. */
typedef struct {
    int64_t channels, d_state;
    const float *A, *D, *dt_bias;
    const void *x, *dt, *B, *C, *z;
    int64_t x_stride, dt_stride, b_stride, c_stride, z_stride;
} Scan;

/* Sixteen channels from c on, up to 64 rows from `row` on. h [16, d_state] moves on. `work`: B, C [64, np]. */
INLINE void scan_block(const Scan *s, int64_t row, int64_t num_rows, int64_t c, float *h, const float *work, void *out,
                       int bf16, const int64_t num_vectors) {
    const int64_t n = s->channels - c < LANES ? s->channels - c : LANES, np = ROUND_UP(s->d_state);
    const float *B = work, *C = work + TILE * np;
    float u[TILE * LANES], dt[TILE * LANES], dtu[TILE * LANES], y[TILE * LANES] = {0};
    const vf bias = load_n(s->dt_bias, c, n, 0), D = load_n(s->D, c, n, 0);
    for (int64_t t = 0; t < num_rows; t++) {
        vf x = load_n(s->x, (row + t) * s->x_stride + c, n, bf16);
        vf step = vsoftplus(load_n(s->dt, (row + t) * s->dt_stride + c, n, bf16) + bias);
        store_f32(u + t * LANES, x);
        store_f32(dt + t * LANES, step);
        store_f32(dtu + t * LANES, step * x);
    }
    for (int64_t i = 0; i < n; i++) {
        const float *A = s->A + (c + i) * s->d_state;
        float *mine = h + i * s->d_state;
        for (int64_t j = 0; j < num_vectors; j++) {
            const int64_t size = s->d_state - j * LANES;
            const vf a = load_n(A, j * LANES, size, 0);
            vf state = load_n(mine, j * LANES, size, 0);
            for (int64_t t = 0; t < num_rows; t++) {
                const float *b = B + t * np + j * LANES;
                state = vexp(dt[t * LANES + i] * a) * state + dtu[t * LANES + i] * load_f32(b);
                const float part = sum(state * load_f32(C + t * np + j * LANES));
                y[t * LANES + i] = j ? y[t * LANES + i] + part : part;
            }
            store_n(mine, j * LANES, state, size, 0);
        }
    }
    for (int64_t t = 0; t < num_rows; t++) {
        vf skip = load_f32(y + t * LANES) + D * load_f32(u + t * LANES);
        vf gated = skip * vsilu(load_n(s->z, (row + t) * s->z_stride + c, n, bf16));
        store_n(out, (row + t) * s->channels + c, gated, n, bf16);
    }
}

INLINE void widen_bc(const Scan *s, int64_t row, int64_t num_rows, float *work, int bf16) {
    const int64_t np = ROUND_UP(s->d_state);
    for (int64_t t = 0; t < num_rows; t++)
        for (int64_t i = 0; i < s->d_state; i += LANES) {
            const int64_t n = s->d_state - i;
            store_f32(work + t * np + i, load_n(s->B, (row + t) * s->b_stride + i, n, bf16));
            store_f32(work + (TILE + t) * np + i, load_n(s->C, (row + t) * s->c_stride + i, n, bf16));
        }
}

INLINE void scan_rows(const Scan *s, int64_t row, int64_t num_rows, int64_t c, float *h, const float *work, void *out,
                      int bf16) {
    if (s->d_state == LANES)
        scan_block(s, row, num_rows, c, h, work, out, bf16, 1);
    else
        scan_block(s, row, num_rows, c, h, work, out, bf16, ROUND_UP(s->d_state) / LANES);
}

/* Floats of scratch memory: B and C of each tile and of each decode row. */
int64_t mamba1_scratch(const Layout *l, int64_t d_state) {
    return (l->num_tiles + l->num_decode) * 2 * TILE * ROUND_UP(d_state);
}

INLINE void run(const Layout *l, const Scan *s, void *out, Pool state, float *scratch, int64_t num_threads, int bf16) {
    const int64_t size = 2 * TILE * ROUND_UP(s->d_state), first = l->decode_row;
    const int64_t num_blocks = ROUND_UP(s->channels) / LANES;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < l->num_rows; r++)
            if (!row_is_token(l, r))
                memset(at_mut(out, r * s->channels, bf16), 0, (size_t)s->channels * (bf16 ? 2 : 4));
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < l->num_tiles; tile++) {
            const int64_t chunk = chunk_of(l, tile), i = tile - l->chunk_tile[chunk];
            widen_bc(s, row_of(l, chunk, i), tokens_in(l, chunk, i), scratch + tile * size, bf16);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < l->num_decode; i++)
            widen_bc(s, first + i, 1, scratch + (l->num_tiles + i) * size, bf16);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < l->num_chunks * num_blocks; task++) {
            const int64_t chunk = task / num_blocks, c = task % num_blocks * LANES;
            float *to = (float *)state.data + l->chunk_slot[chunk] * state.stride + c * s->d_state;
            const size_t num_bytes =
                (size_t)((s->channels - c < LANES ? s->channels - c : LANES) * s->d_state) * sizeof *to;
            if (l->chunk_fresh[chunk]) memset(to, 0, num_bytes);
            for (int64_t i = 0; i < l->chunk_tiles[chunk]; i++) {
                const float *work = scratch + (l->chunk_tile[chunk] + i) * size;
                scan_rows(s, row_of(l, chunk, i), tokens_in(l, chunk, i), c, to, work, out, bf16);
                for (int64_t x = 0; x < l->num_captures; x++)
                    if (l->capture_chunk[x] == chunk && l->capture_tiles[x] == i + 1)
                        memcpy((float *)state.data + l->capture_slot[x] * state.stride + c * s->d_state, to, num_bytes);
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < l->num_decode * num_blocks; task++) {
            const int64_t i = task / num_blocks, c = task % num_blocks * LANES;
            float *to = (float *)state.data + l->decode_slot[i] * state.stride + c * s->d_state;
            scan_rows(s, first + i, 1, c, to, scratch + (l->num_tiles + i) * size, out, bf16);
        }
    }
}

/* out [num_rows, channels] is contiguous. */
void mamba1_scan(const Layout *l, const Scan *s, void *out, float *state, int64_t state_stride, float *scratch,
                 int64_t num_threads, int64_t bf16) {
    const Pool states = {state, state_stride};
    if (bf16)
        run(l, s, out, states, scratch, num_threads, 1);
    else
        run(l, s, out, states, scratch, num_threads, 0);
}
