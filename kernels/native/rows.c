/* Operations on single rows. Inputs have `stride` elements from one row to the next, outputs are contiguous. */
#include "calls.h"
#include "vec.h"

INLINE void norm_rows(const void *x, int64_t stride, int64_t num_rows, int64_t size, const void *weight, float eps,
                      void *out, int64_t num_threads, int bf16) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++) {
            vf squares = splat(0);
            for (int64_t i = 0; i < size; i += LANES) {
                vf v = load_n(x, r * stride + i, size - i, bf16);
                squares += v * v;
            }
            const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps);
            for (int64_t i = 0; i < size; i += LANES) {
                vf v = load_n(x, r * stride + i, size - i, bf16) * scale * load_n(weight, i, size - i, bf16);
                store_n(out, r * size + i, v, size - i, bf16);
            }
        }
    }
}

void rms_norm(const void *x, int64_t stride, int64_t num_rows, int64_t size, const void *weight, float eps, void *out,
              int64_t num_threads, int64_t bf16) {
    if (bf16)
        norm_rows(x, stride, num_rows, size, weight, eps, out, num_threads, 1);
    else
        norm_rows(x, stride, num_rows, size, weight, eps, out, num_threads, 0);
}

INLINE void silu_mul_rows(const void *x, int64_t stride, int64_t num_rows, int64_t size, void *out, int64_t num_threads,
                          int bf16) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++)
            for (int64_t i = 0; i < size; i += LANES) {
                vf gate = load_n(x, r * stride + i, size - i, bf16);
                vf up = load_n(x, r * stride + size + i, size - i, bf16);
                store_n(out, r * size + i, vsilu(gate) * up, size - i, bf16);
            }
    }
}

/* x rows [2 * size] -> out rows [size] */
void silu_mul(const void *x, int64_t stride, int64_t num_rows, int64_t size, void *out, int64_t num_threads,
              int64_t bf16) {
    if (bf16)
        silu_mul_rows(x, stride, num_rows, size, out, num_threads, 1);
    else
        silu_mul_rows(x, stride, num_rows, size, out, num_threads, 0);
}

INLINE void turn_rows(const void *x, int64_t stride, int64_t num_rows, int64_t num_heads, int64_t half,
                      const float *cos, const float *sin, void *out, int64_t num_threads, int bf16) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++)
            for (int64_t h = 0; h < num_heads; h++)
                for (int64_t i = 0; i < half; i += LANES) {
                    const int64_t from = r * stride + 2 * h * half + i, to = (r * num_heads + h) * 2 * half + i;
                    vf a = load_n(x, from, half - i, bf16), b = load_n(x, from + half, half - i, bf16);
                    vf c = load_n(cos, r * half + i, half - i, 0), s = load_n(sin, r * half + i, half - i, 0);
                    store_n(out, to, a * c - b * s, half - i, bf16);
                    store_n(out, to + half, b * c + a * s, half - i, bf16);
                }
    }
}

/* x rows [num_heads, 2 * half], cos and sin [num_rows, half] -> out rows [num_heads, 2 * half] */
void rotary(const void *x, int64_t stride, int64_t num_rows, int64_t num_heads, int64_t half, const float *cos,
            const float *sin, void *out, int64_t num_threads, int64_t bf16) {
    if (bf16)
        turn_rows(x, stride, num_rows, num_heads, half, cos, sin, out, num_threads, 1);
    else
        turn_rows(x, stride, num_rows, num_heads, half, cos, sin, out, num_threads, 0);
}

/* KV pages: `page` elements from one to the next, rows of `row` elements. */
typedef struct {
    void *data;
    int64_t page, row;
} Pages;

INLINE void *page_row(const Pages *p, int64_t r, int bf16) {
    return at_mut(p->data, r / TILE * p->page + r % TILE * p->row, bf16);
}

INLINE void move_rows(const Pages *k, const Pages *v, const int64_t *sources, const int64_t *targets, int64_t num_rows,
                      const int64_t *delta, const float *cos, const float *sin, int64_t head_dim, int64_t first,
                      int64_t half, int64_t num_threads, int bf16) {
    const size_t size = bf16 ? 2 : 4;
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++) {
            memcpy(page_row(v, targets[r], bf16), page_row(v, sources[r], bf16), (size_t)v->row * size);
            void *to = page_row(k, targets[r], bf16);
            const void *from = page_row(k, sources[r], bf16);
            memcpy(to, from, (size_t)k->row * size);
            if (!cos || !delta[r]) continue;
            for (int64_t h = first; h < k->row; h += head_dim)
                for (int64_t i = 0; i < half; i += LANES) {
                    const int64_t n = half - i;
                    vf a = load_n(from, h + i, n, bf16), b = load_n(from, h + half + i, n, bf16);
                    vf c = load_n(cos, r * half + i, n, 0), s = load_n(sin, r * half + i, n, 0);
                    store_n(to, h + i, a * c - b * s, n, bf16);
                    store_n(to, h + half + i, b * c + a * s, n, bf16);
                }
        }
    }
}

/* Row sources[i] of the pages -> row targets[i]; values [first, first + 2 * half) of a key's heads are rotated by
 * cos, sin [num_rows, half], or by nothing where these are null or delta is 0. */
void relocate_keys(const Pages *k, const Pages *v, const int64_t *sources, const int64_t *targets, int64_t num_rows,
                   const int64_t *delta, const float *cos, const float *sin, int64_t head_dim, int64_t first,
                   int64_t half, int64_t num_threads, int64_t bf16) {
    if (bf16)
        move_rows(k, v, sources, targets, num_rows, delta, cos, sin, head_dim, first, half, num_threads, 1);
    else
        move_rows(k, v, sources, targets, num_rows, delta, cos, sin, head_dim, first, half, num_threads, 0);
}
