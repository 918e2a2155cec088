/* Mamba-2 between its two projections (Dao and Gu 2024): convolution, scan, skip, gate, norm.
 *
 * Prefill runs the state-space dual form in tiles of 64 rows. In a tile, with l[t] the sum of dt A over rows 0 .. t and h
 * the state before the tile, for each head
 *
 *     y[t] = sum over s <= t of (C[t] . B[s]) exp(l[t] - l[s]) dt[s] x[s]  +  exp(l[t]) C[t] h
 *     h   <- exp(l[63]) h + sum over s of B[s] (exp(l[63] - l[s]) dt[s] x[s])
 *
 * For bfloat16 rows, and where the CPU can, y is summed over pairs of bfloat16, as the authors' own kernels do; what
 * becomes of h stays in float32.
 *
 * A padding row has dt = 0, x = B = C = 0 and changes nothing. Decode rows run the recurrence.
 *
 * Without an output the gate z is not there either, and of y nothing is computed: only h moves on.
 *
 * Three phases with a barrier between them: what heads share (B, C, C.B, dt), heads, rows. Threads split each phase by
 * tile and group, by head, by row, so no sum depends on their number.
 */
#include "calls.h"
#include "conv.h"
#include "tile.h"

/* Sizes, and where things lie in the scratch memory; all in floats. np, pp, hp: rounded up to 16. */
typedef struct {
    int64_t inner, channels, lead, row_width, np, pp, hp, innerp, channelsp; /* lead: values of the gate in a row */
    float *tiles;    /* for each tile: see below */
    float *threads;  /* for each thread: coefficients [64, np + 64], operands [np + 64, pp], weighted [64, pp] */
    float *steps;    /* for each decode row: conv output [channelsp], dt [hp], decay [hp] */
    float *y;        /* [num_rows, innerp] */
    int64_t tile_size, coefficients_size, thread_size, step_size;
    int64_t at_c, at_cb, at_dt, at_log; /* in a tile: B [G, 64, np], C [G, 64, np], C.B [G, 64, 64], dt, l [hp, 64] */
} Scratch;

static Scratch lay_out(const Layout *l, const Mamba2 *w, int64_t num_threads, float *scratch) {
    Scratch p;
    p.inner = w->num_heads * w->head_dim;
    p.channels = p.inner + 2 * w->num_groups * w->d_state;
    p.lead = p.inner;
    p.row_width = p.lead + p.channels + w->num_heads;
    p.np = ROUND_UP(w->d_state);
    p.pp = ROUND_UP(w->head_dim);
    p.hp = ROUND_UP(w->num_heads);
    p.innerp = ROUND_UP(p.inner);
    p.channelsp = ROUND_UP(p.channels);
    p.at_c = w->num_groups * TILE * p.np;
    p.at_cb = 2 * p.at_c;
    p.at_dt = p.at_cb + w->num_groups * TILE * TILE;
    p.at_log = p.at_dt + p.hp * TILE;
    p.tile_size = p.at_log + p.hp * TILE;
    p.coefficients_size = coefficients_size(p.np, p.pp);
    p.thread_size = p.coefficients_size + (p.np + TILE) * p.pp + TILE * p.pp;
    p.step_size = p.channelsp + 2 * p.hp;
    p.tiles = scratch;
    p.threads = p.tiles + l->num_tiles * p.tile_size;
    p.steps = p.threads + num_threads * p.thread_size;
    p.y = p.steps + l->num_decode * p.step_size;
    return p;
}

/* Floats of scratch memory that `mamba2` needs. */
int64_t mamba2_scratch(const Layout *l, const Mamba2 *w, int64_t num_threads) {
    Scratch p = lay_out(l, w, num_threads, 0);
    return l->num_tiles * p.tile_size + num_threads * p.thread_size + l->num_decode * p.step_size +
           l->num_rows * p.innerp;
}

INLINE vf clamped_dt(const Mamba2 *w, const void *dt, int64_t i, int64_t h, int64_t n, int bf16) {
    vf y = vsoftplus(load_n(dt, i, n, bf16) + load_n(w->dt_bias, h, n, 0));
    return vmin(vmax(y, splat(w->dt_min)), splat(w->dt_max));
}

/* dt A of each row -> [num_rows, num_heads] */
void mamba2_log_decay(const Mamba2 *w, const void *rows, int64_t num_rows, int64_t row_width, float *log_decay,
                      int64_t bf16) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t h = 0; h < w->num_heads; h += LANES) {
            const int64_t n = w->num_heads - h, from = (r + 1) * row_width - w->num_heads;
            store_n(log_decay, r * w->num_heads + h, clamped_dt(w, rows, from + h, h, n, bf16) * load_n(w->A, h, n, 0), n,
                    0);
        }
}

