/* Convolutions of repeated pixels and a skip connection, with the batch normalisations before and
   after them.

   y = convolve(concatenate(repeat(before(x)), skip)), in bf16, channels last, where each pixel is
   repeated in both directions and the convolution is 3x3 with zero padding. Of each 3x3 window,
   only 2x2 pixels of x are different. The weights of equal pixels are added first, which takes 4/9
   of the work: for each of the four pixels of y that one pixel of x becomes, its phase, there are
   2x2 taps. Strips are those of convolutions.h, of x and its gradient in the one size, of the skip
   connection in twice the size. */

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#include "convolutions.h"

#define PHASES 4
/* The gradients of the weights of all chunks take about so many bytes, unless there are few. */
#define GRADIENTS_BYTES (2 << 20)
#define MIN_CHUNKS 4
/* Zeros before the places of a phase. */
#define LEAD 2

/* Of x, and of the skip connection and y. */
typedef struct {
    strips coarse, fine;
} both_strips;

static both_strips cut_both(const upsampling *s, int64_t bytes) {
    /* Even, so that each row begins with the first of two places. */
    const int64_t pitch = (s->width + 3) / 2 * 2, wide = 2 * s->width + 2;
    both_strips c = {cut(s->images, s->height, pitch, fitting_rows(pitch, bytes))};
    c.fine = cut(s->images, 2 * s->height, wide, 2 * c.coarse.rows);
    return c;
}

/* The sums of the weights for all taps (i, j) = (2 * a + u, 2 * b + v) of LANES channels of x. */
INLINE void sum_taps(const float *weight, int64_t step, vec *sums) {
    vec w[9], rows[4][3];
    UNROLL for (int t = 0; t < 9; t++) w[t] = loadf(weight + t * step);
    UNROLL for (int t = 0; t < 3; t++) {
        rows[0][t] = w[t], rows[1][t] = w[3 + t] + w[6 + t];
        rows[2][t] = w[t] + w[3 + t], rows[3][t] = w[6 + t];
    }
    UNROLL for (int i = 0; i < 4; i++) {
        sums[4 * i] = rows[i][0], sums[4 * i + 1] = rows[i][1] + rows[i][2];
        sums[4 * i + 2] = rows[i][0] + rows[i][1], sums[4 * i + 3] = rows[i][2];
    }
}

/* Tap (i, j) as a phase, and a row and a column of its taps. */
INLINE int phase_of(int tap) { return tap / 8 * 2 + tap % 4 / 2; }
INLINE int row_of(int tap) { return tap / 4 % 2; }
INLINE int column_of(int tap) { return tap % 2; }

/* Pack weights (D, 3, 3, C + S) as (phases, D / LANES, 2, C / 2, 2, LANES, 2). */
static void pack_phases(const upsampling *s, const float *weight, bf16 *packed) {
    const int64_t C = s->channels, D = s->out_channels, step = C + s->skip_channels;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t d = 0; d < D; d += LANES)
        for (int64_t c = 0; c < C; c += LANES) {
            bits rows[16][LANES] = {0};
            for (int k = 0; k < LANES; k++) {
                vec sums[16];
                sum_taps(weight + (d + k) * 9 * step + c, step, sums);
                UNROLL for (int tap = 0; tap < 16; tap++) {
                    halves own = round_floats(sums[tap]);
                    memcpy(rows[tap] + k, &own, sizeof own);
                }
            }
            for (int tap = 0; tap < 16; tap++) {
                int64_t group = phase_of(tap) * D / LANES + d / LANES;
                int64_t at = ((group * 2 + row_of(tap)) * C / 2 + c / 2) * 2 + column_of(tap);
                transpose(rows[tap]);
                for (int k = 0; k < LANES / 2; k++)
                    memcpy(packed + (at + 2 * k) * 2 * LANES, rows[tap] + k, sizeof **rows);
            }
        }
}

