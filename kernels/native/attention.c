/* Causal attention over pages of 64 tokens, with the online softmax of FlashAttention (Dao et al. 2022).
 *
 * The pages of a sequence are always taken in order, one at a time, so a row's sums do not depend on the batch. Rows of
 * a page that hold no token yet are read as zeros.
 */
#include "layout.h"
#include "pairs.h"
#include "vec.h"

#define LOG2_E 1.44269504088896341f
#define LEAST -160.0f /* 2^-160 is 0 */

typedef struct {
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t q_stride, k_stride, v_stride; /* elements from one row to the next; heads are contiguous in a row */
    int64_t window;                       /* tokens that a token sees, itself included; 0 for all */
    float scale;
    void *keys, *values;                    /* [pages, 64, num_kv_heads, head_dim] */
    int64_t key_page_size, value_page_size; /* elements from one page to the next */
} Attention;

/* One query of one head, while the pages go by. */
typedef struct {
    const void *query; /* [d], of the rows' type where pairs are multiplied, else float32 */
    float *result;     /* [dp], then the sums of weights [16] and the highest score */
} Query;

/* Of one thread: keys [dp, 64] transposed, values [64, dp], and room for as many queries as a task has. */
typedef struct {
    float *keys, *values, *floats;
    Query *queries;
} Memory;

/* Floats of one query: its result, sums and highest score, and the query itself in float32; whole cache lines. */
static int64_t query_size(const Attention *a) { return 2 * (ROUND_UP(a->head_dim) + LANES); }

static int64_t most_queries(const Layout *l, const Attention *a) {
    const int64_t rows = l->num_tiles && l->num_decode < TILE ? TILE : l->num_decode;
    return rows * (a->num_heads / a->num_kv_heads);
}

static int64_t pointers_size(const Layout *l, const Attention *a) {
    return ROUND_UP(most_queries(l, a) * (int64_t)(sizeof(Query) / sizeof(float)));
}

static int64_t thread_size(const Layout *l, const Attention *a) {
    return 2 * TILE * ROUND_UP(a->head_dim) + pointers_size(l, a) + most_queries(l, a) * query_size(a);
}

static Memory memory_of(const Layout *l, const Attention *a, float *mine) {
    float *values = mine + TILE * ROUND_UP(a->head_dim), *queries = values + TILE * ROUND_UP(a->head_dim);
    return (Memory){mine, values, queries + pointers_size(l, a), (Query *)queries};
}

int64_t attention_scratch(const Layout *l, const Attention *a, int64_t num_threads) {
    return num_threads * thread_size(l, a);
}

/* The first page that the token at `position` sees. */
static int64_t first_page(const Attention *a, int64_t position) {
    return !a->window || position < a->window ? 0 : (position + 1 - a->window) / TILE;
}

INLINE void write_row(const Attention *a, int64_t target, const void *k, const void *v, int bf16) {
    const int64_t page = target / TILE, row = target % TILE, size = a->num_kv_heads * a->head_dim;
    const size_t num_bytes = (size_t)size * (bf16 ? 2 : 4);
    memcpy(at_mut(a->keys, page * a->key_page_size + row * size, bf16), k, num_bytes);
    memcpy(at_mut(a->values, page * a->value_page_size + row * size, bf16), v, num_bytes);
}

/* num_tokens rows of a page, zeros after -> keys transposed, values, both float32. */
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

/* Tokens [first, end) of a page. */
typedef struct {
    int64_t first, end;
} Span;

/* What the last of `length` tokens sees of a page. */
static Span span_of(const Attention *a, int64_t page, int64_t length) {
    const int64_t end = length - page * TILE, first = a->window ? end - a->window : 0;
    return (Span){first > 0 ? first : 0, end < TILE ? end : TILE};
}

/* scores [64] of one query -> weights exp2(scale * score - highest), in float32 or, `pairs`, in bfloat16; -> what to
 * multiply earlier results with. scale: log2(e) times that of the scores. seen: the sums of the weights so far [16], then
 * the highest score, times scale */