/* dt and l of a tile, transposed to [head, row]. `dt` points at the first row's dt. */
INLINE void tile_dt(const Mamba2 *w, const Scratch *p, const void *dt, int64_t num_tokens, float *tile, int bf16) {
    for (int64_t h = 0; h < w->num_heads; h += LANES) {
        const int64_t n = w->num_heads - h < LANES ? w->num_heads - h : LANES;
        vf A = load_n(w->A, h, n, 0), l = splat(0);
        for (int64_t t = 0; t < TILE; t++) {
            vf d = t < num_tokens ? clamped_dt(w, dt, t * p->row_width + h, h, n, bf16) : splat(0);
            l += d * A;
            for (int64_t i = 0; i < n; i++) {
                tile[p->at_dt + (h + i) * TILE + t] = d[i];
                tile[p->at_log + (h + i) * TILE + t] = l[i];
            }
        }
    }
}

/* Convolved columns [c, c + size) of a tile -> out [64, ldo], zero in padding rows. */
INLINE void tile_conv(const Signal *s, const Mamba2 *w, int64_t first, int64_t num_tokens, int64_t c, int64_t size,
                      float *out, int64_t ldo, int bf16) {
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t n = size - i < LANES ? size - i : LANES;
        conv_columns(s, w->taps, w->bias, first, num_tokens, c + i, n, out + i, ldo, 1, bf16);
    }
    memset(out + num_tokens * ldo, 0, (size_t)((TILE - num_tokens) * ldo) * sizeof *out);
}

/* B, C and C.B of one group in a tile. */
INLINE void tile_group(const Signal *s, const Mamba2 *w, const Scratch *p, int64_t first, int64_t num_tokens, int64_t g,
                       float *tile, float *b_transposed, int bf16) {
    float *B = tile + g * TILE * p->np, *C = tile + p->at_c + g * TILE * p->np;
    float *cb = tile + p->at_cb + g * TILE * TILE;
    const int64_t c = p->inner + g * w->d_state;
    tile_conv(s, w, first, num_tokens, c, w->d_state, B, p->np, bf16);
    if (!p->lead) return;
    tile_conv(s, w, first, num_tokens, c + w->num_groups * w->d_state, w->d_state, C, p->np, bf16);
    transpose(B, p->np, TILE, p->np, b_transposed, TILE);
    tile_products(C, b_transposed, p->np, num_tokens, cb);
}

/* One head of one tile: x (in operands from row np on) -> y rows. */
INLINE void tile_y(const Mamba2 *w, const Scratch *p, const float *tile, int64_t h, float *coefficients,
                   const float *operands, float *weighted, int64_t num_tokens, float *y, const int pairs) {
    const int64_t g = h / (w->num_heads / w->num_groups), pp = p->pp;
    const float *C = tile + p->at_c + g * TILE * p->np, *x = operands + p->np * pp;
    const float *dt = tile + p->at_dt + h * TILE, *l = tile + p->at_log + h * TILE;
    tile_coefficients(C, tile + p->at_cb + g * TILE * TILE, dt, l, p->np, num_tokens, coefficients, pairs);
    tile_output(coefficients, operands, p->np, pp, num_tokens, weighted, pairs);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = 0; i < w->head_dim; i += LANES) {
            vf with_skip = load_f32(weighted + t * pp + i) + w->D[h] * load_f32(x + t * pp + i);
            store_n(y + t * p->innerp + h * w->head_dim, i, with_skip, w->head_dim - i, 0);
        }
}

/* One head of one tile: h (operands, rows 0 .. np - 1) moves on by x (from row np on). */
INLINE void tile_h(const Mamba2 *w, const Scratch *p, const float *tile, int64_t h, float *operands, float *weighted,
                   int64_t num_tokens) {
    const int64_t g = h / (w->num_heads / w->num_groups), pp = p->pp;
    const float *B = tile + g * TILE * p->np, *x = operands + p->np * pp;
    const float *dt = tile + p->at_dt + h * TILE, *l = tile + p->at_log + h * TILE;
    float to_end[TILE], keep[4];
    for (int s = 0; s < TILE; s += LANES)
        store_f32(to_end + s, vexp(l[TILE - 1] - load_f32(l + s)) * load_f32(dt + s));
    const vf all = vexp(splat(l[TILE - 1]));
    for (int i = 0; i < 4; i++) keep[i] = all[0];
    for (int64_t s = 0; s < num_tokens; s++)
        for (int64_t i = 0; i < pp; i += LANES) store_f32(weighted + s * pp + i, to_end[s] * load_f32(x + s * pp + i));
    for (int64_t n = 0; n < p->np; n += 4)
        block4(operands + n * pp, pp, keep, B + n, 1, p->np, weighted, pp, num_tokens, pp);
}

