/* Parts of 3x3 convolutions (convolutions.c) and of those of repeated pixels (upsampling.c).

   A strip holds some rows of an image in blocks of 8 channels, one after the other. Each block is
   (rows + 2, pitch, 8), with zeros around the image. So one shift of all places is one tap, and a
   tile of places may go on in the next row; what it computes for the places between rows is left
   out in the end. */

#ifndef USEG_CONVOLUTIONS_H
#define USEG_CONVOLUTIONS_H

#include "layers.h"

#define BLOCK 8
/* Places computed at once: as many vectors of sums, and three of weights, fit into registers. */
#define TILE 24
/* A strip and what is computed from it take about so many bytes. */
#define STRIP_BYTES (512 << 10)
/* Strips are distributed among so many chunks at most, whatever the number of threads. */
#define MAX_CHUNKS 32

/* How images are cut into strips. */
typedef struct {
    int64_t pitch, rows, per_image, number, chunks;
    /* Places of a block of channels, and of the sums. */
    int64_t places, tiles;
} strips;

static strips cut(int64_t images, int64_t height, int64_t pitch, int64_t rows) {
    strips c = {pitch, MAX(1, MIN(height, rows))};
    c.per_image = (height + c.rows - 1) / c.rows;
    c.number = images * c.per_image;
    c.chunks = MIN(c.number, MAX_CHUNKS);
    c.places = (c.rows + 2) * pitch + 2 * TILE;
    c.tiles = (c.rows * pitch + TILE - 1) / TILE;
    return c;
}

/* The rows of a strip whose places take so many bytes each. */
INLINE int64_t fitting_rows(int64_t pitch, int64_t bytes) { return STRIP_BYTES / (pitch * bytes); }

/* Fill two blocks of a row of a strip with LANES channels of a row of an image, converted. */
INLINE void convert_row(const conversion *how, const bf16 *x, int64_t width, int64_t channels,
                        int64_t c, int64_t at, bf16 *out, int64_t size, int is_gradient) {
    const norm n = *how->n;
    const vec scale = loadf(n.statistics + 2 * channels + c);
    const vec offset = loadf(n.statistics + 3 * channels + c);
    const vec slope = is_gradient ? loadf(how->slopes + c) : scale;
    const vec constant = is_gradient ? loadf(how->constants + c) : scale;
    for (int64_t j = 0; j < width; j++, at += channels, out += BLOCK) {
        vec v = load((is_gradient ? how->values : x) + at);
        bf16 both[LANES];
        if (is_gradient)
            store(both, lead_back(v, load(x + at), scale, offset, slope, constant, &n));
        else store(both, activate(v * scale + offset, &n));
        memcpy(out, both, BLOCK * sizeof *out);
        memcpy(out + size, both + BLOCK, BLOCK * sizeof *out);
    }
}

/* Fill a strip with rows from ``first`` - 1 to ``first`` + ``rows`` of an image of ``x`` (images,
   height, width, channels). */
static void fill(const strips *cuts, int64_t height, int64_t width, int64_t channels,
                 const conversion *how, const bf16 *x, int64_t image, int64_t first, int64_t rows,
                 bf16 *strip) {
    const int64_t size = cuts->places * BLOCK, C = channels, W = width;
    for (int64_t c = 0; c < C; c += BLOCK)
        for (int64_t r = 0; r < rows + 2; r++) {
            bf16 *out = strip + c / BLOCK * size + r * cuts->pitch * BLOCK;
            int64_t row = first - 1 + r, at = (image * height + row) * W * C + c;
            int is_outside = row < 0 || row >= height;
            memset(out, 0, (is_outside ? cuts->pitch : 1) * BLOCK * sizeof *out);
            if (is_outside) continue;
            memset(out + (W + 1) * BLOCK, 0, (cuts->pitch - W - 1) * BLOCK * sizeof *out);
            if (!how->n)
                for (int64_t j = 0; j < W; j++)
                    memcpy(out + (j + 1) * BLOCK, x + at + j * C, BLOCK * sizeof *out);
            else if (c % LANES) continue;
            else if (how->values) convert_row(how, x, W, C, c, at, out + BLOCK, size, 1);
            else convert_row(how, x, W, C, c, at, out + BLOCK, size, 0);
        }
}

