/* Feed-forward experts in bfloat16: each one multiplies all rows that chose it, in one call for a layer. */
#include "calls.h"
#include "vec.h"

typedef struct {
    int64_t num_experts, num_choices, hidden, inner;
    const Linear *w_in, *w_out;        /* [num_experts] times [2 inner, hidden] and [hidden, inner] */
    int64_t max_threads, min_values;   /* of an operation, for more than one thread */
} Experts;

/* bfloat16 values of one (row, choice) pair: its row, gate and up, their product, the result. */
static int64_t pair_size(const Experts *e) { return 2 * e->hidden + 3 * e->inner; }

/* In floats. */
int64_t experts_scratch(const Experts *e, int64_t num_rows) {
    const int64_t num_pairs = num_rows * e->num_choices;
    return (num_pairs * pair_size(e) + 1) / 2 + 2 * (num_pairs + e->num_experts + 1) + LANES;
}

static int64_t threads_for(const Experts *e, int64_t num_values) {
    return num_values >= e->min_values ? e->max_threads : 1;
}

/* rows [num_rows, hidden], `stride` elements apart; ids and shares [num_rows, num_choices]; out [num_rows, hidden]. A
 * pair's bits do not depend on the other pairs, and shares are summed in the order of the choices. */
void experts(const Experts *e, const uint16_t *rows, int64_t stride, int64_t num_rows, const int64_t *ids,
             const float *shares, uint16_t *out, float *scratch) {
    const int64_t num_pairs = num_rows * e->num_choices, hidden = e->hidden, inner = e->inner;
    int64_t *place = (int64_t *)scratch, *start = place + num_pairs; /* of each pair, of each expert's pairs */
    uint16_t *x = (uint16_t *)(start + e->num_experts + 1), *wide = x + num_pairs * hidden;
    uint16_t *gated = wide + num_pairs * 2 * inner, *y = gated + num_pairs * inner;
    memset(start, 0, (size_t)(e->num_experts + 1) * sizeof *start);
    for (int64_t i = 0; i < num_pairs; i++) start[ids[i] + 1]++;
    for (int64_t i = 0; i < e->num_experts; i++) start[i + 1] += start[i];
    for (int64_t i = 0; i < num_pairs; i++) place[i] = start[ids[i]]++; /* now start[i] is where expert i ends */
    for (int64_t i = 0; i < num_pairs; i++)
        memcpy(x + place[i] * hidden, rows + i / e->num_choices * stride, (size_t)hidden * sizeof *x);
    for (int64_t i = 0, first = 0; i < e->num_experts; first = start[i++]) {
        const int64_t count = start[i] - first;
        if (!count) continue;
        const int64_t threads = threads_for(e, count * hidden * inner / 8);
        linear(e->w_in + i, x + first * hidden, hidden, count, wide + first * 2 * inner, threads);
        silu_mul(wide + first * 2 * inner, 2 * inner, count, inner, gated + first * inner,
                 threads_for(e, count * inner), 1);
        linear(e->w_out + i, gated + first * inner, inner, count, y + first * hidden, threads);
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t i = 0; i < hidden; i += LANES) {
            vf total = splat(0);
            for (int64_t c = r * e->num_choices; c < (r + 1) * e->num_choices; c++)
                total += shares[c] * load_n(y, place[c] * hidden + i, hidden - i, 1);
            store_n(out, r * hidden + i, total, hidden - i, 1);
        }
}
