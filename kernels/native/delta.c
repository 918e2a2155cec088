/* The gated delta rule (Yang et al. 2024) and Kimi delta attention (Kimi Team 2025): one decay for a head's state, or
 * one for each of its columns.
 *
 *     h <- h exp(g),  h <- h + beta (v - h k) k^T,  y = h q
 *
 * What a token writes, w = beta (v - h k), depends on what the earlier tokens of its tile wrote. With k' = -beta k,
 * and k' . k[s] and k' h decayed as q . k[s] and q h are in tile.h,
 *
 *     w[t] = beta v[t] + k'[t] h + sum over s < t of (k'[t] . k[s]) w[s]
 *
 * so w comes from the corrections [64, np + 64], made of k' as the coefficients are made of q, by forward
 * substitution in blocks of sixteen rows. All but y is float32.
 *
 * Threads share (chunk, head) and (decode row, head), so no sum depends on their number.
 */
#include "tile.h"

#define BLOCK_ROWS 16

/* A thread's memory, and sizes in floats. */
typedef struct {
    int64_t np, pp, width;  /* width: np + 64 */
    float *operands;        /* [width, pp]: h, then beta v, which becomes w */
    float *coefficients;    /* and the operands in pairs, see coefficients_size */
    float *corrections;     /* [64, width] */
    float *q, *k, *k_beta;  /* [64, np] */
    float *until;           /* [np, 64]: columns k[s], decayed from row s to the end */
    float *keep;            /* [np]: the decay of the whole tile */
    float *products;        /* [64, 64] */
    float *y;               /* [64, pp] */
    float *decay;           /* Kimi: logarithms [64, np] */
    float *q_far, *k_far;   /* Kimi: q and k' of a block of rows, decayed from its start [16, np] */
    float *tails;           /* Kimi: k of a block of rows, decayed to the row at hand [16, np] */
    float *since;           /* Kimi: decay from the block's start to the row at hand [np] */
} Work;

/* -> the floats used of `memory`. */
static int64_t divide(const Heads *m, float *memory, Work *w) {
    float *next = memory;
    const int64_t np = w->np = ROUND_UP(m->d_state), pp = w->pp = ROUND_UP(m->head_dim);
    w->width = np + TILE;
    w->operands = take(&next, w->width * pp);
    w->coefficients = take(&next, coefficients_size(np, pp));
    w->corrections = take(&next, TILE * w->width);
    w->q = take(&next, TILE * np);
    w->k = take(&next, TILE * np);
    w->k_beta = take(&next, TILE * np);
    w->until = take(&next, np * TILE);
    w->keep = take(&next, np);
    w->products = take(&next, TILE * TILE);
    w->y = take(&next, TILE * pp);
    w->decay = take(&next, TILE * np);
    w->q_far = take(&next, BLOCK_ROWS * np);
    w->k_far = take(&next, BLOCK_ROWS * np);
    w->tails = take(&next, BLOCK_ROWS * np);
    w->since = take(&next, np);
    return next - memory;
}

/* Floats of scratch memory. */
int64_t delta_scratch(const Heads *m, int64_t num_threads) {
    Work w;
    return num_threads * divide(m, 0, &w);
}

/* x * scale / sqrt(sum(x^2) + 1e-6) */
INLINE void make_unit(float *x, int64_t np, float scale) {
    vf squares = splat(0);
    for (int64_t n = 0; n < np; n += LANES) squares += load_f32(x + n) * load_f32(x + n);
    const float factor = scale / __builtin_sqrtf(sum(squares) + 1e-6f);
    for (int64_t n = 0; n < np; n += LANES) store_f32(x + n, factor * load_f32(x + n));
}

INLINE float query_scale(const Heads *m) { return 1.0f / __builtin_sqrtf((float)m->d_state); }

INLINE void multiply_row(float *out, const float *x, float factor, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store_f32(out + i, factor * load_f32(x + i));
}

