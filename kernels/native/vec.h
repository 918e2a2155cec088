/* Sixteen floats at a time, in GCC/Clang vector extensions.
 *
 * A row has to get the same bits wherever it lies, so there is one code path for each formula: a tail of fewer than 16
 * values is padded with zeros and goes through the same vector arithmetic as the body, and a blocked loop never takes
 * another path for the last block. Products and sums may be fused by the compiler, but only statement by statement, the
 * same for each row.
 */
#ifndef HYBRID_CACHE_VEC_H
#define HYBRID_CACHE_VEC_H

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define TILE 64
#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(n) (((n) + LANES - 1) / LANES * LANES)

/* For the rest of a block, numbers below 2^-126 are zero, whatever the calling thread has set. The weights of a softmax and
 * the decays of a state are full of them, and each would cost a product a hundred cycles. Stands first in each parallel
 * region, since each thread has a mode of its own. */
#define FLUSH_SUBNORMALS \
    const uint64_t mode_before __attribute__((cleanup(restore_mode), unused)) = flush_subnormals()

#if defined(__SSE2__)
#define GET_MODE() __builtin_ia32_stmxcsr()
#define SET_MODE(mode) __builtin_ia32_ldmxcsr((uint32_t)(mode))
#define FLUSH 0x8040 /* of results, of operands */
#elif defined(__aarch64__)
INLINE uint64_t GET_MODE(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
INLINE void SET_MODE(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#define FLUSH (1 << 24)
#else
#define GET_MODE() 0
#define SET_MODE(mode) (void)(mode)
#define FLUSH 0
#endif

INLINE void restore_mode(const uint64_t *mode) {
    __asm__ volatile("" : : : "memory");
    SET_MODE(*mode);
}

INLINE uint64_t flush_subnormals(void) {
    const uint64_t before = GET_MODE();
    SET_MODE(before | FLUSH);
    __asm__ volatile("" : : : "memory"); /* nothing is computed from memory before this */
    return before;
}

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

/* Keeps a loaded vector in a register, where GCC would rather load it once for each use. */
#ifdef __AVX512F__
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v) (void)0
#endif

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load_f32(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf widen(vh h) {
    vu u = __builtin_convertvector(h, vu) << 16;
    return (vf)u;
}

/* Round to nearest even; a NaN stays a NaN. */
INLINE vh narrow(vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu is_nan = (vu)(v != v);
    rounded = (rounded & ~is_nan) | (0x7fc0 & is_nan);
    return __builtin_convertvector(rounded, vh);
}

/* Rows of a model: float32, or bfloat16 where `bf16`. Index and stride count elements. */
INLINE const void *at(const void *p, int64_t i, int bf16) { return (const char *)p + i * (bf16 ? 2 : 4); }
INLINE void *at_mut(void *p, int64_t i, int bf16) { return (char *)p + i * (bf16 ? 2 : 4); }

INLINE vf load(const void *p, int64_t i, int bf16) {
    if (!bf16) return load_f32((const float *)p + i);
    vh h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return widen(h);
}

INLINE void store(void *p, int64_t i, vf v, int bf16) {
    if (!bf16) {
        store_f32((float *)p + i, v);
    } else {
        vh h = narrow(v);
        memcpy((uint16_t *)p + i, &h, sizeof h);
    }
}

/* The first n values, zeros after. */
INLINE vf load_n(const void *p, int64_t i, int64_t n, int bf16) {
    if (n >= LANES) return load(p, i, bf16);
    float padded[LANES] = {0};
    memcpy(padded, at(p, i, bf16), (size_t)n * (bf16 ? 2 : 4));
    return load(padded, 0, bf16);
}

INLINE void store_n(void *p, int64_t i, vf v, int64_t n, int bf16) {
    if (n >= LANES) {
        store(p, i, v, bf16);
        return;
    }
    float padded[LANES];
    store(padded, 0, v, bf16);
    memcpy(at_mut(p, i, bf16), padded, (size_t)n * (bf16 ? 2 : 4));
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* A NaN in a stays. */
#ifdef __AVX512F__
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)b, (__m512)a); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)b, (__m512)a); }
#else
INLINE vf vmin(vf a, vf b) { return choose(a > b, b, a); }
INLINE vf vmax(vf a, vf b) { return choose(a < b, b, a); }
#endif