INLINE float soften(const float *scores, float scale, Span span, float *seen, void *weights, const int pairs) {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf hidden = splat(-__builtin_inff());
    const int32_t first = (int32_t)span.first, end = (int32_t)span.end;
    float *highest = seen + LANES, keep = 1.0f;
    vf s[4];
    if (first >= end) { /* the window has left this page behind, or it lies ahead */
        memset(weights, 0, TILE * (pairs ? 2 : 4));
        return 1.0f;
    }
    for (int j = 0; j < 4; j++) s[j] = scale * load_f32(scores + LANES * j);
    if (first > 0 || end < TILE)
        for (int j = 0; j < 4; j++) {
            const vi token = lane + LANES * j;
            s[j] = choose((token >= first) & (token < end), s[j], hidden);
        }
    const vf most = vmax(vmax(s[0], s[1]), vmax(s[2], s[3]));
    if (any_above(most, *highest)) { /* seldom, after the first pages */
        const float now = largest(most), less = *highest - now;
        keep = vexp2(splat(less > LEAST ? less : LEAST))[0];
        *highest = now;
    }
    for (int j = 0; j < 4; j++) {
        s[j] = vexp2(vmax(s[j] - *highest, splat(LEAST)));
        store(weights, LANES * j, s[j], pairs);
    }
    store_f32(seen, keep * load_f32(seen) + ((s[0] + s[1]) + (s[2] + s[3])));
    return keep;
}

/* How a page multiplies: in float32, or, for bfloat16 rows where the CPU can, in pairs of bfloat16. Then the weights are
 * rounded to bfloat16 before they meet V, as in FlashAttention; scores and sums stay float32. Both forms take keys
 * [d, 64] and values [64, dp], or half as many rows of pairs. */
#if HAVE_PAIRS
#define PAIRS(a, bf16) ((bf16) && (a)->head_dim % 2 == 0)

/* Sixteen tokens, a row of pairs each -> [num_pairs, 64], for a multiple of four pairs. Four 128-bit parts of rows make
 * a vector, and four vectors are transposed within these parts. */
INLINE void turn16(const uint16_t *rows, int64_t stride, int64_t num_pairs, float *to) {
    for (int64_t c = 0; c < num_pairs; c += 4) {
        __m512i v[4];
        for (int i = 0; i < 4; i++) {
            const uint16_t *part = rows + i * stride + 2 * c;
            v[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)part));
            v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(part + 4 * stride)), 1);
            v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(part + 8 * stride)), 2);
            v[i] = _mm512_inserti32x4(v[i], _mm_loadu_si128((const __m128i *)(part + 12 * stride)), 3);
        }
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i d = _mm512_unpacklo_epi32(v[2], v[3]), e = _mm512_unpackhi_epi32(v[2], v[3]);
        _mm512_storeu_si512(to + (c + 0) * TILE, _mm512_unpacklo_epi64(a, d));
        _mm512_storeu_si512(to + (c + 1) * TILE, _mm512_unpackhi_epi64(a, d));
        _mm512_storeu_si512(to + (c + 2) * TILE, _mm512_unpacklo_epi64(b, e));
        _mm512_storeu_si512(to + (c + 3) * TILE, _mm512_unpackhi_epi64(b, e));
    }
}

/* A whole page, for a multiple of 32 values a head. */
INLINE void read_whole_page(const uint16_t *k, const uint16_t *v, int64_t row, int64_t d, float *keys, float *values) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t t = 0; t < TILE; t += LANES) turn16(k + t * row, row, d / 2, keys + t);
    for (int64_t t = 0; t < TILE; t += 2)
        for (int64_t i = 0; i < d; i += 32) {
            const __m512i even = _mm512_loadu_si512(v + t * row + i), odd = _mm512_loadu_si512(v + (t + 1) * row + i);
            _mm512_storeu_si512(values + t / 2 * d + i, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(values + t / 2 * d + i + LANES, _mm512_permutex2var_epi16(even, high, odd));
        }
}

