/* Mamba-1: depthwise convolution, and the selective scan of Gu and Dao 2023.
 *
 * The scan is the plain recurrence, token by token, so nothing depends on where a prompt was cut. Sixteen channels lie
 * side by side, for sixteen columns of the state at a time: sums over the state need no sum across lanes. Nearly all of
 * the time goes into the exponentials.
 */
#include "conv.h"
#include "layout.h"
#include "vec.h"

#define MOST_CHANNELS 128 /* of a task */

INLINE void convolve(const Layout *l, const void *x, int64_t stride, int64_t channels, int64_t width, const float *taps,
                     const float *bias, void *out, Pool conv, int64_t num_threads, int activation, int bf16) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp single nowait
        clear_unused_rows(l, out, channels * (bf16 ? 2 : 4));
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < l->num_tiles; tile++) {
            const int64_t chunk = chunk_of(l, tile), i = tile - l->chunk_tile[chunk], n = tokens_in(l, chunk, i);
            const int64_t first = tokens_before(l, chunk, i), row = l->chunk_row[chunk] + first;
            const Signal s = chunk_signal(l, chunk, x, stride, &conv, channels, width, bf16);
            float y[TILE * LANES];
            for (int64_t c = 0; c < channels; c += LANES) {
                conv_columns(&s, taps, bias, first, n, c, channels - c, y, LANES, activation, bf16);
                for (int64_t t = 0; t < n; t++)
                    store_n(out, (row + t) * channels + c, load_f32(y + t * LANES), channels - c, bf16);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < l->num_decode; i++) {
            const Signal s = decode_signal(l, i, x, stride, &conv, channels, width, bf16);
            float y[LANES];
            for (int64_t c = 0; c < channels; c += LANES) {
                conv_columns(&s, taps, bias, 0, 1, c, channels - c, y, LANES, activation, bf16);
                store_n(out, (l->decode_row + i) * channels + c, load_f32(y), channels - c, bf16);
            }
        }
#pragma omp single
        save_windows(l, x, stride, &conv, channels, width, bf16);
    }
}

/* taps [width, channels] and bias [channels] float32; rows of x `stride` elements apart; out is contiguous. */
void causal_conv(const Layout *l, const void *x, int64_t stride, int64_t channels, int64_t width, const float *taps,
                 const float *bias, void *out, void *conv, int64_t conv_stride, int64_t num_threads, int64_t activation,
                 int64_t bf16) {
    const Pool windows = {conv, conv_stride};
    if (bf16)
        convolve(l, x, stride, channels, width, taps, bias, out, windows, num_threads, activation != 0, 1);
    else
        convolve(l, x, stride, channels, width, taps, bias, out, windows, num_threads, activation != 0, 0);
}

/* Rows of x, dt, B, C, z, each `*_stride` elements apart. A [blocks of 16 channels, np, 16] is divided by ln 2. */
typedef struct {
    int64_t channels, d_state;
    const float *A, *D, *dt_bias;
    const void *x, *dt, *B, *C, *z;
    int64_t x_stride, dt_stride, b_stride, c_stride, z_stride;
} Scan;

/* What a token of sixteen channels brings along; `h` sums up C h. */
typedef struct {
    vf x, dt, dt_x, h;
} Token;

/* Columns [j, j + 16) of the state of n channels. A [16, 16], B and C [num_rows, np]. */
INLINE void scan_columns(const Scan *s, int64_t num_rows, int64_t n, int64_t j, const float *A, const float *B,
                         const float *C, float *h, Token *tokens) {
    const int64_t np = ROUND_UP(s->d_state), size = s->d_state - j;
    float transposed[LANES * LANES] = {0};
    vf columns[LANES];
    transpose16(h, j, s->d_state, n, size, transposed, LANES, 0);
    for (int k = 0; k < LANES; k++) columns[k] = load_f32(transposed + k * LANES);
    for (int64_t t = 0; t < num_rows; t++) {
        const vf dt = tokens[t].dt, dt_x = tokens[t].dt_x;
        vf total = tokens[t].h;
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) {
            columns[k] = vexp2(dt * load_f32(A + k * LANES)) * columns[k] + dt_x * B[t * np + k];
            total += columns[k] * C[t * np + k];
        }
        tokens[t].h = total;
    }
    for (int k = 0; k < LANES; k++) store_f32(transposed + k * LANES, columns[k]);
    float rows[LANES * LANES];
    transpose16(transposed, 0, LANES, LANES, LANES, rows, LANES, 0);
    for (int64_t i = 0; i < n; i++) store_n(h, i * s->d_state + j, load_f32(rows + i * LANES), size, 0);
}