INLINE float sum(vf v) {
    union { vf v; v8 h[2]; } a = {v};
    union { v8 v; v4 h[2]; } b = {a.h[0] + a.h[1]};
    v4 c = b.h[0] + b.h[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

#ifdef __AVX512F__
INLINE float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float largest(vf v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}
#endif

/* Is one of them above b? A NaN is not. */
#ifdef __AVX512F__
INLINE int any_above(vf a, float b) {
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_GT_OQ) != 0;
}
#else
INLINE int any_above(vf a, float b) {
    int above = 0;
    for (int i = 0; i < LANES; i++) above |= a[i] > b;
    return above;
}
#endif

/* p * 2^n for whole n from -150 to 127. */
INLINE vf scale(vf p, vf n) {
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vi exponent = __builtin_convertvector(vmax(n, splat(-127)), vi) + 127; /* 0, so a factor of 0, from -127 down */
    return p * (vf)(exponent << 23);
#endif
}

/* exp(x) to about 1 ulp: x = n ln 2 + r, exp(r) by a polynomial. 0 from -104 down, finite from 88.3 up. */
INLINE vf vexp(vf x) {
    vf y = vmax(vmin(x, splat(88.37f)), splat(-104.0f));
    vf n = (y * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    vf r = y - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return scale(p, n);
}

/* 2^x for x <= 127 to about 1 ulp, closer still near 0: 2^n 2^f by a polynomial, f in [-1/2, 1/2]. */
INLINE vf vexp2(vf x) {
#ifdef __AVX512F__
    vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
#else
    vf n = (x + 12582912.0f) - 12582912.0f;
#endif
    vf f = x - n;
    vf p = splat(1.5353362e-4f);
    p = p * f + 1.3398875e-3f;
    p = p * f + 9.6184369e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return scale(p, n);
}

INLINE vf vsqrt(vf x) {
#ifdef __AVX512F__
    return (vf)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }

/* max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3. */
INLINE vf vsoftplus(vf x) {
    vf e = vexp(choose(x < 0, x, -x));
    vf s = e / (2.0f + e);
    vf s2 = s * s;
    vf p = splat(1.0f / 17);
    p = p * s2 + 1.0f / 15;
    p = p * s2 + 1.0f / 13;
    p = p * s2 + 1.0f / 11;
    p = p * s2 + 1.0f / 9;
    p = p * s2 + 1.0f / 7;
    p = p * s2 + 1.0f / 5;
    p = p * s2 + 1.0f / 3;
    p = p * s2 + 1.0f;
    return vmax(x, splat(0)) + 2.0f * s * p;
}

#ifdef __clang__
#define INTERLEAVE_LOW(a, b) \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define INTERLEAVE_HIGH(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define INTERLEAVE_LOW(a, b) __builtin_shuffle(a, b, (vi){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define INTERLEAVE_HIGH(a, b) \
    __builtin_shuffle(a, b, (vi){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

/* Lane i of the result is the sum of the lanes of a[i]. */
INLINE vf sums16(const vf *a) {
    vf b[8], c[4];
    for (int i = 0; i < 8; i++) b[i] = INTERLEAVE_LOW(a[i], a[i + 8]) + INTERLEAVE_HIGH(a[i], a[i + 8]);
    for (int i = 0; i < 4; i++) c[i] = INTERLEAVE_LOW(b[i], b[i + 4]) + INTERLEAVE_HIGH(b[i], b[i + 4]);
    for (int i = 0; i < 2; i++) b[i] = INTERLEAVE_LOW(c[i], c[i + 2]) + INTERLEAVE_HIGH(c[i], c[i + 2]);
    return INTERLEAVE_LOW(b[0], b[1]) + INTERLEAVE_HIGH(b[0], b[1]);
}

/* to[c * ldt + r] = from[r * ldf + c] for r < rows <= 16, c < cols <= 16. Up to the next multiple of 16, `to` gets
 * zeros in the columns; rows of `to` from `cols` on are left as they are. */
INLINE void transpose16(const void *from, int64_t start, int64_t ldf, int64_t rows, int64_t cols, float *to,
                        int64_t ldt, int bf16) {
    vf a[16], b[16];
    for (int r = 0; r < 16; r++) a[r] = r < rows ? load_n(from, start + r * ldf, cols, bf16) : splat(0);
    for (int stage = 0; stage < 4; stage++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = INTERLEAVE_LOW(a[i], a[i + 8]);
            b[2 * i + 1] = INTERLEAVE_HIGH(a[i], a[i + 8]);
        }
        memcpy(a, b, sizeof a);
    }
    for (int c = 0; c < 16; c++)
        if (c < cols) store_f32(to + c * ldt, a[c]);
}

/* The same for any size; `to` has room for ROUND_UP(rows) columns. */
static inline void transpose(const float *from, int64_t ldf, int64_t rows, int64_t cols, float *to, int64_t ldt) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < cols; c += 16)
            transpose16(from, r * ldf + c, ldf, rows - r, cols - c, to + c * ldt + r, ldt, 0);
}

/* out[i, :] = keep[i] * out[i, :] + sum over k of a[i * ai + k * ak] * x[k, :] for four rows i and 16 * nv columns.
 * keep may be null: then 0. */
INLINE void rows4(float *out, int64_t ldo, const float *keep, const float *a, int64_t ai, int64_t ak, const float *x,
                  int64_t ldx, int64_t num_k, const int nv) {
    vf acc[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < nv; j++)
            acc[i][j] = keep ? keep[i] * load_f32(out + i * ldo + LANES * j) : splat(0);
    for (int64_t k = 0; k < num_k; k++) {
        vf b[4];
        for (int j = 0; j < nv; j++) {
            b[j] = load_f32(x + k * ldx + LANES * j);
            IN_REGISTER(b[j]);
        }
        for (int i = 0; i < 4; i++) {
            vf ak_i = splat(a[i * ai + k * ak]);
            for (int j = 0; j < nv; j++) acc[i][j] += ak_i * b[j];
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < nv; j++) store_f32(out + i * ldo + LANES * j, acc[i][j]);
}

/* The same for `width` columns, a multiple of 16. */
INLINE void block4(float *out, int64_t ldo, const float *keep, const float *a, int64_t ai, int64_t ak, const float *x,
                   int64_t ldx, int64_t num_k, int64_t width) {
    int64_t col = 0;
    for (; col + 64 <= width; col += 64) rows4(out + col, ldo, keep, a, ai, ak, x + col, ldx, num_k, 4);
    for (; col + 32 <= width; col += 32) rows4(out + col, ldo, keep, a, ai, ak, x + col, ldx, num_k, 2);
    for (; col + 16 <= width; col += 16) rows4(out + col, ldo, keep, a, ai, ak, x + col, ldx, num_k, 1);
}

#endif
