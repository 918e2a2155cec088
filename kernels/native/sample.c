/* The next token of each row of logits; see `Ops.sample`. */
#include <stdlib.h>

#include "layout.h"
#include "vec.h"

#define BLOCK 1024
#define DIGIT 10 /* bits of a weight that are looked at together; a weight of at most 1 has 30 that may be set */
#define NUM_DIGITS (1 << DIGIT)

typedef struct {
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k;
    const double *point;
} Draws;

static int64_t num_blocks(int64_t vocab) { return (vocab + BLOCK - 1) / BLOCK; }
static int64_t size_of_block(int64_t vocab, int64_t b) { return vocab - b * BLOCK < BLOCK ? vocab - b * BLOCK : BLOCK; }
static int64_t row_size(int64_t vocab) { return 2 * ROUND_UP(vocab) + 3 * ROUND_UP(num_blocks(vocab)) + LANES; }

/* Floats of scratch memory. */
int64_t sample_scratch(int64_t vocab, int64_t num_threads) { return num_threads * row_size(vocab); }

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Logits [i, i + n), -inf after; what is not a number counts as infinity. */
INLINE vf logits_at(const float *logits, int64_t i, int64_t n) {
    vf x;
    if (n >= LANES) {
        x = load_f32(logits + i);
    } else {
        float padded[LANES];
        for (int64_t j = 0; j < LANES; j++) padded[j] = j < n ? logits[i + j] : -__builtin_inff();
        x = load_f32(padded);
    }
    return choose(x == x, x, splat(__builtin_inff()));
}

/* The largest logit of a row, and of each of its blocks. */
static float maxima(const float *logits, int64_t vocab, float *of_block) {
    float best = -__builtin_inff();
    for (int64_t b = 0; b < num_blocks(vocab); b++) {
        vf most = splat(-__builtin_inff());
        for (int64_t i = b * BLOCK; i < b * BLOCK + size_of_block(vocab, b); i += LANES)
            most = vmax(most, logits_at(logits, i, vocab - i));
        of_block[b] = largest(most);
        if (of_block[b] > best) best = of_block[b];
    }
    return best;
}

/* The first token that has this logit, the row's largest. */
static int64_t first_of(const float *logits, int64_t vocab, const float *of_block, float best) {
    for (int64_t b = 0; b < num_blocks(vocab); b++)
        if (of_block[b] == best)
            for (int64_t i = b * BLOCK; i < vocab; i++)
                if (!(logits[i] < best)) return i;
    return 0;
}

/* Weights that are at least `least`, one after the other -> how many. */
static int64_t gather(const float *weights, int64_t n, float least, float *out) {
    int64_t count = 0;
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + LANES <= n; i += LANES) {
        const __m512 w = _mm512_loadu_ps(weights + i);
        const __mmask16 kept = _mm512_cmp_ps_mask(w, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_mask_compressstoreu_ps(out + count, kept, w);
        count += __builtin_popcount(kept);
    }
#endif
    for (; i < n; i++)
        if (weights[i] >= least) out[count++] = weights[i];
    return count;
}

/* The largest of some weights w for which all weights of at least w add up to `target`, or number as many; 0 if none
 * is. Weights are between 0 and 1, so their bits are in their order; found digit by digit. */
static float threshold(const float *weights, int64_t n, double target, int counts) {
    double in_digit[NUM_DIGITS], above = 0;
    uint32_t prefix = 0;
    for (int shift = 2 * DIGIT; shift >= 0; shift -= DIGIT) {
        memset(in_digit, 0, sizeof in_digit);
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, weights + i, sizeof bits);
            if (bits >> shift >> DIGIT == prefix)
                in_digit[bits >> shift & (NUM_DIGITS - 1)] += counts ? 1.0 : (double)weights[i];
        }
        int digit = NUM_DIGITS - 1;
        while (digit >= 0 && (!in_digit[digit] || above + in_digit[digit] < target)) above += in_digit[digit--];
        if (digit < 0) return 0;
        prefix = prefix << DIGIT | (uint32_t)digit;
    }
    float found;
    memcpy(&found, &prefix, sizeof found);
    return found;
}

