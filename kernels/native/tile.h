/* What the recurrences of a state [head_dim, d_state] share: Mamba-2, lightning attention, the delta rules.
 *
 * A tile of 64 rows runs as products of matrices (the state-space dual form of Dao and Gu 2024). The state lies
 * transposed, h [np, pp], and below it what each row writes, w [64, pp]: together the operands [np + 64, pp]. With
 * l[t] the sum of the logarithms of the decays of rows 0 .. t, and h the state before the tile,
 *
 *     y[t] = exp(l[t]) q[t] h  +  sum over s <= t of (q[t] . k[s]) exp(l[t] - l[s]) w[s]
 *     h   <- exp(l[63]) h  +  sum over s of exp(l[63] - l[s]) k[s] w[s]
 *
 * The factors of y are the coefficients [64, np + 64]. For bfloat16 rows, and where the CPU can, y is summed over pairs
 * of bfloat16, as the authors' own kernels do; what becomes of h stays in float32. np, pp: rounded up to 16.
 */
#ifndef HYBRID_CACHE_TILE_H
#define HYBRID_CACHE_TILE_H

#include "layout.h"
#include "pairs.h"
#include "vec.h"

/* A row argument with heads: rows `row` and heads `head` elements apart. */
typedef struct {
    const void *data;
    int64_t row, head;
} Rows;

/* Queries and keys have num_groups heads, the others num_heads. g and beta are float32; who has no beta ignores it. */
typedef struct {
    int64_t num_heads, num_groups, head_dim, d_state;
    Rows q, k, v, g, beta;
} Heads;

/* The next `size` floats of a thread's memory. */
INLINE float *take(float **memory, int64_t size) {
    float *mine = *memory;
    *memory += size;
    return mine;
}

/* One head of a row -> ROUND_UP(size) floats. */
INLINE void load_row(const Rows *x, int64_t row, int64_t head, int64_t size, float *out, int bf16) {
    for (int64_t i = 0; i < size; i += LANES)
        store_f32(out + i, load_n(x->data, row * x->row + head * x->head + i, size - i, bf16));
}

/* One head of a tile -> [64, ROUND_UP(size)], zeros from num_tokens on. */
INLINE void load_tile(const Rows *x, int64_t row, int64_t head, int64_t num_tokens, int64_t size, float *out,
                      int bf16) {
    const int64_t width = ROUND_UP(size);
    for (int64_t t = 0; t < num_tokens; t++) load_row(x, row + t, head, size, out + t * width, bf16);
    memset(out + num_tokens * width, 0, (size_t)((TILE - num_tokens) * width) * sizeof *out);
}

INLINE float one_value(const Rows *x, int64_t row, int64_t head) {
    return ((const float *)x->data)[row * x->row + head * x->head];
}

/* l of a tile; the padding rows forget nothing. */
INLINE void tile_decay(const Rows *g, int64_t row, int64_t head, int64_t num_tokens, float *l) {
    float total = 0;
    for (int64_t t = 0; t < TILE; t++) {
        if (t < num_tokens) total += one_value(g, row + t, head);
        l[t] = total;
    }
}

/* products[t, s] = x[t] . k[s] for s <= t, for whole blocks of sixteen rows; x [64, np], k_columns [np, 64]. */
static inline void tile_products(const float *x, const float *k_columns, int64_t np, int64_t num_tokens,
                                 float *products) {
    for (int64_t t = 0; t < ROUND_UP(num_tokens); t += 4)
        block4(products + t * TILE, TILE, 0, x + t * np, np, 1, k_columns, TILE, np, ROUND_UP(t + 4));
}

/* coefficients[t] = [exp(l[t]) x[t] (np), products[t, s] exp(l[t] - l[s]) dt[s] for s <= t, else 0 (64)], for whole
 * blocks of sixteen rows; dt may be null: then 1. */
INLINE void tile_coefficients(const float *x, const float *products, const float *dt, const float *l, int64_t np,
                              int64_t num_tokens, void *coefficients, const int bf16) {
    const int64_t width = np + TILE;
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float decay[TILE];
    for (int i = 0; i < TILE; i += LANES) store_f32(decay + i, vexp(load_f32(l + i)));
    for (int t = 0; t < ROUND_UP(num_tokens); t++) {
        void *row = at_mut(coefficients, t * width, bf16);
        for (int64_t n = 0; n < np; n += LANES) store(row, n, decay[t] * load_f32(x + t * np + n), bf16);
        for (int s = 0; s < TILE; s += LANES) {
            if (s > t) {
                store(row, np + s, splat(0), bf16);
                continue;
            }
            vf e = vexp(vmin(l[t] - load_f32(l + s), splat(0)));
            vf m = load_f32(products + t * TILE + s) * e;
            if (dt) m *= load_f32(dt + s);
            store(row, np + s, choose(lane + s <= t, m, splat(0)), bf16);
        }
    }
}

/* Floats that hold the coefficients, and, where these are bfloat16, the operands in pairs after them. */
static inline int64_t coefficients_size(int64_t np, int64_t pp) { return (TILE > pp ? TILE : pp) * (np + TILE); }

/* num_rows rows -> half as many rows of pairs. */
INLINE void pair_rows(const float *from, int64_t num_rows, int64_t width, float *to) {
    for (int64_t r = 0; r < num_rows; r += 2)
        for (int64_t i = 0; i < width; i += LANES)
            store_f32(to + r / 2 * width + i,
                      make_pairs(load_f32(from + r * width + i), load_f32(from + (r + 1) * width + i)));
}

