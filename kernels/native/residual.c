/* hidden += multiplier * part(norm(hidden)) in one call, in bfloat16: the calls it is made of, and so their bits. */
#include "calls.h"
#include "vec.h"

typedef struct {
    uint16_t *hidden; /* [num_rows, size], contiguous */
    int64_t num_rows, size;
    const uint16_t *norm; /* [size] */
    float eps, multiplier;
    int64_t max_threads, min_values; /* of an operation, for more than one thread */
} Residual;

static int64_t threads_for(const Residual *r, int64_t num_values) {
    return num_values >= r->min_values ? r->max_threads : 1;
}

static void product(const Residual *r, const Linear *w, const uint16_t *x, uint16_t *y) {
    const int64_t threads = threads_for(r, r->num_rows * w->in * w->out / 16);
    linear(w, x, w->in, r->num_rows, y, threads);
    if (w->beside && w->beside->adapted->num_blocks)
        add_low_rank(w->beside, x, w->in, y, threads_for(r, w->beside->adapted->num_rows * (w->in + w->out)));
}

static void normed(const Residual *r, uint16_t *x) {
    const int64_t threads = threads_for(r, r->num_rows * r->size);
    rms_norm(r->hidden, r->size, r->num_rows, r->size, r->norm, r->eps, x, threads, 1);
}

/* Rounds after each step, as two operations would. */
static void add(const Residual *r, uint16_t *y) {
    const int64_t n = r->num_rows * r->size;
    for (int64_t i = 0; i < n; i += LANES) {
        if (r->multiplier != 1.0f) store_n(y, i, load_n(y, i, n - i, 1) * r->multiplier, n - i, 1);
        store_n(r->hidden, i, load_n(r->hidden, i, n - i, 1) + load_n(y, i, n - i, 1), n - i, 1);
    }
}

int64_t add_gated_mlp_scratch(const Residual *r, const Linear *gate_up, const Linear *down) {
    return r->num_rows * (r->size + gate_up->out + down->in) / 2 + LANES;
}

/* The part is down(silu_mul(gate_up(x))). */
void add_gated_mlp(const Residual *r, const Linear *gate_up, const Linear *down, float *scratch) {
    uint16_t *x = (uint16_t *)scratch, *wide = x + r->num_rows * r->size, *gated = wide + r->num_rows * gate_up->out;
    normed(r, x);
    product(r, gate_up, x, wide);
    silu_mul(wide, gate_up->out, r->num_rows, down->in, gated, threads_for(r, r->num_rows * down->in), 1);
    product(r, down, gated, x);
    add(r, x);
}

static int64_t mamba2_threads(const Residual *r, const Layout *l, const Mamba2 *w) {
    return threads_for(r, w->num_heads * w->head_dim * w->d_state * (64 * l->num_tiles + l->num_decode) / 4);
}

int64_t add_mamba2_scratch(const Residual *r, const Linear *into, const Linear *out, const Layout *l, const Mamba2 *w) {
    return r->num_rows * (r->size + into->out + out->in) / 2 + LANES + mamba2_scratch(l, w, mamba2_threads(r, l, w));
}

/* The part is out(mamba2(into(x))). log_decay [num_rows, num_heads] may be null. */
void add_mamba2(const Residual *r, const Linear *into, const Linear *out, const Layout *l, const Mamba2 *w, void *conv,
                int64_t conv_stride, float *state, int64_t state_stride, float *log_decay, float *scratch) {
    const int64_t threads = mamba2_threads(r, l, w);
    float *inside = scratch;
    uint16_t *x = (uint16_t *)(scratch + mamba2_scratch(l, w, threads));
    uint16_t *rows = x + r->num_rows * r->size, *y = rows + r->num_rows * into->out;
    normed(r, x);
    product(r, into, x, rows);
    if (log_decay) mamba2_log_decay(w, rows, r->num_rows, into->out, log_decay, 1);
    mamba2(l, w, rows, y, conv, conv_stride, state, state_stride, inside, threads, 1);
    product(r, out, y, x);
    add(r, x);
}