/* Pack weights (out_channels, 3, 3, channels), which are ``step`` apart, for the forward pass. */
static void pack(const float *weight, int64_t step, int64_t C, int64_t D, bf16 *packed) {
    const int64_t pairs = C / 2;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t d = 0; d < D; d += LANES)
        for (int64_t t = 0; t < 9; t++)
            for (int64_t c = 0; c < C; c += LANES) {
                bits rows[LANES] = {0};
                const int64_t number = MIN(LANES, C - c);
                for (int k = 0; k < LANES; k++) {
                    const float *own = weight + ((d + k) * 9 + t) * step + c;
                    halves rounded = round_floats(read_floats(own, number));
                    memcpy(rows + k, &rounded, sizeof rounded);
                }
                transpose(rows);
                int64_t first = ((d / LANES * 3 + t / 3) * pairs + c / 2) * 3 + t % 3;
                for (int k = 0; k < number / 2; k++)
                    memcpy(packed + (first + 3 * k) * 2 * LANES, rows + k, sizeof *rows);
            }
}

/* Pack them for the gradient of the input: taps in reverse order, and the channels exchanged. */
static void pack_reversed(const float *weight, int64_t step, int64_t C, int64_t D, bf16 *packed) {
    const int64_t pairs = D / 2;
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t t = 0; t < 9; t++)
            for (int64_t c = 0; c < C; c += LANES) {
                const float *own = weight + (2 * pair * 9 + 8 - t) * step + c;
                int64_t at = ((c / LANES * 3 + t / 3) * pairs + pair) * 3 + t % 3;
                write_pairs(packed + at * 2 * LANES, round_floats(read_floats(own, C - c)),
                            round_floats(read_floats(own + 9 * step, C - c)));
            }
}

/* Multiply ``tile`` places with the weights of LANES output channels, packed as
   (taps, blocks, BLOCK / 2, taps, LANES, 2). */
INLINE void multiply(const bf16 *strip, const strips *cuts, int64_t blocks, const bf16 *weight,
                     float *out, int taps, int tile) {
    vec sum[TILE];
    UNROLL for (int p = 0; p < tile; p++) sum[p] = (vec){0};
    for (int64_t v = 0; v < taps; v++)
        for (int64_t b = 0; b < blocks; b++) {
            const bf16 *own = strip + (b * cuts->places + v * cuts->pitch) * BLOCK;
            for (int k = 0; k < BLOCK / 2; k++, own += 2, weight += taps * 2 * LANES) {
                products w[3];
                UNROLL for (int u = 0; u < taps; u++)
                    w[u] = (products)_mm512_loadu_si512(weight + u * 2 * LANES);
                /* Each pair of numbers is loaded once for all taps of a row. */
                UNROLL for (int p = 0; p < tile + taps - 1; p++) {
                    int32_t pair;
                    memcpy(&pair, own + p * BLOCK, sizeof pair);
                    products x = (products)_mm512_set1_epi32(pair);
                    UNROLL for (int u = 0; u < taps; u++)
                        if (p >= u && p < tile + u)
                            sum[p - u] = (vec)_mm512_dpbf16_ps((__m512)sum[p - u], w[u], x);
                }
            }
        }
    UNROLL for (int p = 0; p < tile; p++) storef(out + p * LANES, sum[p]);
}

/* Multiply all places of some rows, from the first pixel to the last. */
INLINE void multiply_rows(const bf16 *strip, const strips *cuts, int64_t rows, int64_t width,
                          int64_t blocks, const bf16 *weight, float *out, int taps) {
    const int64_t number = (rows - 1) * cuts->pitch + width;
    int64_t p = 0;
#define CALL(SIZE)                                                                                 \
    multiply(strip + p * BLOCK, cuts, blocks, weight, out + p * LANES, taps, SIZE), p += SIZE
    while (number - p > 2 * TILE / 3) CALL(TILE);
    while (number - p > TILE / 3) CALL(2 * TILE / 3);
    while (number - p > 0) CALL(TILE / 3);
#undef CALL
}