/* y [64, pp] = coefficients operands for the tile's tokens. Overwrites what bfloat16 coefficients leave free. */
static inline void tile_output(float *coefficients, const float *operands, int64_t np, int64_t pp, int64_t num_tokens,
                               float *y, int pairs) {
    const int64_t width = np + TILE;
    if (pairs) {
        float *paired = coefficients + TILE * width / 2;
        const int64_t read = ROUND_UP(num_tokens + BLOCK); /* the last block may be partly of padding rows */
        pair_rows(operands, np + (read < TILE ? read : TILE), pp, paired);
        for (int64_t t = 0; t < num_tokens; t += BLOCK) {
            const int64_t rows = TILE - t < BLOCK ? TILE - t : BLOCK;
            pairs_block(y + t * pp, pp, (const uint16_t *)coefficients + t * width, width, paired, pp, np + t + rows,
                        pp, rows);
        }
    } else {
        for (int64_t t = 0; t < num_tokens; t += 4)
            block4(y + t * pp, pp, 0, coefficients + t * width, width, 1, operands, pp, np + t + 4, pp);
    }
}

/* k_columns [np, 64] decay from their row to the end of the tile; keep [np] is the decay of all of it. */
static inline void tile_to_end(const float *l, int64_t np, float *k_columns, float *keep) {
    const vf all = vexp(splat(l[TILE - 1]));
    for (int64_t n = 0; n < np; n += LANES) store_f32(keep + n, all);
    for (int s = 0; s < TILE; s += LANES) {
        const vf decay = vexp(l[TILE - 1] - load_f32(l + s));
        for (int64_t n = 0; n < np; n++) {
            float *k = k_columns + n * TILE + s;
            store_f32(k, decay * load_f32(k));
        }
    }
}

/* The operands' h [np, pp] moves on: each row n by keep[n], then sum over s of k_columns[n, s] w[s]. */
static inline void tile_advance(float *operands, const float *keep, const float *k_columns, int64_t np, int64_t pp,
                                int64_t num_tokens) {
    for (int64_t n = 0; n < np; n += 4)
        block4(operands + n * pp, pp, keep + n, k_columns + n * TILE, TILE, 1, operands + np * pp, pp, num_tokens, pp);
}

/* One head of a tile's y [64, pp] -> its place in rows of `inner` values. */
INLINE void store_tile(const float *y, int64_t pp, int64_t num_tokens, int64_t size, void *out, int64_t first,
                       int64_t inner, int bf16) {
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = 0; i < size; i += LANES)
            store_n(out, first + t * inner + i, load_f32(y + t * pp + i), size - i, bf16);
}

INLINE float *head_state(const Heads *m, const Pool *state, int64_t slot, int64_t head) {
    return (float *)state->data + slot * state->stride + head * m->head_dim * m->d_state;
}

/* from [head_dim, d_state] -> h [np, pp]; zeros if `from` is null. */
static inline void load_state(const float *from, int64_t head_dim, int64_t d_state, float *h) {
    const int64_t np = ROUND_UP(d_state), pp = ROUND_UP(head_dim);
    memset(h, 0, (size_t)(np * pp) * sizeof *h);
    if (from) transpose(from, d_state, head_dim, d_state, h, pp);
}

/* h [np, pp] -> to [head_dim, d_state]; `transposed` has room for pp * np. */
static inline void save_state(const float *h, int64_t head_dim, int64_t d_state, float *transposed, float *to) {
    const int64_t np = ROUND_UP(d_state), pp = ROUND_UP(head_dim);
    transpose(h, pp, np, pp, transposed, np);
    for (int64_t i = 0; i < head_dim; i++) memcpy(to + i * d_state, transposed + i * np, (size_t)d_state * sizeof *to);
}

/* h = decay h + dt x k, y = h q + D x, over d_state = 16 nv values, or any number if nv = 0. */
INLINE void step_rows(const float *k, const float *q, const float *x, float dt, float decay, float D, int64_t head_dim,
                      int64_t d_state, float *h, float *y, const int nv) {
    const int64_t num_vectors = nv ? nv : ROUND_UP(d_state) / LANES;
    for (int64_t i = 0; i < head_dim; i++, h += d_state) {
        const float dtx = dt * x[i];
        vf total = splat(0);
        for (int64_t j = 0; j < num_vectors; j++) {
            const int64_t n = nv ? LANES : d_state - j * LANES;
            vf write = load_n(k, j * LANES, n, 0), read = load_n(q, j * LANES, n, 0);
            vf next = decay * load_n(h, j * LANES, n, 0) + dtx * write;
            store_n(h, j * LANES, next, n, 0);
            total += next * read;
        }
        y[i] = sum(total) + D * x[i];
    }
}

/* One token of one head. */
static inline void step_state(const float *k, const float *q, const float *x, float dt, float decay, float D,
                              int64_t head_dim, int64_t d_state, float *h, float *y) {
    switch (d_state) {
        case 16: step_rows(k, q, x, dt, decay, D, head_dim, d_state, h, y, 1); break;
        case 64: step_rows(k, q, x, dt, decay, D, head_dim, d_state, h, y, 4); break;
        case 128: step_rows(k, q, x, dt, decay, D, head_dim, d_state, h, y, 8); break;
        case 256: step_rows(k, q, x, dt, decay, D, head_dim, d_state, h, y, 16); break;
        default: step_rows(k, q, x, dt, decay, D, head_dim, d_state, h, y, 0);
    }
}

#endif
