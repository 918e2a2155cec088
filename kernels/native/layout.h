/* `RowLayout` and the weights as C sees them; native_calls.py declares the same structures. */
#ifndef HYBRID_CACHE_LAYOUT_H
#define HYBRID_CACHE_LAYOUT_H

#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD() omp_get_thread_num()
#else
#define THREAD() 0
#endif

/* Pages [first_page, end_page) of the decode rows order[first_row .. first_row + num_rows), which share them. */
typedef struct {
    int64_t first_row, num_rows, first_page, end_page;
} Segment;

typedef struct {
    int64_t num_rows, num_tiles, num_decode, decode_row, num_chunks, num_captures, max_pages;
    const int64_t *chunk_row, *chunk_tile, *chunk_tiles, *chunk_start, *chunk_len, *chunk_slot, *chunk_fresh;
    const int64_t *tile_start;
    const int64_t *capture_chunk, *capture_tiles, *capture_slot;
    const int64_t *decode_slot, *decode_len;
    const int64_t *page_table, *kv_rows;
    /* Set by find_shared_prefixes: the segments of tree i are [trees[i], trees[i + 1]), each after those above it. */
    int64_t *decode_order, *trees; /* [num_decode], [num_decode + 1] */
    Segment *segments;             /* [2 num_decode] */
    int64_t num_trees;
} Layout;

typedef struct {
    int64_t num_heads, head_dim, d_state, num_groups, width, norm_group, norm_first;
    float norm_eps, dt_min, dt_max;
    const float *taps;  /* [width, channels] */
    const float *bias;  /* [channels] */
    const float *dt_bias, *A, *D;  /* [num_heads] */
    const float *norm;  /* [num_heads * head_dim], or null for no norm */
} Mamba2;

/* Slots or pages: `stride` elements from one to the next. */
typedef struct {
    void *data;
    int64_t stride;
} Pool;

/* The chunk that a tile belongs to. */
static inline int64_t chunk_of(const Layout *l, int64_t tile) {
    int64_t c = 0;
    while (tile >= l->chunk_tile[c] + l->chunk_tiles[c]) c++;
    return c;
}

/* Tokens of a chunk before one of its tiles; after the last tile: all of them. */
static inline int64_t tokens_before(const Layout *l, int64_t chunk, int64_t tile_of_chunk) {
    if (tile_of_chunk == l->chunk_tiles[chunk]) return l->chunk_len[chunk];
    return l->tile_start[l->chunk_tile[chunk] + tile_of_chunk];
}

/* Tokens of a chunk in one of its tiles. */
static inline int64_t tokens_in(const Layout *l, int64_t chunk, int64_t tile_of_chunk) {
    return tokens_before(l, chunk, tile_of_chunk + 1) - tokens_before(l, chunk, tile_of_chunk);
}

/* Row of the first token of a chunk's tile. */
static inline int64_t row_of(const Layout *l, int64_t chunk, int64_t tile_of_chunk) {
    return l->chunk_row[chunk] + tokens_before(l, chunk, tile_of_chunk);
}

/* Does row r hold a token? */
static inline int row_is_token(const Layout *l, int64_t r) {
    if (r >= l->decode_row) return r < l->decode_row + l->num_decode;
    for (int64_t c = 0; c < l->num_chunks; c++)
        if (r < l->chunk_row[c] + l->chunk_len[c]) return r >= l->chunk_row[c];
    return 0;
}

/* Zeros in the rows of `out` that hold no token. */
static inline void clear_unused_rows(const Layout *l, void *out, int64_t row_bytes) {
    for (int64_t r = 0; r < l->num_rows; r++)
        if (!row_is_token(l, r)) memset((char *)out + r * row_bytes, 0, (size_t)row_bytes);
}

#endif
