/* Mamba-1: depthwise convolution, and the selective scan of Gu and Dao 2023.
 *
 * The scan is the plain recurrence, token by token, so nothing depends on where a prompt was cut. Sixteen channels lie
 * side by side, for sixteen columns of the state at a time: sums over the state need no sum across lanes. Nearly all of
 * the time goes into the exponentials.
 */
#include "conv.h"
#include "layout.h"
#include "vec.h"

INLINE void convolve(const Layout *l, const void *x, int64_t stride, int64_t channels, int64_t width, const float *taps,
                     const float *bias, void *out, Pool conv, int64_t num_threads, int bf16) {
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single nowait
        clear_unused_rows(l, out, channels * (bf16 ? 2 : 4));
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

/* Rows of x, dt, B, C, z, each `*_stride` elements apart. A [np, channels], in powers of two: A / ln 2. */
typedef struct {
    int64_t channels, d_state;
    const float *A, *D, *dt_bias;
    const void *x, *dt, *B, *C, *z;
    int64_t x_stride, dt_stride, b_stride, c_stride, z_stride;
} Scan;

/* Columns [j, j + 16) of the state of n channels from c on, over the rows of `dt`; adds to y. */
INLINE void scan_columns(const Scan *s, int64_t num_rows, int64_t c, int64_t n, int64_t j, const float *dt,
                         const float *dtu, const float *B, const float *C, float *h, float *y) {
    const int64_t np = ROUND_UP(s->d_state), size = s->d_state - j;
    float columns[LANES * LANES] = {0};
    vf A[LANES], state[LANES];
    transpose16(h, j, s->d_state, n, size, columns, LANES, 0);
    for (int k = 0; k < LANES; k++) {
        A[k] = load_n(s->A, (j + k) * s->channels + c, n, 0);
        state[k] = load_f32(columns + k * LANES);
    }
    for (int64_t t = 0; t < num_rows; t++) {
        const vf step = load_f32(dt + t * LANES), write = load_f32(dtu + t * LANES);
        vf total = load_f32(y + t * LANES);
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) {
            state[k] = vexp2(step * A[k]) * state[k] + write * B[t * np + j + k];
            total += state[k] * C[t * np + j + k];
        }
        store_f32(y + t * LANES, total);
    }
    float rows[LANES * LANES];
    for (int k = 0; k < LANES; k++) store_f32(columns + k * LANES, state[k]);
    transpose16(columns, 0, LANES, LANES, LANES, rows, LANES, 0);
    for (int64_t i = 0; i < n; i++) store_n(h, i * s->d_state + j, load_f32(rows + i * LANES), size, 0);
}

/* Sixteen channels from c on, up to 64 rows from `row` on. h [16, d_state] moves on. `work`: B, C [64, np]. */
INLINE void scan_rows(const Scan *s, int64_t row, int64_t num_rows, int64_t c, float *h, const float *work, void *out,
                      int bf16) {
    const int64_t n = s->channels - c < LANES ? s->channels - c : LANES, np = ROUND_UP(s->d_state);
    float u[TILE * LANES], dt[TILE * LANES], dtu[TILE * LANES], y[TILE * LANES];
    const vf bias = load_n(s->dt_bias, c, n, 0), D = load_n(s->D, c, n, 0);
    for (int64_t t = 0; t < num_rows; t++) {
        vf x = load_n(s->x, (row + t) * s->x_stride + c, n, bf16);
        vf step = vsoftplus(load_n(s->dt, (row + t) * s->dt_stride + c, n, bf16) + bias);
        store_f32(u + t * LANES, x);
        store_f32(dt + t * LANES, step);
        store_f32(dtu + t * LANES, step * x);
        store_f32(y + t * LANES, splat(0));
    }
    for (int64_t j = 0; j < np; j += LANES) scan_columns(s, num_rows, c, n, j, dt, dtu, work, work + TILE * np, h, y);
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

/* Floats of scratch memory: B and C of each tile and of each decode row. */
int64_t mamba1_scratch(const Layout *l, int64_t d_state) {
    return (l->num_tiles + l->num_decode) * 2 * TILE * ROUND_UP(d_state);
}

INLINE void run(const Layout *l, const Scan *s, void *out, Pool state, float *scratch, int64_t num_threads, int bf16) {
    const int64_t size = 2 * TILE * ROUND_UP(s->d_state), first = l->decode_row;
    const int64_t num_blocks = ROUND_UP(s->channels) / LANES;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single nowait
        clear_unused_rows(l, out, s->channels * (bf16 ? 2 : 4));
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