/* Pack them for the gradient of x: (C / LANES, 2, phases, D / 2, 2, LANES, 2), taps in reverse. */
static void pack_phases_reversed(const upsampling *s, const float *weight, bf16 *packed) {
    const int64_t C = s->channels, D = s->out_channels, step = C + s->skip_channels;
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < C; c += LANES)
        for (int64_t d = 0; d < D; d += 2) {
            vec one[16], two[16];
            sum_taps(weight + d * 9 * step + c, step, one);
            sum_taps(weight + (d + 1) * 9 * step + c, step, two);
            UNROLL for (int tap = 0; tap < 16; tap++) {
                int64_t row = (c / LANES * 2 + 1 - row_of(tap)) * PHASES + phase_of(tap);
                int64_t at = (row * D / 2 + d / 2) * 2 + 1 - column_of(tap);
                write_pairs(packed + at * 2 * LANES, round_floats(one[tap]),
                            round_floats(two[tap]));
            }
        }
}

/* Write LANES channels of the rows of y that a strip becomes, and measure them. ``sums``: of the
   phases, one after the other; ``of_skip``: of the skip connection, or NULL. */
static void finish_forward(const upsampling *s, const both_strips *cuts, const float *sums,
                           const float *of_skip, int64_t rows, bf16 *out, double *m) {
    const int64_t step = cuts->coarse.tiles * TILE * LANES, width = 2 * s->width;
    float shift[LANES];
    vec start = loadf(sums), first = {0}, second = {0};
    if (of_skip) start += loadf(of_skip);
    storef(shift, start);
    for (int64_t r = 0; r < 2 * rows; r++) {
        const float *own = sums + r % 2 * 2 * step + r / 2 * cuts->coarse.pitch * LANES;
        for (int64_t j = 0; j < width; j++) {
            vec v = loadf(own + j % 2 * step + j / 2 * LANES);
            if (of_skip) v += loadf(of_skip + (r * cuts->fine.pitch + j) * LANES);
            vec d = v - start;
            first += d;
            second += d * d;
            store(out + (r * width + j) * s->out_channels, v);
        }
    }
    double totals[2][LANES] = {0};
    add_sums(totals[0], &first, 1);
    add_sums(totals[1], &second, 1);
    write_moments(m, s->out_channels, 2 * rows * width, shift, totals[0], totals[1]);
}

/* Compute the rows of y that a strip becomes. ``packed``: the weights of x, then of skip. */
static void forward_strip(const upsampling *s, const both_strips *cuts, const norm *before,
                          const bf16 *x, const bf16 *skip, const bf16 *packed, int64_t k, bf16 *y,
                          bf16 *strip, float *sums, double *m) {
    const strips *coarse = &cuts->coarse, *fine = &cuts->fine;
    const int64_t C = s->channels, D = s->out_channels, S = skip ? s->skip_channels : 0;
    const int64_t image = k / coarse->per_image, first = k % coarse->per_image * coarse->rows;
    const int64_t rows = MIN(coarse->rows, s->height - first);
    const conversion of_x = {before}, none = {0};
    bf16 *of_skip = strip + coarse->places * C;
    float *skip_sums = sums + PHASES * coarse->tiles * TILE * LANES;
    fill(coarse, s->height, s->width, C, &of_x, x, image, first, rows, strip);
    if (S)
        fill(fine, 2 * s->height, 2 * s->width, S, &none, skip, image, 2 * first, 2 * rows,
             of_skip);
    for (int64_t d = 0; d < D; d += LANES) {
        for (int64_t phase = 0; phase < PHASES; phase++)
            multiply_rows(strip + (phase / 2 * coarse->pitch + phase % 2) * BLOCK, coarse, rows,
                          s->width, C / BLOCK, packed + (phase * D + d) * 4 * C,
                          sums + phase * coarse->tiles * TILE * LANES, 2);
        if (S)
            multiply_rows(of_skip, fine, 2 * rows, 2 * s->width, S / BLOCK,
                          packed + 16 * C * D + 9 * S * d, skip_sums, 3);
        finish_forward(s, cuts, sums, S ? skip_sums : NULL, rows,
                       y + (image * s->height + first) * 4 * s->width * D + d, m + d);
    }
}

