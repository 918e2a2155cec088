/* Causal attention over pages of 64 tokens, with the online softmax of FlashAttention (Dao et al. 2022).
 *
 * The pages of a sequence are always taken in order, one at a time, so a row's sums do not depend on the batch. Rows of
 * a page that hold no token yet are read as zeros.
 */
#include "layout.h"
#include "vec.h"

typedef struct {
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t q_stride, k_stride, v_stride; /* elements from one row to the next; heads are contiguous in a row */
    float scale;
    void *keys, *values;                    /* [pages, 64, num_kv_heads, head_dim] */
    int64_t key_page_size, value_page_size; /* elements from one page to the next */
} Attention;

/* Scratch of one thread, in floats; dp is head_dim rounded up to 16.
 * keys [dp, 64] transposed, values [64, dp], scores [64, 64]; then for each head of a group: queries [64, dp],
 * result [64, dp], highest [64], total [64]. */
static int64_t thread_size(const Attention *a) {
    const int64_t dp = ROUND_UP(a->head_dim), group = a->num_heads / a->num_kv_heads;
    return 2 * TILE * dp + TILE * TILE + group * (2 * TILE * dp + 2 * TILE);
}

int64_t attention_scratch(const Attention *a, int64_t num_threads) { return num_threads * thread_size(a); }

INLINE void write_row(const Attention *a, int64_t target, const void *k, const void *v, int bf16) {
    const int64_t page = target / TILE, row = target % TILE, size = a->num_kv_heads * a->head_dim;
    const size_t num_bytes = (size_t)size * (bf16 ? 2 : 4);
    memcpy(at_mut(a->keys, page * a->key_page_size + row * size, bf16), k, num_bytes);
    memcpy(at_mut(a->values, page * a->value_page_size + row * size, bf16), v, num_bytes);
}

/* num_tokens rows of a page, zeros behind -> keys transposed, values, both float32. */
INLINE void read_page(const Attention *a, int64_t page, int64_t kv_head, int64_t num_tokens, float *keys, float *values,
                      int bf16) {
    const int64_t d = a->head_dim, dp = ROUND_UP(d), row = a->num_kv_heads * d;
    const int64_t k = page * a->key_page_size + kv_head * d, v = page * a->value_page_size + kv_head * d;
    memset(values, 0, (size_t)(TILE * dp) * sizeof *values);
    for (int64_t t = 0; t < TILE; t += LANES)
        for (int64_t i = 0; i < d; i += LANES)
            transpose16(a->keys, k + t * row + i, row, num_tokens - t, d - i, keys + i * TILE + t, TILE, bf16);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = 0; i < d; i += LANES)
            store_f32(values + t * dp + i, load_n(a->values, v + t * row + i, d - i, bf16));
}

/* scores [64] of one row -> weights exp(scale * score - highest); -> what to multiply earlier results with. */
static float soften(float *scores, float scale, int64_t num_visible, float *highest, float *total) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf hidden = splat(-__builtin_inff());
    vf s[4], most = hidden, weights = splat(0);
    for (int j = 0; j < 4; j++) {
        s[j] = choose(lane + LANES * j < (int32_t)num_visible, scale * load_f32(scores + LANES * j), hidden);
        most = vmax(most, s[j]);
    }
    const float now = largest(most), before = *highest;
    *highest = now > before ? now : before;
    for (int j = 0; j < 4; j++) {
        vf p = vexp(s[j] - *highest);
        store_f32(scores + LANES * j, p);
        weights += p;
    }
    const vf keep = vexp(splat(before - *highest));
    *total = keep[0] * *total + sum(weights);
    return keep[0];
}

/* How a tile multiplies: in float32, or, for bfloat16 rows where the CPU can, in pairs of bfloat16. Then the weights
 * are rounded to bfloat16 before they meet V, as in FlashAttention; scores and sums stay float32. Both forms take
 * keys [d, 64] and values [64, dp], or half as many rows of pairs. */
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define PAIRS(a, bf16) ((bf16) && (a)->head_dim % 2 == 0)