INLINE float *state_of(const Mamba2 *w, const Pool *state, int64_t slot, int64_t h) {
    return (float *)state->data + slot * state->stride + h * w->head_dim * w->d_state;
}

/* All tiles of a chunk for one head. */
INLINE void chunk_head(const Layout *l, const Mamba2 *w, const Scratch *p, const void *rows, const Pool *conv,
                       const Pool *state, int64_t chunk, int64_t h, float *mine, int bf16) {
    float *coefficients = mine, *operands = coefficients + p->coefficients_size;
    float *weighted = operands + (p->np + TILE) * p->pp;
    const Signal s = chunk_signal(l, chunk, at(rows, p->lead, bf16), p->row_width, conv, p->channels, w->width, bf16);
    float *own = state_of(w, state, l->chunk_slot[chunk], h);
    load_state(l->chunk_fresh[chunk] ? 0 : own, w->head_dim, w->d_state, operands);
    for (int64_t i = 0; i < l->chunk_tiles[chunk]; i++) {
        const int64_t tile = l->chunk_tile[chunk] + i, first = tokens_before(l, chunk, i), n = tokens_in(l, chunk, i);
        tile_conv(&s, w, first, n, h * w->head_dim, w->head_dim, operands + p->np * p->pp, p->pp, bf16);
        const float *shared = p->tiles + tile * p->tile_size;
        if (p->lead)
            tile_y(w, p, shared, h, coefficients, operands, weighted, n,
                   p->y + (l->chunk_row[chunk] + first) * p->innerp, HAVE_PAIRS && bf16);
        tile_h(w, p, shared, h, operands, weighted, n);
        for (int64_t c = 0; c < l->num_captures; c++)
            if (l->capture_chunk[c] == chunk && l->capture_tiles[c] == i + 1)
                save_state(operands, w->head_dim, w->d_state, coefficients, state_of(w, state, l->capture_slot[c], h));
    }
    save_state(operands, w->head_dim, w->d_state, coefficients, own);
}

/* Convolution, dt and decay of a decode row. */
INLINE void step_inputs(const Layout *l, const Mamba2 *w, const Scratch *p, const void *rows, const Pool *conv, int64_t i,
                        int bf16) {
    float *mine = p->steps + i * p->step_size, *dt = mine + p->channelsp, *decay = dt + p->hp;
    const Signal s = decode_signal(l, i, at(rows, p->lead, bf16), p->row_width, conv, p->channels, w->width, bf16);
    for (int64_t c = 0; c < p->channels; c += LANES)
        conv_columns(&s, w->taps, w->bias, 0, 1, c, p->channels - c, mine + c, 0, 1, bf16);
    const void *dt_in = at(s.rows, p->channels, bf16);
    for (int64_t h = 0; h < w->num_heads; h += LANES) {
        const int64_t n = w->num_heads - h < LANES ? w->num_heads - h : LANES;
        vf d = clamped_dt(w, dt_in, h, h, n, bf16);
        store_f32(dt + h, d);
        store_f32(decay + h, vexp(d * load_n(w->A, h, n, 0)));
    }
}

static void step_head(const Layout *l, const Mamba2 *w, const Scratch *p, const Pool *state, int64_t i, int64_t h) {
    const float *mine = p->steps + i * p->step_size, *dt = mine + p->channelsp, *decay = dt + p->hp;
    const int64_t N = w->d_state, P = w->head_dim, g = h / (w->num_heads / w->num_groups);
    const float *x = mine + h * P, *B = mine + p->inner + g * N, *C = B + w->num_groups * N;
    float *to = state_of(w, state, l->decode_slot[i], h);
    float *y = p->y + (l->decode_row + i) * p->innerp + h * P;
    step_state(B, C, x, dt[h], decay[h], w->D[h], P, N, to, y);
}

/* out = y * silu(z) for one row. */
INLINE void gate(const Scratch *p, const float *y, const void *z, void *out, int bf16) {
    for (int64_t i = 0; i < p->inner; i += LANES) {
        const int64_t n = p->inner - i;
        store_n(out, i, load_n(y, i, n, 0) * vsilu(load_n(z, i, n, bf16)), n, bf16);
    }
}