/* q, k and k', and beta v in the operands. Everything is zero in padding rows. */
INLINE void load_inputs(const Heads *m, const Work *w, int64_t row, int64_t h, int64_t num_tokens, int bf16) {
    const int64_t np = w->np, pp = w->pp, g = h / (m->num_heads / m->num_groups);
    float *v = w->operands + np * pp;
    load_tile(&m->q, row, g, num_tokens, m->d_state, w->q, bf16);
    load_tile(&m->k, row, g, num_tokens, m->d_state, w->k, bf16);
    load_tile(&m->v, row, h, num_tokens, m->head_dim, v, bf16);
    memset(w->k_beta, 0, (size_t)(TILE * np) * sizeof *w->k_beta);
    for (int64_t t = 0; t < num_tokens; t++) {
        const float beta = one_value(&m->beta, row + t, h);
        make_unit(w->q + t * np, np, query_scale(m));
        make_unit(w->k + t * np, np, 1);
        multiply_row(w->k_beta + t * np, w->k + t * np, -beta, np);
        multiply_row(v + t * pp, v + t * pp, beta, pp);
    }
}

/* Coefficients, corrections, `until` and `keep` with one decay for all columns. */
INLINE void gated_tile(const Heads *m, const Work *w, int64_t row, int64_t h, int64_t num_tokens, const int pairs) {
    const int64_t np = w->np;
    float l[TILE];
    tile_decay(&m->g, row, h, num_tokens, l);
    transpose(w->k, np, TILE, np, w->until, TILE);
    tile_products(w->q, w->until, np, num_tokens, w->products);
    tile_coefficients(w->q, w->products, 0, l, np, num_tokens, w->coefficients, pairs);
    tile_products(w->k_beta, w->until, np, num_tokens, w->products);
    tile_coefficients(w->k_beta, w->products, 0, l, np, num_tokens, w->corrections, 0);
    tile_to_end(l, np, w->until, w->keep);
}

/* Row `first + i` against the rows of its own block: the decay grows with the row at hand, pair by pair. */
INLINE void kimi_row(const Work *w, int64_t first, int64_t i, const int pairs) {
    const int64_t np = w->np, t = first + i;
    const float *q = w->q + t * np, *k_beta = w->k_beta + t * np;
    float *decay = w->decay + t * np, *corrections = w->corrections + t * w->width;
    void *coefficients = at_mut(w->coefficients, t * w->width, pairs);
    for (int64_t n = 0; n < np; n += LANES) {
        const vf d = vexp(load_f32(decay + n));
        const vf since = i ? load_f32(w->since + n) * d : d;
        const vf q_far = since * load_f32(q + n), k_far = since * load_f32(k_beta + n), before = load_f32(w->keep + n);
        store_f32(decay + n, d);
        store_f32(w->since + n, since);
        store_f32(w->q_far + i * np + n, q_far);
        store_f32(w->k_far + i * np + n, k_far);
        store(coefficients, n, before * q_far, pairs);
        store_f32(corrections + n, before * k_far);
    }
    vf with_q[BLOCK_ROWS], with_k[BLOCK_ROWS];
    for (int64_t s = 0; s < BLOCK_ROWS; s++) with_q[s] = with_k[s] = splat(0);
    memcpy(w->tails + i * np, w->k + t * np, (size_t)np * sizeof *w->tails);
    for (int64_t s = 0; s <= i; s++) {
        float *tail = w->tails + s * np;
        for (int64_t n = 0; n < np; n += LANES) {
            vf k = load_f32(tail + n);
            if (s < i) store_f32(tail + n, k *= load_f32(decay + n));
            with_q[s] += load_f32(q + n) * k;
            with_k[s] += load_f32(k_beta + n) * k;
        }
    }
    store(coefficients, np + first, sums16(with_q), pairs);
    store_f32(corrections + np + first, sums16(with_k));
    for (int64_t s = first + BLOCK_ROWS; s < TILE; s += LANES) store(coefficients, np + s, splat(0), pairs);
}

/* The same with a decay for each column. A decay between two rows is a product of the decays from row to row, so no
 * factor is larger than one; between blocks of sixteen rows it is split where the later block starts. */