INLINE void pairs_rows4(float *out, int64_t ldo, const float *keep, const uint16_t *a, int64_t lda, const float *x,
                        int64_t ldx, int64_t num_pairs, const int nv) {
    __m512 acc[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < nv; j++)
            acc[i][j] = (__m512)(keep ? keep[i] * load_f32(out + i * ldo + LANES * j) : splat(0));
    for (int64_t k = 0; k < num_pairs; k++) {
        __m512bh b[4];
        for (int j = 0; j < nv; j++) {
            b[j] = (__m512bh)load_f32(x + k * ldx + LANES * j);
            IN_REGISTER(b[j]);
        }
        for (int i = 0; i < 4; i++) {
            int32_t pair;
            memcpy(&pair, a + i * lda + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < nv; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], both, b[j]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < nv; j++) store_f32(out + i * ldo + LANES * j, (vf)acc[i][j]);
}

INLINE void pairs_block4(float *out, int64_t ldo, const float *keep, const uint16_t *a, int64_t lda, const float *x,
                         int64_t ldx, int64_t num_pairs, int64_t width) {
    int64_t col = 0;
    for (; col + 64 <= width; col += 64) pairs_rows4(out + col, ldo, keep, a, lda, x + col, ldx, num_pairs, 4);
    for (; col + 16 <= width; col += 16) pairs_rows4(out + col, ldo, keep, a, lda, x + col, ldx, num_pairs, 1);
}

static void read_page_pairs(const Attention *a, int64_t page, int64_t kv_head, int64_t num_tokens, float *keys,
                            float *values) {
    const int64_t d = a->head_dim, dp = ROUND_UP(d), row = a->num_kv_heads * d;
    const void *k = at(a->keys, page * a->key_page_size + kv_head * d, 1);
    const void *v = at(a->values, page * a->value_page_size + kv_head * d, 1);
    for (int64_t t = 0; t < TILE; t += LANES)
        for (int64_t i = 0; i < d / 2; i += LANES)
            transpose16(k, t * row / 2 + i, row / 2, num_tokens - t, d / 2 - i, keys + i * TILE + t, TILE, 0);
    for (int64_t t = 0; t < TILE; t += 2)
        for (int64_t i = 0; i < d; i += LANES) {
            const vf even = t < num_tokens ? load_n(v, t * row + i, d - i, 1) : splat(0);
            const vf odd = t + 1 < num_tokens ? load_n(v, (t + 1) * row + i, d - i, 1) : splat(0);
            store_f32(values + t / 2 * dp + i, (vf)((vu)even >> 16 | (vu)odd));
        }
}

/* Four rows of weights [4, 64] times values. */
static void mix_pairs(float *result, int64_t dp, const float *keep, const float *weights, const float *values,
                      int64_t num_tokens) {
    uint16_t rounded[4 * TILE];
    for (int i = 0; i < 4 * TILE; i += LANES) store(rounded, i, load_f32(weights + i), 1);
    pairs_block4(result, dp, keep, rounded, TILE, values, dp, num_tokens / 2, dp);
}
#else
#define PAIRS(a, bf16) 0
#define pairs_block4(out, ldo, keep, a, ...) (void)(a)
#define read_page_pairs(...) (void)0
#define mix_pairs(...) (void)0
#endif

/* One tile of queries for the heads that share a kv head. */
INLINE void attend_tile(const Attention *a, const void *q, void *out, const int64_t *pages, int64_t num_pages,
                        int64_t num_tokens, int64_t kv_head, float *mine, int bf16) {
    const int64_t d = a->head_dim, dp = ROUND_UP(d), group = a->num_heads / a->num_kv_heads;
    const int pairs = PAIRS(a, bf16);
    float *keys = mine, *values = keys + TILE * dp, *scores = values + TILE * dp, *heads = scores + TILE * TILE;
    const int64_t head_size = 2 * TILE * dp + 2 * TILE;
    for (int64_t g = 0; g < group; g++) {
        float *queries = heads + g * head_size, *highest = queries + 2 * TILE * dp;
        const int64_t column = (kv_head * group + g) * d;
        memset(queries, 0, (size_t)head_size * sizeof *queries);
        for (int t = 0; t < TILE; t++) highest[t] = -__builtin_inff();
        for (int64_t t = 0; t < num_tokens && !pairs; t++)
            for (int64_t i = 0; i < d; i += LANES)
                store_f32(queries + t * dp + i, load_n(q, t * a->q_stride + column + i, d - i, bf16));
    }
    for (int64_t page = 0; page < num_pages; page++) {
        const int last = page == num_pages - 1;
        if (pairs)
            read_page_pairs(a, pages[page], kv_head, last ? num_tokens : TILE, keys, values);
        else
            read_page(a, pages[page], kv_head, last ? num_tokens : TILE, keys, values, bf16);
        for (int64_t g = 0; g < group; g++) {
            float *queries = heads + g * head_size, *result = queries + TILE * dp;
            float *highest = result + TILE * dp, *total = highest + TILE;
            const uint16_t *raw = at(q, (kv_head * group + g) * d, 1);
            for (int64_t t = 0; t < num_tokens; t += 4) {
                float keep[4];
                if (pairs)
                    pairs_block4(scores, TILE, 0, raw + t * a->q_stride, a->q_stride, keys, TILE, d / 2, TILE);
                else
                    block4(scores, TILE, 0, queries + t * dp, dp, 1, keys, TILE, d, TILE);
                for (int i = 0; i < 4; i++)
                    keep[i] =
                        soften(scores + i * TILE, a->scale, last ? t + i + 1 : TILE, highest + t + i, total + t + i);
                if (pairs)
                    mix_pairs(result + t * dp, dp, keep, scores, values, last ? t + 4 : TILE);
                else
                    block4(result + t * dp, dp, keep, scores, TILE, 1, values, dp, last ? t + 4 : TILE, dp);
            }
        }
    }
    for (int64_t g = 0; g < group; g++) {
        const float *result = heads + g * head_size + TILE * dp, *total = result + TILE * dp + TILE;
        const int64_t column = (kv_head * group + g) * d, row = a->num_heads * d;
        for (int64_t t = 0; t < num_tokens; t++)
            for (int64_t i = 0; i < d; i += LANES)
                store_n(out, t * row + column + i, load_f32(result + t * dp + i) / total[t], d - i, bf16);
    }
}

/* Up to four heads that share a kv head, with one query each. For each head `mine` holds query [dp], result [dp],
 * scores [64], highest, total. num_heads, and mostly d, are constants after inlining. */
#define MAX_HEADS 4
#define MAX_VECTORS 4

INLINE void score_page(const Attention *a, int64_t page, int64_t kv_head, int64_t num_tokens, float *mine,
                       int64_t head_size, int bf16, const int num_heads, const int64_t d) {
    const int64_t row = a->num_kv_heads * d, first = page * a->key_page_size + kv_head * d;
    float *scores = mine + 2 * ROUND_UP(d);
    for (int64_t start = 0; start < num_tokens; start += LANES) {
        vf dots[MAX_HEADS][LANES];
#pragma GCC unroll 1
        for (int64_t t = 0; t < LANES; t++) {
            const int64_t token = start + t < num_tokens ? start + t : start;
            for (int h = 0; h < num_heads; h++) dots[h][t] = splat(0);
            for (int64_t i = 0; i < d; i += LANES) {
                const vf k = load_n(a->keys, first + token * row + i, d - i, bf16);
                for (int h = 0; h < num_heads; h++) dots[h][t] += load_f32(mine + h * head_size + i) * k;
            }
        }
        for (int h = 0; h < num_heads; h++) store_f32(scores + h * head_size + start, sums16(dots[h]));
    }
}

/* Columns [c, c + 16 nv) of the results. */
INLINE void gather_values(const Attention *a, int64_t page, int64_t kv_head, int64_t num_tokens, float *mine,
                          int64_t head_size, const float *keep, int bf16, const int num_heads, const int64_t d,
                          int64_t c, const int nv) {
    const int64_t row = a->num_kv_heads * d, first = page * a->value_page_size + kv_head * d + c;
    const float *scores = mine + 2 * ROUND_UP(d);
    float *result = mine + ROUND_UP(d) + c;
    vf total[MAX_HEADS][MAX_VECTORS];
    for (int h = 0; h < num_heads; h++)
        for (int j = 0; j < nv; j++) total[h][j] = keep[h] * load_f32(result + h * head_size + LANES * j);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int j = 0; j < nv; j++) {
            const vf v = load_n(a->values, first + t * row + LANES * j, d - c - LANES * j, bf16);
            for (int h = 0; h < num_heads; h++) total[h][j] += scores[h * head_size + t] * v;
        }
    for (int h = 0; h < num_heads; h++)
        for (int j = 0; j < nv; j++) store_f32(result + h * head_size + LANES * j, total[h][j]);
}