/* Store pairs of neighbouring places: (number, channels, 2), of one block or two. */
INLINE void pair_places(const bf16 *strip, int64_t size, int64_t number, int blocks, bf16 *out) {
    for (int64_t k = 0; k < number; k++)
        for (int b = 0; b < blocks; b++) {
            __m128i one, two;
            memcpy(&one, strip + b * size + 2 * k * BLOCK, sizeof one);
            memcpy(&two, strip + b * size + (2 * k + 1) * BLOCK, sizeof two);
            __m128i low = _mm_unpacklo_epi16(one, two), high = _mm_unpackhi_epi16(one, two);
            memcpy(out + (k * blocks + b) * 2 * BLOCK, &low, sizeof low);
            memcpy(out + (k * blocks + b) * 2 * BLOCK + BLOCK, &high, sizeof high);
        }
}

/* Add to the gradients of the taps of one row of the weights, of BLOCK by LANES channels.
   x: pairs of places of one block. even, odd: pairs of gradients, the first of which is that of
   place 0, and place -1. ``is_first``: there are no gradients yet. */
INLINE void add_products(const bf16 *x, const bf16 *even, const bf16 *odd, int64_t number,
                         float *sums, int taps, int is_first) {
    vec sum[3][BLOCK];
    UNROLL for (int t = 0; t < taps * BLOCK; t++)
        sum[t / BLOCK][t % BLOCK] = is_first ? (vec){0} : loadf(sums + t * LANES);
    for (int64_t k = 0; k < number; k++) {
        products g[3] = {(products)_mm512_loadu_si512(even + k * 2 * LANES),
                         (products)_mm512_loadu_si512(odd + k * 2 * LANES)};
        if (taps == 3) g[2] = (products)_mm512_loadu_si512(even + (k - 1) * 2 * LANES);
        UNROLL for (int c = 0; c < BLOCK; c++) {
            int32_t pair;
            memcpy(&pair, x + (k * BLOCK + c) * 2, sizeof pair);
            products p = (products)_mm512_set1_epi32(pair);
            UNROLL for (int u = 0; u < taps; u++)
                sum[u][c] = (vec)_mm512_dpbf16_ps((__m512)sum[u][c], g[u], p);
        }
    }
    UNROLL for (int t = 0; t < taps * BLOCK; t++)
        storef(sums + t * LANES, sum[t / BLOCK][t % BLOCK]);
}

/* Write up to LANES channels of the gradient of the input (rows, width, channels), c and those that
   follow: of the values before ``before``, without what its statistics contribute. ``totals`` are
   sums of it, and of its product with x - mean. */
static void finish_backward(const strips *cuts, int64_t width, int64_t channels, const norm *before,
                            const float *sums, int64_t rows, const bf16 *x, bf16 *gx, int64_t c,
                            double *totals) {
    vec mean = {0}, scale = {0}, offset = {0}, first = {0}, second = {0};
    if (before) {
        mean = loadf(before->statistics + c);
        scale = loadf(before->statistics + 2 * channels + c);
        offset = loadf(before->statistics + 3 * channels + c);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j++) {
            int64_t at = (r * width + j) * channels + c;
            vec g = loadf(sums + (r * cuts->pitch + j) * LANES);
            if (before) {
                vec v = load(x + at);
                g = keep(passes(v * scale + offset, before), g);
                first += g;
                second += g * (v - mean);
            }
            if (channels - c >= LANES) store(gx + at, g);
            else {
                halves rounded = round_floats(g);
                memcpy(gx + at, &rounded, sizeof rounded / 2);
            }
        }
    for (int k = 0; k < LANES && before; k++) {
        totals[c + k] += first[k];
        totals[channels + c + k] += second[k];
    }
}