static int falling(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The k-th largest weight; `most` has the largest of each block, and is sorted. */
static float kth(const float *weights, int64_t vocab, int64_t k, float *most, float *memory) {
    float least = 0;
    if (k <= num_blocks(vocab)) { /* that many blocks have a weight that is no smaller */
        qsort(most, (size_t)num_blocks(vocab), sizeof *most, falling);
        least = most[k - 1];
    }
    return threshold(memory, gather(weights, vocab, least, memory), (double)k, 1);
}

/* Sums over blocks of the weights that are at least `least` -> over all. */
static double add_up(const float *weights, int64_t vocab, float least, float *of_block) {
    double total = 0;
    for (int64_t b = 0; b < num_blocks(vocab); b++) {
        vf s = splat(0);
        for (int64_t i = b * BLOCK; i < b * BLOCK + size_of_block(vocab, b); i += LANES) {
            const vf w = load_f32(weights + i); /* zeros after the last */
            s += choose(w >= least, w, splat(0));
        }
        of_block[b] = sum(s);
        total += (double)of_block[b];
    }
    return total;
}

/* exp((logit - best) / temperature), and the largest of each block. */
static void weigh(const float *logits, int64_t vocab, float best, float temperature, float *weights, float *most) {
    const float scale = 1.0f / temperature;
    for (int64_t b = 0; b < num_blocks(vocab); b++) {
        vf m = splat(0);
        for (int64_t i = b * BLOCK; i < b * BLOCK + size_of_block(vocab, b); i += LANES) {
            const vf x = (logits_at(logits, i, vocab - i) - best) * scale;
            const vf w = choose(x > -87.0f, vexp(x), splat(0));
            store_f32(weights + i, w);
            m = vmax(m, w);
        }
        most[b] = largest(m);
    }
}

/* The first token at which the kept weights so far are more than `point`; -1 if nothing weighs anything. */
static int64_t token_at(const float *weights, int64_t vocab, float least, const float *of_block, double point) {
    int64_t last = -1, token = -1;
    for (int64_t b = 0; b < num_blocks(vocab); b++) {
        if (of_block[b] == 0) continue;
        last = b;
        if (point < (double)of_block[b]) break;
        point -= (double)of_block[b];
    }
    for (int64_t i = last * BLOCK; last >= 0 && i < last * BLOCK + size_of_block(vocab, last); i++)
        if (weights[i] >= least && weights[i] > 0) {
            token = i; /* the last one, should rounding leave a little of `point` */
            point -= (double)weights[i];
            if (point < 0) break;
        }
    return token;
}

static int64_t sample_row(const float *logits, int64_t vocab, const Draws *d, int64_t r, float *memory) {
    const int64_t blocks = ROUND_UP(num_blocks(vocab));
    float *weights = memory, *chosen = weights + ROUND_UP(vocab), *most = chosen + ROUND_UP(vocab), *sums = most + blocks;
    const float best = maxima(logits, vocab, most);
    const float temperature = d->temperature[r], top_p = d->top_p[r];
    const int64_t best_token = first_of(logits, vocab, most, best), k = min64(d->top_k[r], vocab);
    if (temperature == 0 || __builtin_isinf(best)) return best_token;
    weigh(logits, vocab, best, temperature, weights, most);
    float least = 0;
    if (k > 0 && k < vocab) least = kth(weights, vocab, k, most, chosen);
    double total = add_up(weights, vocab, least, sums);
    if (top_p < 1) {
        /* All that are smaller than this weigh less than 1 - top_p together. */
        const float negligible = (float)((1.0 - (double)top_p) * total / (double)vocab * 0.999);
        const int64_t n = gather(weights, vocab, least > negligible ? least : negligible, chosen);
        const float smallest = threshold(chosen, n, (double)top_p * total, 0);
        if (smallest > least) least = smallest;
    }
    if (d->min_p[r] > least) least = d->min_p[r];
    if (least > 0) total = add_up(weights, vocab, least, sums);
    const int64_t token = token_at(weights, vocab, least, sums, d->point[r] * total);
    return token < 0 ? best_token : token;
}

/* logits [num_rows, vocab] -> tokens [num_rows] */
void sample(const float *logits, int64_t num_rows, int64_t vocab, const Draws *draws, int64_t *tokens, float *scratch,
            int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++)
            tokens[r] = sample_row(logits + r * vocab, vocab, draws, r, scratch + THREAD() * row_size(vocab));
    }
}

#define WORD 32 /* tokens */

/* 32 logits, of which n are there, as integers; those whose bit in `word` is not set become -inf. */
#define MASK(type, logits, word, n, minus_infinity)        \
    for (int64_t i = 0; i < (n); i++)                      \
    ((type *)(logits))[i] = (word) >> i & 1 ? ((type *)(logits))[i] : (type)(minus_infinity)

INLINE void mask_word(void *logits, uint32_t word, int64_t n, int bf16) {
    if (word == UINT32_MAX) return;
    if (bf16)
        MASK(uint16_t, logits, word, n, 0xff80);
    else
        MASK(uint32_t, logits, word, n, 0xff800000);
}

/* logits [.., vocab], `stride` from row to row; words [num_rows, vocab / WORD, rounded up], for these rows */
void mask_tokens(void *logits, int64_t vocab, int64_t stride, const int64_t *rows, const uint32_t *words,
                 int64_t num_rows, int64_t num_threads, int64_t bf16) {
    const int64_t num_words = (vocab + WORD - 1) / WORD, whole = vocab / WORD;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t r = 0; r < num_rows; r++) {
        const uint32_t *word = words + r * num_words;
        void *row = at_mut(logits, rows[r] * stride, (int)bf16);
        for (int64_t w = 0; w < whole; w++) mask_word(at_mut(row, w * WORD, (int)bf16), word[w], WORD, (int)bf16);
        if (whole < num_words)
            mask_word(at_mut(row, whole * WORD, (int)bf16), word[whole], vocab - whole * WORD, (int)bf16);
    }
}

/* logits [num_rows, vocab] -> the largest of each row, and the sum of exp(logit - largest) */
void log_sum_exp(const float *logits, int64_t num_rows, int64_t vocab, float *most, float *sums, float *scratch,
                 int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        FLUSH_SUBNORMALS;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < num_rows; r++) {
            float *weights = scratch + THREAD() * row_size(vocab), *of_block = weights + ROUND_UP(vocab);
            most[r] = maxima(logits + r * vocab, vocab, of_block);
            if (__builtin_isinf(most[r])) {
                sums[r] = 1;
                continue;
            }
            weigh(logits + r * vocab, vocab, most[r], 1, weights, of_block);
            sums[r] = (float)add_up(weights, vocab, 0, of_block);
        }
    }
}