/* Channels [c, c + n), n <= 16, up to 64 rows from `row` on. h [n, d_state] moves on. `work`: B, C [64, np]. */
INLINE void scan_rows(const Scan *s, int64_t row, int64_t num_rows, int64_t c, int64_t n, float *h, const float *work,
                      void *out, const int bf16) {
    const int64_t np = ROUND_UP(s->d_state);
    const vf bias = load_n(s->dt_bias, c, n, 0), D = load_n(s->D, c, n, 0);
    Token tokens[TILE];
    for (int64_t t = 0; t < num_rows; t++) {
        const vf x = load_n(s->x, (row + t) * s->x_stride + c, n, bf16);
        const vf dt = vsoftplus(load_n(s->dt, (row + t) * s->dt_stride + c, n, bf16) + bias);
        tokens[t] = (Token){x, dt, dt * x, splat(0)};
    }
    for (int64_t j = 0; j < np; j += LANES)
        scan_columns(s, num_rows, n, j, s->A + c * np + j * LANES, work + j, work + TILE * np + j, h, tokens);
    for (int64_t t = 0; t < num_rows; t++) {
        const vf y = tokens[t].h + D * tokens[t].x;
        const vf gate = vsilu(load_n(s->z, (row + t) * s->z_stride + c, n, bf16));
        store_n(out, (row + t) * s->channels + c, y * gate, n, bf16);
    }
}

/* The same for any number of channels. */
INLINE void scan_block(const Scan *s, int64_t row, int64_t num_rows, int64_t c, int64_t n, float *h, const float *work,
                       void *out, const int bf16) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        scan_rows(s, row, num_rows, c + i, LANES, h + i * s->d_state, work, out, bf16);
    if (i < n) scan_rows(s, row, num_rows, c + i, n - i, h + i * s->d_state, work, out, bf16);
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
    const int64_t num_blocks = (s->channels + MOST_CHANNELS - 1) / MOST_CHANNELS;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
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
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (l->num_chunks + l->num_decode) * num_blocks; task++) {
            const int64_t chunk = task / num_blocks, c = task % num_blocks * MOST_CHANNELS;
            const int64_t n = s->channels - c < MOST_CHANNELS ? s->channels - c : MOST_CHANNELS;
            float *slots = (float *)state.data + c * s->d_state;
            if (chunk >= l->num_chunks) {
                const int64_t i = chunk - l->num_chunks;
                scan_block(s, first + i, 1, c, n, slots + l->decode_slot[i] * state.stride,
                           scratch + (l->num_tiles + i) * size, out, bf16);
                continue;
            }
            float *h = slots + l->chunk_slot[chunk] * state.stride;
            const size_t num_bytes = (size_t)(n * s->d_state) * sizeof *h;
            if (l->chunk_fresh[chunk]) memset(h, 0, num_bytes);
            for (int64_t i = 0; i < l->chunk_tiles[chunk]; i++) {
                const float *work = scratch + (l->chunk_tile[chunk] + i) * size;
                scan_block(s, row_of(l, chunk, i), tokens_in(l, chunk, i), c, n, h, work, out, bf16);
                for (int64_t x = 0; x < l->num_captures; x++)
                    if (l->capture_chunk[x] == chunk && l->capture_tiles[x] == i + 1)
                        memcpy(slots + l->capture_slot[x] * state.stride, h, num_bytes);
            }
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