int useg_upsample(const upsampling *s, const norm *before, const norm *after, const bf16 *x,
                  const bf16 *skip, const float *weight, bf16 *y) {
    const int64_t C = s->channels, D = s->out_channels, S = s->skip_channels;
    const both_strips cuts = cut_both(s, 2 * C + 8 * S + 2 * PHASES * 4 * LANES);
    bf16 *packed = allocate((16 * C + 9 * S) * D * sizeof *packed);
    double *m = malloc(cuts.coarse.number * 4 * D * sizeof *m);
    int64_t failed = !packed || !m;
    if (!failed) pack_phases(s, weight, packed);
    if (!failed && S) pack(weight + C, C + S, S, D, packed + 16 * C * D);
    const int64_t length = PHASES * cuts.coarse.tiles + cuts.fine.tiles;
#pragma omp parallel for schedule(dynamic) reduction(+ : failed) if (!failed)
    for (int64_t k = 0; k < (failed ? 0 : cuts.coarse.number); k++) {
        bf16 *strip = allocate((cuts.coarse.places * C + cuts.fine.places * S) * sizeof *strip);
        float *sums = allocate(length * TILE * LANES * sizeof *sums);
        if (!strip || !sums) failed += 1;
        else forward_strip(s, &cuts, before, x, skip, packed, k, y, strip, sums, m + k * 4 * D);
        free(strip), free(sums);
    }
    if (!failed)
        set_moments(after, D, 4 * s->images * s->height * s->width, m, cuts.coarse.number);
    free(packed), free(m);
    return failed;
}

/* ---------------------------------------------------------------- backward */

/* Memory of one thread. */
typedef struct {
    bf16 *x, *skip, *g, *phases;
    place_pairs pairs, fine_pairs;
    float *sums;
} workplace;

static size_t reserve(const upsampling *s, const both_strips *cuts, char *memory, workplace *w) {
    const strips *coarse = &cuts->coarse, *fine = &cuts->fine;
    const int64_t C = s->channels, D = s->out_channels, S = s->skip_channels;
    const int64_t step = pairs_step(coarse), wide = pairs_step(fine);
    const size_t lengths[] = {2 * coarse->places * C,
                              2 * fine->places * S,
                              2 * fine->places * D,
                              2 * PHASES * coarse->places * D,
                              MAX(2 * C / LANES * step, wide),
                              2 * D / LANES * wide,
                              2 * D / LANES * wide,
                              4 * fine->tiles * TILE * LANES};
    char *parts[8];
    size_t used = 0;
    for (int k = 0; k < 8; k++) {
        parts[k] = memory + used;
        used += (lengths[k] + 63) / 64 * 64;
    }
    bf16 **p = (bf16 **)parts;
    *w = (workplace){p[0], p[1], p[2], p[3], {p[4], p[5], p[6], step}, {p[4], p[5], p[6], wide},
                     (float *)parts[7]};
    return used;
}

/* Sort the places of a strip of gradients by phase. Row i and column j of phase (a, b) are row
   i - a and column j - b of the gradients of that phase. */
static void separate_phases(const upsampling *s, const both_strips *cuts, const bf16 *g,
                            int64_t rows, bf16 *phases) {
    const strips *coarse = &cuts->coarse, *fine = &cuts->fine;
    const int64_t blocks = s->out_channels / BLOCK, size = BLOCK * sizeof *g;
    for (int64_t phase = 0; phase < PHASES; phase++)
        for (int64_t b = 0; b < blocks; b++) {
            const bf16 *own = g + b * fine->places * BLOCK;
            bf16 *out = phases + (phase * blocks + b) * coarse->places * BLOCK;
            memset(out, 0, LEAD * size);
            out += LEAD * BLOCK;
            for (int64_t r = 0; r <= rows; r++, out += coarse->pitch * BLOCK) {
                const bf16 *from = own
                    + ((2 * r + 1 - phase / 2) * fine->pitch + 1 - phase % 2) * BLOCK;
                for (int64_t j = 0; j <= s->width; j++)
                    memcpy(out + j * BLOCK, from + 2 * j * BLOCK, size);
                memset(out + (s->width + 1) * BLOCK, 0, (coarse->pitch - s->width - 1) * size);
            }
        }
}