INLINE void kimi_tile(const Heads *m, const Work *w, int64_t row, int64_t h, int64_t num_tokens, const int pairs) {
    const int64_t np = w->np;
    load_tile(&m->g, row, h, num_tokens, m->d_state, w->decay, 0);
    for (int64_t n = 0; n < np; n += LANES) store_f32(w->keep + n, splat(1));
    for (int64_t first = 0; first < num_tokens; first += BLOCK_ROWS) {
        for (int64_t i = 0; i < BLOCK_ROWS; i++) kimi_row(w, first, i, pairs);
        for (int64_t i = 0; first && i < BLOCK_ROWS; i += 4) {
            float *corrections = w->corrections + (first + i) * w->width + np;
            block4(corrections, w->width, 0, w->k_far + i * np, np, 1, w->until, TILE, np, first);
            block4(w->products, TILE, 0, w->q_far + i * np, np, 1, w->until, TILE, np, first);
            for (int64_t t = 0; t < 4; t++)
                for (int64_t s = 0; s < first; s += LANES)
                    store(at_mut(w->coefficients, (first + i + t) * w->width + np, pairs), s,
                          load_f32(w->products + t * TILE + s), pairs);
        }
        for (int64_t n = 0; n < np; n++) multiply_row(w->until + n * TILE, w->until + n * TILE, w->since[n], first);
        transpose(w->tails, np, BLOCK_ROWS, np, w->until + first, TILE);
        for (int64_t n = 0; n < np; n += LANES) store_f32(w->keep + n, load_f32(w->keep + n) * load_f32(w->since + n));
    }
}

/* x[i] += sum over j < i of a[i, j] x[j] for sixteen rows and columns. */
INLINE void solve16(const float *a, int64_t lda, float *x, int64_t ldx) {
    vf rows[BLOCK_ROWS];
    for (int i = 0; i < BLOCK_ROWS; i++) rows[i] = load_f32(x + i * ldx);
#pragma GCC unroll 16
    for (int j = 0; j < BLOCK_ROWS; j++)
#pragma GCC unroll 16
        for (int i = j + 1; i < BLOCK_ROWS; i++) rows[i] += a[i * lda + j] * rows[j];
    for (int i = 0; i < BLOCK_ROWS; i++) store_f32(x + i * ldx, rows[i]);
}

/* beta v -> w */
static void solve(const Work *w, int64_t num_tokens) {
    const float one[4] = {1, 1, 1, 1};
    float *written = w->operands + w->np * w->pp;
    for (int64_t first = 0; first < num_tokens; first += BLOCK_ROWS) {
        const float *corrections = w->corrections + first * w->width;
        float *rows = written + first * w->pp;
        for (int64_t i = 0; i < BLOCK_ROWS; i += 4)
            block4(rows + i * w->pp, w->pp, one, corrections + i * w->width, w->width, 1, w->operands, w->pp,
                   w->np + first, w->pp);
        for (int64_t i = 0; i < w->pp; i += LANES) solve16(corrections + w->np + first, w->width, rows + i, w->pp);
    }
}

/* All tiles of a chunk for one head. */
INLINE void chunk_head(const Layout *l, const Heads *m, const Work *w, const Pool *state, int64_t chunk, int64_t h,
                       void *out, const int bf16, const int by_column) {
    const int64_t np = w->np, pp = w->pp, inner = m->num_heads * m->head_dim, pairs = HAVE_PAIRS && bf16;
    float *own = head_state(m, state, l->chunk_slot[chunk], h);
    load_state(l->chunk_fresh[chunk] ? 0 : own, m->head_dim, m->d_state, w->operands);
    for (int64_t i = 0; i < l->chunk_tiles[chunk]; i++) {
        const int64_t row = row_of(l, chunk, i), num_tokens = tokens_in(l, chunk, i);
        load_inputs(m, w, row, h, num_tokens, bf16);
        if (by_column)
            kimi_tile(m, w, row, h, num_tokens, pairs);
        else
            gated_tile(m, w, row, h, num_tokens, pairs);
        solve(w, num_tokens);
        tile_output(w->coefficients, w->operands, np, pp, num_tokens, w->y, pairs);
        store_tile(w->y, pp, num_tokens, m->head_dim, out, row * inner + h * m->head_dim, inner, bf16);
        tile_advance(w->operands, w->keep, w->until, np, pp, num_tokens);
        for (int64_t c = 0; c < l->num_captures; c++)
            if (l->capture_chunk[c] == chunk && l->capture_tiles[c] == i + 1)
                save_state(w->operands, m->head_dim, m->d_state, w->coefficients,
                           head_state(m, state, l->capture_slot[c], h));
    }
    save_state(w->operands, m->head_dim, m->d_state, w->coefficients, own);
}