/* out = norm(y) * weight * silu(z) for one row. */
INLINE void norm_gate(const Mamba2 *w, const Scratch *p, const float *y, const void *z, void *out, int bf16) {
    const int64_t size = w->norm_group;
    for (int64_t start = 0; start < p->inner; start += size) {
        vf squares = splat(0);
        for (int64_t i = 0; i < size; i += LANES) {
            vf v = load_n(y, start + i, size - i, 0);
            squares += v * v;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + w->norm_eps);
        for (int64_t i = 0; i < size; i += LANES) {
            vf v = load_n(y, start + i, size - i, 0) * scale * load_n(w->norm, start + i, size - i, 0);
            store_n(out, start + i, v * vsilu(load_n(z, start + i, size - i, bf16)), size - i, bf16);
        }
    }
}

/* out = norm(y * silu(z)) * weight for one row. */
INLINE void gate_norm(const Mamba2 *w, const Scratch *p, float *y, const void *z, void *out, int bf16) {
    const int64_t size = w->norm_group;
    for (int64_t start = 0; start < p->inner; start += size) {
        vf squares = splat(0);
        for (int64_t i = 0; i < size; i += LANES) {
            vf gated = load_n(y, start + i, size - i, 0) * vsilu(load_n(z, start + i, size - i, bf16));
            squares += gated * gated;
            store_n(y, start + i, gated, size - i, 0);
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + w->norm_eps);
        for (int64_t i = 0; i < size; i += LANES) {
            vf v = load_n(y, start + i, size - i, 0) * scale * load_n(w->norm, start + i, size - i, 0);
            store_n(out, start + i, v, size - i, bf16);
        }
    }
}

INLINE void run(const Layout *l, const Mamba2 *w, const void *rows, void *out, Pool conv, Pool state, float *scratch,
                int64_t num_threads, int bf16) {
    Scratch layout = lay_out(l, w, num_threads, scratch);
    const Scratch *p = &layout;
    if (!out) layout.lead = 0, layout.row_width -= layout.inner;
    const int64_t num_groups = w->num_groups, tasks = l->num_tiles * (num_groups + 1), num_gated = out ? l->num_rows : 0;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
        float *mine = p->threads + THREAD() * p->thread_size;
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t tile = task / (num_groups + 1), g = task % (num_groups + 1);
            const int64_t chunk = chunk_of(l, tile), i = tile - l->chunk_tile[chunk], n = tokens_in(l, chunk, i);
            const int64_t first = tokens_before(l, chunk, i);
            const Signal s =
                chunk_signal(l, chunk, at(rows, p->lead, bf16), p->row_width, &conv, p->channels, w->width, bf16);
            float *to = p->tiles + tile * p->tile_size;
            if (g < num_groups)
                tile_group(&s, w, p, first, n, g, to, mine, bf16);
            else
                tile_dt(w, p, at(s.rows, first * p->row_width + p->channels, bf16), n, to, bf16);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < l->num_decode; i++) step_inputs(l, w, p, rows, &conv, i, bf16);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < l->num_chunks * w->num_heads; task++)
            chunk_head(l, w, p, rows, &conv, &state, task / w->num_heads, task % w->num_heads, mine, bf16);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < l->num_decode * w->num_heads; task++)
            step_head(l, w, p, &state, task / w->num_heads, task % w->num_heads);
#pragma omp single nowait
        save_windows(l, at(rows, p->lead, bf16), p->row_width, &conv, p->channels, w->width, bf16);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_gated; r++) {
            void *to = at_mut(out, r * p->inner, bf16);
            float *y = p->y + r * p->innerp;
            const void *z = at(rows, r * p->row_width, bf16);
            if (!row_is_token(l, r))
                memset(to, 0, (size_t)p->inner * (bf16 ? 2 : 4));
            else if (!w->norm)
                gate(p, y, z, to, bf16);
            else if (w->norm_first)
                norm_gate(w, p, y, z, to, bf16);
            else
                gate_norm(w, p, y, z, to, bf16);
        }
    }
}

/* rows [num_rows, row_width] and out [num_rows, inner] are contiguous; without `out` rows have no z. */
void mamba2(const Layout *l, const Mamba2 *w, const void *rows, void *out, void *conv, int64_t conv_stride,
            float *state, int64_t state_stride, float *scratch, int64_t num_threads, int64_t bf16) {
    const Pool windows = {conv, conv_stride}, states = {state, state_stride};
    if (bf16)
        run(l, w, rows, out, windows, states, scratch, num_threads, 1);
    else
        run(l, w, rows, out, windows, states, scratch, num_threads, 0);
}