/* Add the gradients of the weights of x from one strip:
   (phases, D / LANES, C / BLOCK, 2, 2, BLOCK, LANES). */
static void add_phase_gradients(const upsampling *s, const both_strips *cuts, const workplace *w,
                                int64_t rows, float *gradients, int is_first) {
    const strips *coarse = &cuts->coarse;
    const int64_t C = s->channels, D = s->out_channels, pitch = coarse->pitch;
    const int64_t number = rows * pitch / 2, step = w->pairs.step, half = step / 2;
    for (int64_t c = 0; c < C / BLOCK; c++)
        pair_places(w->x + c * coarse->places * BLOCK, 0, (rows + 2) * pitch / 2, 1,
                    w->pairs.x + c * half);
    for (int64_t phase = 0; phase < PHASES; phase++) {
        const int64_t top = phase / 2;
        pair_gradients(coarse, D, w->phases + phase * D * coarse->places, LEAD + top * pitch,
                       number, &w->pairs);
        for (int64_t block = 0; block < D / LANES * C / BLOCK; block++) {
            int64_t d = block / (C / BLOCK), c = block % (C / BLOCK);
            for (int64_t u = 0; u < 2; u++, gradients += 2 * BLOCK * LANES)
                add_products(w->pairs.x + c * half + (top + u) * pitch * BLOCK,
                             w->pairs.even + d * step + 2 * LANES, w->pairs.odd + d * step, number,
                             gradients, 2, is_first);
        }
    }
}

static void backward_strip(const upsampling *s, const both_strips *cuts, const norm *before,
                           const conversion *of_g, const bf16 *x, const bf16 *skip,
                           const bf16 *packed, const bf16 *g, bf16 *gx, bf16 *skip_gradient,
                           int64_t k, const workplace *w, float *gradients, double *totals,
                           int is_first) {
    const strips *coarse = &cuts->coarse, *fine = &cuts->fine;
    const int64_t C = s->channels, D = s->out_channels, S = s->skip_channels;
    const int64_t image = k / coarse->per_image, first = k % coarse->per_image * coarse->rows;
    const int64_t rows = MIN(coarse->rows, s->height - first);
    const int64_t start = (image * s->height + first) * s->width;
    const conversion of_x = {before}, none = {0};
    fill(coarse, s->height, s->width, C, &of_x, x, image, first, rows, w->x);
    fill(fine, 2 * s->height, 2 * s->width, D, of_g, g, image, 2 * first, 2 * rows, w->g);
    separate_phases(s, cuts, w->g, rows, w->phases);
    for (int64_t c = 0; c < C; c += LANES) {
        multiply_rows(w->phases + LEAD * BLOCK, coarse, rows, s->width, PHASES * D / BLOCK,
                      packed + 16 * D * c, w->sums, 2);
        finish_backward(coarse, s->width, C, before, w->sums, rows, x + start * C, gx + start * C,
                        c, totals);
    }
    add_phase_gradients(s, cuts, w, rows, gradients, is_first);
    if (!S) return;
    fill(fine, 2 * s->height, 2 * s->width, S, &none, skip, image, 2 * first, 2 * rows, w->skip);
    for (int64_t c = 0; c < S; c += LANES) {
        multiply_rows(w->g, fine, 2 * rows, 2 * s->width, D / BLOCK,
                      packed + 16 * C * D + 9 * D * c, w->sums, 3);
        finish_backward(fine, 2 * s->width, S, NULL, w->sums, 2 * rows, NULL,
                        skip_gradient + 4 * start * S, c, NULL);
    }
    add_weight_gradients(fine, S, D, w->skip, w->g, 2 * rows, &w->fine_pairs,
                         gradients + 16 * C * D, is_first);
}