/* One token of one head, over d_state = 16 nv values, or any number if nv = 0. decay [np] is no logarithm. */
INLINE void step_delta(const float *q, const float *k, const float *decay, const float *v, float beta,
                            int64_t head_dim, int64_t d_state, float *h, float *y, const int nv) {
    const int64_t num_vectors = nv ? nv : ROUND_UP(d_state) / LANES;
    for (int64_t i = 0; i < head_dim; i++, h += d_state) {
        vf said = splat(0), total = splat(0);
        for (int64_t j = 0; j < num_vectors; j++) {
            const int64_t n = nv ? LANES : d_state - j * LANES;
            const vf kept = load_f32(decay + j * LANES) * load_n(h, j * LANES, n, 0);
            said += kept * load_f32(k + j * LANES);
            store_n(h, j * LANES, kept, n, 0);
        }
        const float written = beta * (v[i] - sum(said));
        for (int64_t j = 0; j < num_vectors; j++) {
            const int64_t n = nv ? LANES : d_state - j * LANES;
            const vf next = load_n(h, j * LANES, n, 0) + written * load_f32(k + j * LANES);
            total += next * load_f32(q + j * LANES);
            store_n(h, j * LANES, next, n, 0);
        }
        y[i] = sum(total);
    }
}

INLINE void step_head(const Layout *l, const Heads *m, const Work *w, const Pool *state, int64_t i, int64_t h,
                      void *out, const int bf16, const int by_column) {
    const int64_t row = l->decode_row + i, g = h / (m->num_heads / m->num_groups), N = m->d_state, P = m->head_dim;
    const float beta = one_value(&m->beta, row, h);
    float *q = w->q, *k = w->k, *v = w->operands, *decay = w->decay, *to = head_state(m, state, l->decode_slot[i], h);
    load_row(&m->q, row, g, N, q, bf16);
    load_row(&m->k, row, g, N, k, bf16);
    load_row(&m->v, row, h, P, v, bf16);
    make_unit(q, w->np, query_scale(m));
    make_unit(k, w->np, 1);
    if (by_column)
        load_row(&m->g, row, h, N, decay, 0);
    else
        for (int64_t n = 0; n < w->np; n += LANES) store_f32(decay + n, splat(one_value(&m->g, row, h)));
    for (int64_t n = 0; n < w->np; n += LANES) store_f32(decay + n, vexp(load_f32(decay + n)));
    switch (N) {
        case 64: step_delta(q, k, decay, v, beta, P, N, to, w->y, 4); break;
        case 128: step_delta(q, k, decay, v, beta, P, N, to, w->y, 8); break;
        default: step_delta(q, k, decay, v, beta, P, N, to, w->y, 0);
    }
    store_tile(w->y, w->pp, 1, P, out, (row * m->num_heads + h) * P, 0, bf16);
}

INLINE void run(const Layout *l, const Heads *m, void *out, Pool state, float *scratch, int64_t num_threads,
                const int bf16, const int by_column) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
        Work w;
        const int64_t size = divide(m, 0, &w);
        divide(m, scratch + THREAD() * size, &w);
#pragma omp single nowait
        clear_unused_rows(l, out, m->num_heads * m->head_dim * (bf16 ? 2 : 4));
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < l->num_chunks * m->num_heads; task++)
            chunk_head(l, m, &w, &state, task / m->num_heads, task % m->num_heads, out, bf16, by_column);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < l->num_decode * m->num_heads; task++)
            step_head(l, m, &w, &state, task / m->num_heads, task % m->num_heads, out, bf16, by_column);
    }
}

/* out [num_rows, num_heads * head_dim] is contiguous. g has a value for each head. */
void gated_delta(const Layout *l, const Heads *m, void *out, float *state, int64_t state_stride, float *scratch,
                 int64_t num_threads, int64_t bf16) {
    const Pool states = {state, state_stride};
    if (bf16)
        run(l, m, out, states, scratch, num_threads, 1, 0);
    else
        run(l, m, out, states, scratch, num_threads, 0, 0);
}

/* The same where g has d_state values for each head. */
void kimi_delta(const Layout *l, const Heads *m, void *out, float *state, int64_t state_stride, float *scratch,
                int64_t num_threads, int64_t bf16) {
    const Pool states = {state, state_stride};
    if (bf16)
        run(l, m, out, states, scratch, num_threads, 1, 1);
    else
        run(l, m, out, states, scratch, num_threads, 0, 1);
}
