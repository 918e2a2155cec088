/* Which decode rows share pages: read off their page tables once a step, for all layers.
 *
 * Rows whose tables begin alike form a tree: a segment of pages that all share, and below it the parts of the group in
 * which they differ. The last page of a row is its own, since it is still being written.
 */
#include "layout.h"

typedef struct {
    Layout *l;
    int64_t num_segments, min_rows;
} Search;

static const int64_t *pages_of(const Layout *l, int64_t i) {
    return l->page_table + (l->num_chunks + l->decode_order[i]) * l->max_pages;
}

static int64_t full_pages(const Layout *l, int64_t i) { return (l->decode_len[l->decode_order[i]] - 1) / 64; }

static int64_t same_page(const Layout *l, int64_t i, int64_t j, int64_t page) {
    return page < full_pages(l, i) && page < full_pages(l, j) && pages_of(l, i)[page] == pages_of(l, j)[page];
}

static int64_t all_share(const Layout *l, int64_t first, int64_t end, int64_t page) {
    for (int64_t i = first + 1; i < end; i++)
        if (!same_page(l, first, i, page)) return 0;
    return 1;
}

static void add(Search *s, int64_t first, int64_t num_rows, int64_t page, int64_t end_page) {
    s->l->segments[s->num_segments++] = (Segment){first, num_rows, page, end_page};
}

/* Rows first .. first + num_rows of the order, which share the pages before `page`. */
static void split(Search *s, int64_t first, int64_t num_rows, int64_t page) {
    Layout *l = s->l;
    int64_t *order = l->decode_order;
    for (int64_t end, i = first; i < first + num_rows; i = end) {
        end = i + 1;
        for (int64_t j = i + 1; j < first + num_rows; j++)
            if (same_page(l, i, j, page)) {
                const int64_t row = order[j];
                order[j] = order[end];
                order[end++] = row;
            }
        if (page == 0) l->trees[l->num_trees++] = s->num_segments;
        int64_t common = page;
        if (end - i >= s->min_rows && end - i > 1) {
            while (all_share(l, i, end, common)) common++;
            add(s, i, end - i, page, common);
            split(s, i, end - i, common);
        } else {
            for (int64_t j = i; j < end; j++) {
                if (page == 0 && j > i) l->trees[l->num_trees++] = s->num_segments;
                add(s, j, 1, page, full_pages(l, j) + 1);
            }
        }
    }
}

/* Groups of fewer than `min_rows` rows are left as single rows. */
void find_shared_prefixes(Layout *l, int64_t min_rows) {
    Search search = {l, 0, min_rows};
    l->num_trees = 0;
    for (int64_t i = 0; i < l->num_decode; i++) l->decode_order[i] = i;
    split(&search, 0, l->num_decode, 0);
    l->trees[l->num_trees] = search.num_segments;
}