/* Pairs of the places of a strip of gradients and of features, for the gradients of the weights. */
typedef struct {
    bf16 *x, *even, *odd;
    /* From the pairs of LANES channels to those of the next. */
    int64_t step;
} place_pairs;

INLINE int64_t pairs_step(const strips *cuts) { return (cuts->places / 2 + 2) * 2 * LANES; }

/* Pair the gradients of ``channels`` channels, from place ``from`` on: from before ``even`` on, so
   that there are those of the places -2 and -1. */
static void pair_gradients(const strips *cuts, int64_t channels, const bf16 *strip, int64_t from,
                           int64_t number, const place_pairs *p) {
    const int64_t size = cuts->places * BLOCK;
    for (int64_t d = 0; d < channels / LANES; d++) {
        const bf16 *own = strip + 2 * d * size + from * BLOCK;
        pair_places(own - 2 * BLOCK, size, number + 1, 2, p->even + d * p->step);
        pair_places(own - BLOCK, size, number, 2, p->odd + d * p->step);
    }
}

/* Add the gradients of the weights of 3x3 convolutions from one strip:
   (D / LANES, C / BLOCK, 3, 3, BLOCK, LANES). */
static void add_weight_gradients(const strips *cuts, int64_t C, int64_t D, const bf16 *x,
                                 const bf16 *g, int64_t rows, const place_pairs *p,
                                 float *gradients, int is_first) {
    const int64_t number = rows * cuts->pitch / 2;
    /* Place 0 is the first pixel of the second row of the strip. */
    pair_gradients(cuts, D, g, cuts->pitch + 1, number, p);
    for (int64_t c = 0; c < C / BLOCK; c++) {
        pair_places(x + c * cuts->places * BLOCK, 0, (rows + 2) * cuts->pitch / 2, 1, p->x);
        for (int64_t d = 0; d < D / LANES; d++)
            for (int64_t v = 0; v < 3; v++)
                add_products(p->x + v * cuts->pitch * BLOCK, p->even + d * p->step + 2 * LANES,
                             p->odd + d * p->step, number,
                             gradients + ((d * C / BLOCK + c) * 3 + v) * 3 * BLOCK * LANES, 3,
                             is_first);
    }
}

/* Write the gradients of tap t of BLOCK by LANES channels, from c and d on. */
INLINE void write_tap(const vec *sums, float *weight_gradient, int64_t step, int64_t d, int64_t t,
                      int64_t c) {
    bits rows[LANES] = {0};
    memcpy(rows, sums, BLOCK * sizeof *sums);
    transpose(rows);
    for (int k = 0; k < LANES; k++)
        memcpy(weight_gradient + ((d + k) * 9 + t) * step + c, rows + k, BLOCK * sizeof(float));
}

/* The gradients of the weights (D, 3, 3, C), which are ``step`` apart, from those of all chunks,
   which are ``length`` apart. */
static void add_chunks(int64_t C, int64_t D, int64_t chunks, const float *gradients, int64_t length,
                       int64_t step, float *weight_gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < 9 * C * D / (BLOCK * LANES); part++) {
        int64_t t = part % 9, block = part / 9;
        int64_t c = block % (C / BLOCK) * BLOCK, d = block / (C / BLOCK) * LANES;
        vec sums[BLOCK] = {0};
        for (int64_t k = 0; k < chunks; k++)
            for (int i = 0; i < BLOCK; i++)
                sums[i] += loadf(gradients + k * length + (part * BLOCK + i) * LANES);
        write_tap(sums, weight_gradient, step, d, t, c);
    }
}

/* Add the totals (2, channels) of all chunks to those of the first. */
static void add_totals(int64_t channels, int64_t chunks, double *totals) {
    for (int64_t k = 1; k < chunks; k++)
        for (int64_t c = 0; c < 2 * channels; c++) totals[c] += totals[k * 2 * channels + c];
}

#endif