INLINE void attend_token(const Attention *a, const void *q, void *out, const int64_t *pages, int64_t length,
                         int64_t kv_head, int64_t first_head, float *mine, int bf16, const int num_heads,
                         const int64_t d) {
    const int64_t dp = ROUND_UP(d), head_size = 2 * dp + TILE + 2;
    memset(mine, 0, (size_t)(num_heads * head_size) * sizeof *mine);
    for (int h = 0; h < num_heads; h++) {
        float *query = mine + h * head_size;
        query[2 * dp + TILE] = -__builtin_inff();
        for (int64_t i = 0; i < d; i += LANES)
            store_f32(query + i, a->scale * load_n(q, (first_head + h) * d + i, d - i, bf16));
    }
    for (int64_t start = 0; start < length; start += TILE, pages++) {
        const int64_t n = length - start < TILE ? length - start : TILE;
        float keep[MAX_HEADS];
        score_page(a, *pages, kv_head, n, mine, head_size, bf16, num_heads, d);
        for (int h = 0; h < num_heads; h++) {
            float *scores = mine + h * head_size + 2 * dp;
            keep[h] = soften(scores, 1.0f, n, scores + TILE, scores + TILE + 1);
        }
        int64_t c = 0;
        for (; c + 64 <= dp; c += 64)
            gather_values(a, *pages, kv_head, n, mine, head_size, keep, bf16, num_heads, d, c, 4);
        for (; c < dp; c += LANES)
            gather_values(a, *pages, kv_head, n, mine, head_size, keep, bf16, num_heads, d, c, 1);
    }
    for (int h = 0; h < num_heads; h++) {
        const float *result = mine + h * head_size + dp, total = result[dp + TILE + 1];
        for (int64_t i = 0; i < d; i += LANES)
            store_n(out, (first_head + h) * d + i, load_f32(result + i) / total, d - i, bf16);
    }
}

