/* The real-gated linear recurrent unit (De et al. 2024, section 2.4), for each channel:
 *
 *     h <- a h + sqrt(1 - a^2) sigmoid(input_gate) x,  a = exp(decay sigmoid(gate)),  y = h
 *
 * The first token of a sequence comes in without the square root. The recurrence runs token by token, so nothing
 * depends on where a prompt was cut.
 */
#include "layout.h"
#include "vec.h"

#define MOST_CHANNELS 256 /* of a task: long enough rows for memory, and their states lie in the nearest cache */
#define LOG2_E 1.44269504088896341f

/* Rows of x and of the gates, each `*_stride` elements apart. decay [channels]. */
typedef struct {
    int64_t channels;
    const float *decay;
    const void *x, *input_gate, *gate;
    int64_t x_stride, input_gate_stride, gate_stride;
} Unit;

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp2(vmin(x * -LOG2_E, splat(126)))); }

/* Channels [c, c + n) of a row, n <= 16; h [n] moves on. */
INLINE void unit_step(const Unit *u, int64_t row, int64_t c, int64_t n, int fresh, float *h, void *out,
                      const int bf16) {
    const vf decay = LOG2_E * load_n(u->decay, c, n, 0);
    const vf x = load_n(u->x, row * u->x_stride + c, n, bf16);
    const vf gated = sigmoid(load_n(u->input_gate, row * u->input_gate_stride + c, n, bf16)) * x;
    const vf a = vexp2(decay * sigmoid(load_n(u->gate, row * u->gate_stride + c, n, bf16)));
    const vf next = fresh ? gated : a * load_n(h, 0, n, 0) + vsqrt(1.0f - a * a) * gated;
    store_n(h, 0, next, n, 0);
    store_n(out, row * u->channels + c, next, n, bf16);
}

/* num_rows tokens of the channels [c, c + n). */
INLINE void unit_rows(const Unit *u, int64_t row, int64_t num_rows, int64_t c, int64_t n, int fresh, float *h,
                      void *out, const int bf16) {
    for (int64_t t = 0; t < num_rows; t++) {
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) unit_step(u, row + t, c + i, LANES, fresh && !t, h + i, out, bf16);
        if (i < n) unit_step(u, row + t, c + i, n - i, fresh && !t, h + i, out, bf16);
    }
}

INLINE void run(const Layout *l, const Unit *u, void *out, Pool state, int64_t num_threads, const int bf16) {
    const int64_t num_blocks = (u->channels + MOST_CHANNELS - 1) / MOST_CHANNELS;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp single nowait
        clear_unused_rows(l, out, u->channels * (bf16 ? 2 : 4));
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < (l->num_chunks + l->num_decode) * num_blocks; task++) {
            const int64_t chunk = task / num_blocks, c = task % num_blocks * MOST_CHANNELS;
            const int64_t n = u->channels - c < MOST_CHANNELS ? u->channels - c : MOST_CHANNELS;
            float *slots = (float *)state.data + c;
            if (chunk >= l->num_chunks) {
                const int64_t i = chunk - l->num_chunks;
                unit_rows(u, l->decode_row + i, 1, c, n, 0, slots + l->decode_slot[i] * state.stride, out, bf16);
                continue;
            }
            float *h = slots + l->chunk_slot[chunk] * state.stride;
            for (int64_t i = 0; i < l->chunk_tiles[chunk]; i++) {
                unit_rows(u, row_of(l, chunk, i), tokens_in(l, chunk, i), c, n, l->chunk_fresh[chunk] && !i, h, out,
                          bf16);
                for (int64_t x = 0; x < l->num_captures; x++)
                    if (l->capture_chunk[x] == chunk && l->capture_tiles[x] == i + 1)
                        memcpy(slots + l->capture_slot[x] * state.stride, h, (size_t)n * sizeof *h);
            }
        }
    }
}

/* out [num_rows, channels] is contiguous. */
void rg_lru(const Layout *l, const Unit *u, void *out, float *state, int64_t state_stride, int64_t num_threads,
            int64_t bf16) {
    const Pool states = {state, state_stride};
    if (bf16)
        run(l, u, out, states, num_threads, 1);
    else
        run(l, u, out, states, num_threads, 0);
}
