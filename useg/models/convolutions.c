/* 3x3 convolutions of a network in training, with the batch normalisations before and after them.

   y = after(convolve(before(x))), in bf16, channels last, with zero padding. "before" and "after"
   are batch normalisations with their activations, or missing. What is normalised before is never
   stored, and the gradient of what is normalised after is not either: both are computed for a strip
   of some rows, which stays in the cache while it is multiplied.

   This needs a processor that multiplies bf16 numbers in vectors. With one that multiplies
   matrices (AMX), oneDNN is faster. */

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#include "convolutions.h"

/* Write LANES channels of a strip of the result, and measure them. */
static void finish_forward(const convolution *s, const strips *cuts, const float *sums,
                           int64_t rows, bf16 *out, double *m) {
    vec shift = loadf(sums), first = {0}, second = {0};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < s->width; j++) {
            vec v = loadf(sums + (r * cuts->pitch + j) * LANES), d = v - shift;
            first += d;
            second += d * d;
            store(out + (r * s->width + j) * s->out_channels, v);
        }
    double totals[2][LANES] = {0};
    add_sums(totals[0], &first, 1);
    add_sums(totals[1], &second, 1);
    write_moments(m, s->out_channels, rows * s->width, sums, totals[0], totals[1]);
}

int useg_convolve(const convolution *s, const norm *before, const norm *after, const bf16 *x,
                  const float *weight, bf16 *y) {
    const int64_t C = s->channels, D = s->out_channels, pitch = s->width + 2;
    const strips cuts =
        cut(s->images, s->height, pitch, fitting_rows(pitch, 2 * C + 4 * LANES));
    const conversion how = {before};
    bf16 *packed = allocate(9 * C * D * sizeof *packed);
    double *m = malloc(cuts.number * 4 * D * sizeof *m);
    int64_t failed = !packed || !m;
    if (!failed) pack(weight, C, C, D, packed);
#pragma omp parallel for schedule(dynamic) reduction(+ : failed) if (!failed)
    for (int64_t k = 0; k < (failed ? 0 : cuts.number); k++) {
        int64_t image = k / cuts.per_image, first = k % cuts.per_image * cuts.rows;
        int64_t rows = MIN(cuts.rows, s->height - first);
        bf16 *strip = allocate(cuts.places * C * sizeof *strip);
        float *sums = allocate(cuts.tiles * TILE * LANES * sizeof *sums);
        if (!strip || !sums) failed = 1;
        else fill(&cuts, s->height, s->width, C, &how, x, image, first, rows, strip);
        for (int64_t d = 0; d < D && strip && sums; d += LANES) {
            multiply_rows(strip, &cuts, rows, s->width, C / BLOCK, packed + 9 * C * d, sums, 3);
            finish_forward(s, &cuts, sums, rows,
                           y + (image * s->height + first) * s->width * D + d, m + k * 4 * D + d);
        }
        free(strip), free(sums);
    }
    if (after && !failed)
        set_moments(after, D, s->images * s->height * s->width, m, cuts.number);
    free(packed), free(m);
    return failed;
}

/* ``convolved`` is kept for the backward pass. Without ``after``, it is the result. */
int useg_convolution_forward(const convolution *s, const norm *before, const norm *after,
                             const bf16 *x, const float *weight, bf16 *convolved, bf16 *y) {
    const int64_t pixels = s->images * s->height * s->width;
    return (before && measure(before, x, pixels, s->channels))
        || useg_convolve(s, before, after, x, weight, convolved)
        || (after && apply(after, convolved, NULL, y, pixels, s->out_channels));
}

/* Memory of one thread for the backward pass. */
typedef struct {
    bf16 *x, *g;
    place_pairs pairs;
    float *sums;
} workplace;

static size_t reserve(const convolution *s, const strips *cuts, char *memory, workplace *w) {
    const int64_t C = s->channels, D = s->out_channels, step = pairs_step(cuts);
    const size_t lengths[] = {2 * cuts->places * C, 2 * cuts->places * D, step,
                              2 * D / LANES * step, 2 * D / LANES * step,
                              4 * cuts->tiles * TILE * LANES};
    char *parts[6];
    size_t used = 0;
    for (int k = 0; k < 6; k++) {
        parts[k] = memory + used;
        used += (lengths[k] + 63) / 64 * 64;
    }
    *w = (workplace){(bf16 *)parts[0], (bf16 *)parts[1],
                     {(bf16 *)parts[2], (bf16 *)parts[3], (bf16 *)parts[4], step},
                     (float *)parts[5]};
    return used;
}