static void read_page_pairs(const Attention *a, int64_t page, int64_t kv_head, int64_t num_tokens, float *keys,
                            float *values) {
    const int64_t d = a->head_dim, dp = ROUND_UP(d), row = a->num_kv_heads * d;
    const void *k = at(a->keys, page * a->key_page_size + kv_head * d, 1);
    const void *v = at(a->values, page * a->value_page_size + kv_head * d, 1);
    if (num_tokens == TILE && d == 64) return read_whole_page(k, v, row, 64, keys, values);
    if (num_tokens == TILE && d == 128) return read_whole_page(k, v, row, 128, keys, values);
    if (num_tokens == TILE && d % 32 == 0) return read_whole_page(k, v, row, d, keys, values);
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
#else
#define PAIRS(a, bf16) 0
#define read_page_pairs(...) (void)0
#endif

/* One page for up to BLOCK queries; spans[i * step] is what query i sees. `rows` and `pairs` are constants after
 * inlining; a query's sums do not depend on them. */
INLINE void attend_block(const Attention *a, const Query *q, const Span *spans, const int64_t step, const float *keys,
                         const float *values, const int pairs, const int rows) {
    const int64_t d = a->head_dim, dp = ROUND_UP(d);
    float scores[BLOCK][TILE] __attribute__((aligned(64))), keep[BLOCK], *to[BLOCK], *results[BLOCK];
    uint16_t rounded[BLOCK][TILE] __attribute__((aligned(64)));
    const void *queries[BLOCK], *weights[BLOCK];
    int64_t end = 0;
    for (int i = 0; i < rows; i++) {
        to[i] = scores[i];
        results[i] = q[i].result;
        queries[i] = q[i].query;
        weights[i] = pairs ? (const void *)rounded[i] : (const void *)scores[i];
        if (spans[i * step].end > end) end = spans[i * step].end;
    }
    multiply(to, 0, queries, keys, TILE, d, TILE, pairs, rows);
    for (int i = 0; i < rows; i++) {
        void *to_weights = pairs ? (void *)rounded[i] : (void *)scores[i];
        keep[i] = soften(scores[i], a->scale * LOG2_E, spans[i * step], q[i].result + dp, to_weights, pairs);
    }
    multiply(results, keep, weights, values, dp, end, dp, pairs, rows);
}

#define BLOCK_OF(n) \
    case n: attend_block(a, q, spans, step, keys, values, pairs, n); break

INLINE void attend_page(const Attention *a, const Query *q, const Span *spans, const int64_t step, int64_t num_queries,
                        const float *keys, const float *values, const int pairs) {
    for (; num_queries > 0; num_queries -= BLOCK, q += BLOCK, spans += BLOCK * step) {
        switch (num_queries) {
            BLOCK_OF(1);
            BLOCK_OF(2);
            BLOCK_OF(3);
            BLOCK_OF(4);
            BLOCK_OF(5);
            default: attend_block(a, q, spans, step, keys, values, pairs, BLOCK);
        }
    }
}

INLINE void read_kv(const Attention *a, int64_t page, int64_t kv_head, int64_t num_tokens, float *keys, float *values,
                    int bf16) {
    if (PAIRS(a, bf16))
        read_page_pairs(a, page, kv_head, num_tokens, keys, values);
    else
        read_page(a, page, kv_head, num_tokens, keys, values, bf16);
}

/* Asks for the rows of a page that read_kv will want. */
INLINE void prefetch_kv(const Attention *a, int64_t page, int64_t kv_head, int bf16) {
    const int64_t d = a->head_dim, row = a->num_kv_heads * d, line = bf16 ? 32 : 16;
    const int64_t k = page * a->key_page_size + kv_head * d, v = page * a->value_page_size + kv_head * d;
    for (int64_t t = 0; t < TILE; t++)
        for (int64_t i = 0; i < d; i += line) {
            __builtin_prefetch(at(a->keys, k + t * row + i, bf16), 0, 2);
            __builtin_prefetch(at(a->values, v + t * row + i, bf16), 0, 2);
        }
}

/* Query and result of one head of one row, before its first page. */
INLINE Query new_query(const Attention *a, const void *q, int64_t head, float *floats, int bf16) {
    const int64_t d = a->head_dim, dp = ROUND_UP(d);
    Query new = {at(q, head * d, bf16), floats};
    float *own = floats + dp + 2 * LANES;
    memset(floats, 0, (size_t)(dp + LANES) * sizeof *floats);
    floats[dp + LANES] = -__builtin_inff();
    if (bf16 && !PAIRS(a, bf16)) {
        new.query = own;
        for (int64_t i = 0; i < d; i += LANES) store_n(own, i, load_n(q, head * d + i, d - i, 1), d - i, 0);
    }
    return new;
}

INLINE void write_result(const Attention *a, const Query *q, void *out, int64_t head, int bf16) {
    const int64_t d = a->head_dim;
    const float total = sum(load_f32(q->result + ROUND_UP(d)));
    for (int64_t i = 0; i < d; i += LANES)
        store_n(out, head * d + i, load_f32(q->result + i) / total, d - i, bf16);
}

/* One tile of queries for the heads that share a kv head. Its tokens follow `start` others; they lie in one page, or,
 * off the grid, in two. */
INLINE void attend_tile(const Attention *a, const void *q, void *out, const int64_t *pages, int64_t start,
                        int64_t num_tokens, int64_t kv_head, const Memory *m, int bf16) {
    const int64_t group = a->num_heads / a->num_kv_heads, row = a->num_heads * a->head_dim;
    const int64_t end = start + num_tokens, last = (end - 1) / TILE;
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = 0; t < num_tokens; t++)
            m->queries[g * TILE + t] = new_query(a, at(q, t * a->q_stride, bf16), kv_head * group + g,
                                                 m->floats + (g * TILE + t) * query_size(a), bf16);
    for (int64_t page = first_page(a, start); page <= last; page++) {
        Span spans[TILE];
        for (int64_t t = 0; t < TILE; t++) spans[t] = span_of(a, page, start + t + 1);
        read_kv(a, pages[page], kv_head, page == last ? end - page * TILE : TILE, m->keys, m->values, bf16);
        if (page < last) prefetch_kv(a, pages[page + 1], kv_head, bf16);
        for (int64_t g = 0; g < group; g++)
            attend_page(a, m->queries + g * TILE, spans, 1, num_tokens, m->keys, m->values, PAIRS(a, bf16));
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t t = 0; t < num_tokens; t++)
            write_result(a, m->queries + g * TILE + t, at_mut(out, t * row, bf16), kv_head * group + g, bf16);
}