#define HEADS(n)                                                                                      \
    case n:                                                                                           \
        attend_token(a, q, out, pages, length, kv_head, head, mine, bf16, n, d);                      \
        break

/* All heads that share a kv head, where d is a constant. */
INLINE void attend_group(const Attention *a, const void *q, void *out, const int64_t *pages, int64_t length,
                         int64_t kv_head, float *mine, int bf16, const int64_t d) {
    const int64_t group = a->num_heads / a->num_kv_heads;
    for (int64_t done = 0; done < group; done += MAX_HEADS) {
        const int64_t head = kv_head * group + done;
        switch (group - done) {
            HEADS(1);
            HEADS(2);
            HEADS(3);
            default: attend_token(a, q, out, pages, length, kv_head, head, mine, bf16, MAX_HEADS, d);
        }
    }
}

INLINE void run(const Layout *l, const Attention *a, const void *q, const void *k, const void *v, void *out,
                float *scratch, int64_t num_threads, int bf16) {
    const int64_t row = a->num_heads * a->head_dim, first = l->num_tiles * TILE, group = a->num_heads / a->num_kv_heads;
#pragma omp parallel num_threads(num_threads)
    {
        float *mine = scratch + THREAD() * thread_size(a);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < l->num_rows; r++) {
            if (l->kv_rows[r] >= 0)
                write_row(a, l->kv_rows[r], at(k, r * a->k_stride, bf16), at(v, r * a->v_stride, bf16), bf16);
            if (!row_is_token(l, r)) memset(at_mut(out, r * row, bf16), 0, (size_t)row * (bf16 ? 2 : 4));
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < l->num_tiles * a->num_kv_heads; task++) {
            const int64_t tile = l->num_tiles - 1 - task / a->num_kv_heads, c = chunk_of(l, tile);
            const int64_t i = tile - l->chunk_tile[c];
            attend_tile(a, at(q, tile * TILE * a->q_stride, bf16), at_mut(out, tile * TILE * row, bf16),
                        l->page_table + c * l->max_pages, l->chunk_start[c] / TILE + i + 1, tokens_in(l, c, i),
                        task % a->num_kv_heads, mine, bf16);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < l->num_decode * a->num_kv_heads; task++) {
            const int64_t i = task / a->num_kv_heads, kv_head = task % a->num_kv_heads;
            const void *query = at(q, (first + i) * a->q_stride, bf16);
            void *to = at_mut(out, (first + i) * row, bf16);
            const int64_t *pages = l->page_table + (l->num_chunks + i) * l->max_pages;
            if (a->head_dim == 64)
                attend_group(a, query, to, pages, l->decode_len[i], kv_head, mine, bf16, 64);
            else if (a->head_dim == 128)
                attend_group(a, query, to, pages, l->decode_len[i], kv_head, mine, bf16, 128);
            else
                for (int64_t h = 0; h < group; h++)
                    attend_token(a, query, to, pages, l->decode_len[i], kv_head, kv_head * group + h, mine, bf16, 1,
                                 a->head_dim);
        }
    }
}

/* out [num_rows, num_heads, head_dim] is contiguous. */
void attention(const Layout *l, const Attention *a, const void *q, const void *k, const void *v, void *out,
               float *scratch, int64_t num_threads, int64_t bf16) {
    if (bf16)
        run(l, a, q, k, v, out, scratch, num_threads, 1);
    else
        run(l, a, q, k, v, out, scratch, num_threads, 0);
}