static void backward_strip(const convolution *s, const strips *cuts, const norm *before,
                           const conversion *of_g, const bf16 *x, const bf16 *packed, const bf16 *g,
                           bf16 *gx, int64_t k, const workplace *w, float *gradients,
                           double *totals, int is_first) {
    int64_t image = k / cuts->per_image, first = k % cuts->per_image * cuts->rows;
    int64_t rows = MIN(cuts->rows, s->height - first), C = s->channels, D = s->out_channels;
    int64_t start = (image * s->height + first) * s->width * C;
    const conversion of_x = {before};
    fill(cuts, s->height, s->width, C, &of_x, x, image, first, rows, w->x);
    fill(cuts, s->height, s->width, D, of_g, g, image, first, rows, w->g);
    for (int64_t c = 0; c < C; c += LANES) {
        multiply_rows(w->g, cuts, rows, s->width, D / BLOCK, packed + 9 * D * c, w->sums, 3);
        finish_backward(cuts, s->width, C, before, w->sums, rows, x + start, gx + start, c, totals);
    }
    add_weight_gradients(cuts, C, D, w->x, w->g, rows, &w->pairs, gradients, is_first);
}

int useg_convolve_backward(const convolution *s, const norm *before, const conversion *of_g,
                           const bf16 *x, const float *weight, const bf16 *g, bf16 *gx,
                           float *weight_gradient, float *slopes, float *constants) {
    const int64_t C = s->channels, D = s->out_channels, pitch = s->width + 2;
    const int64_t bytes = 2 * C + 6 * D + 4 * LANES + 2 * BLOCK, length = 9 * C * D;
    const strips cuts = cut(s->images, s->height, pitch, fitting_rows(pitch, bytes));
    bf16 *packed = allocate(length * sizeof *packed);
    float *gradients = allocate(cuts.chunks * length * sizeof *gradients);
    double *totals = calloc(cuts.chunks * 2 * C, sizeof *totals);
    int64_t failed = !packed || !gradients || !totals;
    if (!failed) pack_reversed(weight, C, C, D, packed);
    const int64_t chunks = failed ? 0 : cuts.chunks;
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        workplace w;
        char *memory = allocate(reserve(s, &cuts, NULL, &w));
        if (memory) reserve(s, &cuts, memory, &w);
        else failed += 1;
        const int64_t from = cuts.number * chunk / cuts.chunks;
        for (int64_t k = from; memory && k < cuts.number * (chunk + 1) / cuts.chunks; k++)
            backward_strip(s, &cuts, before, of_g, x, packed, g, gx, k, &w,
                           gradients + chunk * length, totals + chunk * 2 * C, k == from);
        free(memory);
    }
    if (!failed) add_chunks(C, D, chunks, gradients, length, C, weight_gradient);
    if (!failed && before) {
        add_totals(C, chunks, totals);
        set_gradients(before, C, s->images * s->height * s->width, totals, totals + C, slopes,
                      constants);
    }
    free(packed), free(gradients), free(totals);
    return failed;
}

int useg_convolution_backward(const convolution *s, const norm *before, const norm *after,
                              const bf16 *x, const float *weight, const bf16 *convolved,
                              const bf16 *g, bf16 *gx, float *weight_gradient) {
    const int64_t pixels = s->images * s->height * s->width, C = s->channels, D = s->out_channels;
    float *slopes = malloc(2 * (C + D) * sizeof *slopes), *constants = slopes + C + D;
    const conversion of_g = {after, convolved, slopes + C, constants + C};
    int failed = !slopes
        || (after && measure_gradients(after, convolved, g, pixels, D, slopes + C, constants + C))
        || useg_convolve_backward(s, before, &of_g, x, weight, g, gx, weight_gradient, slopes,
                                  constants)
        || (before && apply_gradients(before, x, gx, gx, pixels, C, slopes, constants));
    free(slopes);
    return failed;
}

int useg_has_convolutions(void) { return 1; }

#else

int useg_convolution_forward(void) { return 1; }
int useg_convolution_backward(void) { return 1; }
int useg_has_convolutions(void) { return 0; }

#endif