/* The decode rows of one tree of shared pages, for the heads that share a kv head. A page that several rows share is
 * read and transposed once, and meets the queries of all of them (Hydragen: Juravsky et al. 2024). Each row still takes its
 * own pages one by one and in order, so sharing changes no bit. */
INLINE void attend_tree(const Layout *l, const Attention *a, const void *q, void *out, int64_t tree, int64_t kv_head,
                        const Memory *m, int bf16) {
    const int64_t group = a->num_heads / a->num_kv_heads, row = a->num_heads * a->head_dim;
    const int64_t first_row = l->decode_row, from = l->trees[tree], to = l->trees[tree + 1];
    const int64_t root = l->segments[from].first_row;
    int64_t num_rows = 0;
    for (int64_t s = from; s < to; s++) {
        const Segment *segment = l->segments + s;
        const int64_t end_row = segment->first_row + segment->num_rows;
        for (; root + num_rows < end_row; num_rows++) {
            const int64_t i = l->decode_order[root + num_rows];
            for (int64_t g = 0; g < group; g++)
                m->queries[num_rows * group + g] =
                    new_query(a, at(q, (first_row + i) * a->q_stride, bf16), kv_head * group + g,
                              m->floats + (num_rows * group + g) * query_size(a), bf16);
        }
        const Query *queries = m->queries + (segment->first_row - root) * group;
        const int64_t *rows = l->decode_order + segment->first_row, length = l->decode_len[rows[0]];
        const int64_t *pages = l->page_table + (l->num_chunks + rows[0]) * l->max_pages;
        for (int64_t page = segment->first_page; page < segment->end_page; page++) {
            if (segment->num_rows == 1 && page < first_page(a, length - 1)) continue;
            const Span span = span_of(a, page, length);
            read_kv(a, pages[page], kv_head, span.end, m->keys, m->values, bf16);
            if (!a->window) {
                attend_page(a, queries, &span, 0, segment->num_rows * group, m->keys, m->values, PAIRS(a, bf16));
                continue;
            }
            for (int64_t r = 0; r < segment->num_rows; r++) {
                const Span own = span_of(a, page, l->decode_len[rows[r]]);
                if (own.first < own.end)
                    attend_page(a, queries + r * group, &own, 0, group, m->keys, m->values, PAIRS(a, bf16));
            }
        }
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t g = 0; g < group; g++)
            write_result(a, m->queries + r * group + g,
                         at_mut(out, (first_row + l->decode_order[root + r]) * row, bf16), kv_head * group + g, bf16);
}

INLINE void run(const Layout *l, const Attention *a, const void *q, const void *k, const void *v, void *out,
                float *scratch, int64_t num_threads, int bf16) {
    const int64_t row = a->num_heads * a->head_dim;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
        const Memory memory = memory_of(l, a, scratch + THREAD() * thread_size(l, a));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < l->num_rows; r++) {
            if (l->kv_rows[r] >= 0)
                write_row(a, l->kv_rows[r], at(k, r * a->k_stride, bf16), at(v, r * a->v_stride, bf16), bf16);
            if (!row_is_token(l, r)) memset(at_mut(out, r * row, bf16), 0, (size_t)row * (bf16 ? 2 : 4));
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < l->num_tiles * a->num_kv_heads; task++) {
            const int64_t tile = l->num_tiles - 1 - task / a->num_kv_heads, c = chunk_of(l, tile);
            const int64_t i = tile - l->chunk_tile[c], first = tokens_before(l, c, i), r = l->chunk_row[c] + first;
            attend_tile(a, at(q, r * a->q_stride, bf16), at_mut(out, r * row, bf16),
                        l->page_table + c * l->max_pages, l->chunk_start[c] + first, tokens_in(l, c, i),
                        task % a->num_kv_heads, &memory, bf16);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < l->num_trees * a->num_kv_heads; task++)
            attend_tree(l, a, q, out, task / a->num_kv_heads, task % a->num_kv_heads, &memory, bf16);
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
