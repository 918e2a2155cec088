/* Lightning attention (Qin et al. 2024): h <- exp(g) h + v k^T, y = h q, with one g for each head and all tokens.
 *
 * The tile of tile.h as it is, with w = v. Threads share (chunk, head) and (decode row, head), so no sum depends on
 * their number.
 */
#include "tile.h"

/* A thread's memory. */
typedef struct {
    int64_t np, pp;
    float *operands;     /* [np + 64, pp]: h, then v */
    float *coefficients; /* see coefficients_size */
    float *q, *k;        /* [64, np] */
    float *k_columns;    /* [np, 64], at last decayed to the end of the tile */
    float *keep;         /* [np]: the decay of the whole tile */
    float *products;     /* [64, 64] */
    float *y;            /* [64, pp] */
} Work;

/* -> the floats used of `memory`. */
static int64_t divide(const Heads *m, float *memory, Work *w) {
    float *next = memory;
    const int64_t np = w->np = ROUND_UP(m->d_state), pp = w->pp = ROUND_UP(m->head_dim);
    w->operands = take(&next, (np + TILE) * pp);
    w->coefficients = take(&next, coefficients_size(np, pp));
    w->q = take(&next, TILE * np);
    w->k = take(&next, TILE * np);
    w->k_columns = take(&next, np * TILE);
    w->keep = take(&next, np);
    w->products = take(&next, TILE * TILE);
    w->y = take(&next, TILE * pp);
    return next - memory;
}

/* Floats of scratch memory. */
int64_t linear_attention_scratch(const Heads *m, int64_t num_threads) {
    Work w;
    return num_threads * divide(m, 0, &w);
}

/* All tiles of a chunk for one head. */
INLINE void chunk_head(const Layout *l, const Heads *m, const Work *w, const Pool *state, int64_t chunk, int64_t h,
                       void *out, const int bf16) {
    const int64_t np = w->np, pp = w->pp, inner = m->num_heads * m->head_dim, pairs = HAVE_PAIRS && bf16;
    float decay[TILE], *own = head_state(m, state, l->chunk_slot[chunk], h);
    load_state(l->chunk_fresh[chunk] ? 0 : own, m->head_dim, m->d_state, w->operands);
    for (int64_t i = 0; i < l->chunk_tiles[chunk]; i++) {
        const int64_t row = row_of(l, chunk, i), num_tokens = tokens_in(l, chunk, i);
        load_tile(&m->q, row, h, num_tokens, m->d_state, w->q, bf16);
        load_tile(&m->k, row, h, num_tokens, m->d_state, w->k, bf16);
        load_tile(&m->v, row, h, num_tokens, m->head_dim, w->operands + np * pp, bf16);
        tile_decay(&m->g, row, h, num_tokens, decay);
        transpose(w->k, np, TILE, np, w->k_columns, TILE);
        tile_products(w->q, w->k_columns, np, num_tokens, w->products);
        tile_coefficients(w->q, w->products, 0, decay, np, num_tokens, w->coefficients, pairs);
        tile_output(w->coefficients, w->operands, np, pp, num_tokens, w->y, pairs);
        store_tile(w->y, pp, num_tokens, m->head_dim, out, row * inner + h * m->head_dim, inner, bf16);
        tile_to_end(decay, np, w->k_columns, w->keep);
        tile_advance(w->operands, w->keep, w->k_columns, np, pp, num_tokens);
        for (int64_t c = 0; c < l->num_captures; c++)
            if (l->capture_chunk[c] == chunk && l->capture_tiles[c] == i + 1)
                save_state(w->operands, m->head_dim, m->d_state, w->coefficients,
                           head_state(m, state, l->capture_slot[c], h));
    }
    save_state(w->operands, m->head_dim, m->d_state, w->coefficients, own);
}

INLINE void step_head(const Layout *l, const Heads *m, const Work *w, const Pool *state, int64_t i, int64_t h,
                      void *out, const int bf16) {
    const int64_t row = l->decode_row + i;
    const vf decay = vexp(splat(one_value(&m->g, row, h)));
    load_row(&m->q, row, h, m->d_state, w->q, bf16);
    load_row(&m->k, row, h, m->d_state, w->k, bf16);
    load_row(&m->v, row, h, m->head_dim, w->operands, bf16);
    step_state(w->k, w->q, w->operands, 1, decay[0], 0, m->head_dim, m->d_state,
               head_state(m, state, l->decode_slot[i], h), w->y);
    store_tile(w->y, w->pp, 1, m->head_dim, out, (row * m->num_heads + h) * m->head_dim, 0, bf16);
}

INLINE void run(const Layout *l, const Heads *m, void *out, Pool state, float *scratch, int64_t num_threads,
                const int bf16) {
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
            chunk_head(l, m, &w, &state, task / m->num_heads, task % m->num_heads, out, bf16);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < l->num_decode * m->num_heads; task++)
            step_head(l, m, &w, &state, task / m->num_heads, task % m->num_heads, out, bf16);
    }
}

/* out [num_rows, num_heads * head_dim] is contiguous. g has a value for each head. */
void linear_attention(const Layout *l, const Heads *m, void *out, float *state, int64_t state_stride, float *scratch,
                      int64_t num_threads, int64_t bf16) {
    const Pool states = {state, state_stride};
    if (bf16)
        run(l, m, out, states, scratch, num_threads, 1);
    else
        run(l, m, out, states, scratch, num_threads, 0);
}