/* The gradients of the weights of x, from those of all chunks. */
static void add_phase_chunks(const upsampling *s, int64_t chunks, const float *gradients,
                             int64_t length, float *weight_gradient) {
    const int64_t C = s->channels, D = s->out_channels, step = C + s->skip_channels;
    const int64_t blocks = D / LANES * C / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        vec sums[16][BLOCK] = {0};
        for (int64_t k = 0; k < chunks; k++)
            for (int tap = 0; tap < 16; tap++) {
                int64_t place = (phase_of(tap) * blocks + block) * 4 + 2 * row_of(tap)
                    + column_of(tap);
                const float *own = gradients + k * length + place * BLOCK * LANES;
                for (int n = 0; n < BLOCK; n++) sums[tap][n] += loadf(own + n * LANES);
            }
        int64_t c = block % (C / BLOCK) * BLOCK, d = block / (C / BLOCK) * LANES;
        /* Along one axis, these two taps have weight r in their sums. */
        static const int TAPS[3][2] = {{0, 2}, {1, 2}, {1, 3}};
        for (int t = 0; t < 9; t++) {
            const int *of_row = TAPS[t / 3], *of_column = TAPS[t % 3];
            vec own[BLOCK] = {0};
            for (int k = 0; k < 4; k++)
                for (int n = 0; n < BLOCK; n++)
                    own[n] += sums[4 * of_row[k / 2] + of_column[k % 2]][n];
            write_tap(own, weight_gradient, step, d, t, c);
        }
    }
}

int useg_upsample_backward(const upsampling *s, const norm *before, const conversion *of_g,
                           const bf16 *x, const bf16 *skip, const float *weight, const bf16 *g,
                           bf16 *gx, bf16 *skip_gradient, float *weight_gradient, float *slopes,
                           float *constants) {
    const int64_t C = s->channels, D = s->out_channels, S = s->skip_channels;
    both_strips cuts = cut_both(s, 2 * C + 8 * S + 32 * D + 16 * LANES + 8 * BLOCK);
    const int64_t length = (16 * C + 9 * S) * D, wide = (S + LANES - 1) / LANES * LANES;
    const int64_t fitting = GRADIENTS_BYTES / (length * (int64_t)sizeof *weight);
    const int64_t chunks = MIN(cuts.coarse.chunks, MAX(MIN_CHUNKS, fitting));
    bf16 *packed = allocate((16 * C + 9 * wide) * D * sizeof *packed);
    float *gradients = allocate(chunks * length * sizeof *gradients);
    double *totals = calloc(chunks * 2 * C, sizeof *totals);
    int64_t failed = !packed || !gradients || !totals;
    if (!failed) pack_phases_reversed(s, weight, packed);
    if (!failed && S) pack_reversed(weight + C, C + S, S, D, packed + 16 * C * D);
#pragma omp parallel for schedule(dynamic) reduction(+ : failed) if (!failed)
    for (int64_t chunk = 0; chunk < (failed ? 0 : chunks); chunk++) {
        workplace w;
        char *memory = allocate(reserve(s, &cuts, NULL, &w));
        if (memory) reserve(s, &cuts, memory, &w);
        else failed += 1;
        const int64_t from = cuts.coarse.number * chunk / chunks;
        for (int64_t k = from; memory && k < cuts.coarse.number * (chunk + 1) / chunks; k++)
            backward_strip(s, &cuts, before, of_g, x, skip, packed, g, gx, skip_gradient, k, &w,
                           gradients + chunk * length, totals + chunk * 2 * C, k == from);
        free(memory);
    }
    if (!failed) add_phase_chunks(s, chunks, gradients, length, weight_gradient);
    if (!failed && S)
        add_chunks(S, D, chunks, gradients + 16 * C * D, length, C + S, weight_gradient + C);
    if (!failed && before) {
        add_totals(C, chunks, totals);
        set_gradients(before, C, s->images * s->height * s->width, totals, totals + C, slopes,
                      constants);
    }
    free(packed), free(gradients), free(totals);
    return failed;
}

#endif
