/* 1x1 convolutions of a network in training, in bf16, channels last: products of matrices.

   All three products (of the features with the weights, and the two gradients) are sums over pairs
   of numbers, as the processor multiplies them. One factor is read as it is, a pair at a time. The
   other is packed into vectors of LANES pairs: (vectors, pairs, LANES, 2). Channels are multiples
   of 8; the lanes that are missing in a last vector hold zeros.

   As convolutions.c, this is for processors that multiply bf16 numbers in vectors, but not
   matrices. */

#include "layers.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

/* Pixels multiplied by one thread at once: a multiple of the rows of every tile. */
#define PANEL 48
/* Vectors of a tile at most. */
#define WIDE 3
/* Vectors of sums of a tile at most: they and its factors fit into registers. */
#define MAX_SUMS 24
/* The packed factors of a part of the gradient of the weights take about so many bytes. */
#define PART_BYTES (512 << 10)

static int64_t count_vectors(int64_t channels) { return (channels + LANES - 1) / LANES; }

INLINE halves read_lanes(const bf16 *p, int64_t lanes) {
    halves h = {0};
    if (lanes >= LANES) memcpy(&h, p, sizeof h);
    else memcpy(&h, p, sizeof h / 2);
    return h;
}

/* Pack weights (D, C) into vectors of output channels, with pairs of input channels. */
static void pack(const float *weight, int64_t D, int64_t C, bf16 *packed) {
#pragma omp parallel for schedule(static)
    for (int64_t v = 0; v < count_vectors(D); v++)
        for (int64_t c = 0; c < C; c += 2 * LANES) {
            bits rows[LANES];
            for (int64_t k = 0; k < LANES; k++) {
                /* Where there are no more output channels: zeros. */
                int64_t d = v * LANES + k, left = d < D ? C - c : 0;
                const float *own = weight + d * C + c;
                rows[k] = (bits)_mm512_cvtne2ps_pbh((__m512)read_floats(own + LANES, left - LANES),
                                                    (__m512)read_floats(own, left));
            }
            transpose(rows);
            memcpy(packed + (v * C + c) * LANES, rows, MIN(LANES, (C - c) / 2) * sizeof *rows);
        }
}

/* Pack them into vectors of input channels, with pairs of output channels. */
static void pack_transposed(const float *weight, int64_t D, int64_t C, bf16 *packed) {
#pragma omp parallel for schedule(static)
    for (int64_t v = 0; v < count_vectors(C); v++)
        for (int64_t d = 0; d < D; d += 2) {
            const float *own = weight + d * C + v * LANES;
            int64_t lanes = C - v * LANES;
            write_pairs(packed + (v * D + d) * LANES, round_floats(read_floats(own, lanes)),
                        round_floats(read_floats(own + C, lanes)));
        }
}

/* Pack one vector of the channels of x (pixels, channels), with pairs of pixels. */
static void pack_pixels(const bf16 *x, int64_t pixels, int64_t channels, int64_t v, bf16 *packed) {
    int64_t lanes = channels - v * LANES;
    const bf16 *own = x + v * LANES;
    for (int64_t p = 0; p < pixels; p += 2, own += 2 * channels, packed += 2 * LANES) {
        halves next = {0};
        if (p + 1 < pixels) next = read_lanes(own + channels, lanes);
        write_pairs(packed, read_lanes(own, lanes), next);
    }
}

/* Add products to a tile of sums (rows, vectors). Pair k of row i of the first factor is at
   a + i * row_step + k * pair_step. */
INLINE void multiply(const bf16 *a, int64_t row_step, int64_t pair_step, const bf16 *packed,
                     int64_t pairs, vec *sums, int rows, int vectors) {
    for (int64_t k = 0; k < pairs; k++, a += pair_step, packed += 2 * LANES) {
        products w[WIDE];
        UNROLL for (int v = 0; v < vectors; v++)
            w[v] = (products)_mm512_loadu_si512(packed + v * pairs * 2 * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, a + i * row_step, sizeof pair);
            products x = (products)_mm512_set1_epi32(pair);
            UNROLL for (int v = 0; v < vectors; v++) {
                vec *own = sums + i * vectors + v;
                *own = (vec)_mm512_dpbf16_ps((__m512)*own, w[v], x);
            }
        }
    }
}

/* Multiply ``rows`` rows of x at a time, from p on; returns the first row that is left over. */
INLINE int64_t multiply_rows(const bf16 *x, int64_t C, const bf16 *packed, int64_t D, int64_t d,
                             const bf16 *added, bf16 *y, int64_t p, int64_t end, int rows,
                             int vectors) {
    for (; p + rows <= end; p += rows) {
        vec sums[MAX_SUMS];
        UNROLL for (int t = 0; t < rows * vectors; t++) sums[t] = (vec){0};
        multiply(x + p * C, C, 2, packed, C / 2, sums, rows, vectors);
        UNROLL for (int t = 0; t < rows * vectors; t++) {
            int64_t at = (p + t / vectors) * D + d + t % vectors * LANES;
            int64_t lanes = D - d - t % vectors * LANES;
            if (added) {
                halves own = read_lanes(added + at, lanes);
                sums[t] += load((bf16 *)&own);
            }
            halves rounded = round_floats(sums[t]);
            if (lanes >= LANES) memcpy(y + at, &rounded, sizeof rounded);
            else memcpy(y + at, &rounded, sizeof rounded / 2);
        }
    }
    return p;
}

/* y (pixels, D) = x (pixels, C) times packed weights, plus ``added`` if it is not NULL. */
static void multiply_pixels(const bf16 *x, int64_t pixels, int64_t C, const bf16 *packed, int64_t D,
                            const bf16 *added, bf16 *y) {
    const int64_t panels = (pixels + PANEL - 1) / PANEL;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t v = 0; v < count_vectors(D); v += WIDE) {
            int64_t p = panel * PANEL, end = MIN(pixels, p + PANEL), d = v * LANES;
            const bf16 *own = packed + d * C;
#define CALL(ROWS, VECTORS)                                                                        \
    p = multiply_rows(x, C, own, D, d, added, y, p, end, ROWS, VECTORS)
            switch (MIN(WIDE, count_vectors(D) - v)) {
            case 1: CALL(16, 1), CALL(1, 1); break;
            case 2: CALL(12, 2), CALL(1, 2); break;
            default: CALL(8, 3), CALL(1, 3);
            }
#undef CALL
        }
}

/* Add to the gradients (D, C) of ``rows`` output channels and some vectors of input channels. */
INLINE void add_gradients(const bf16 *g, const bf16 *x, int64_t pairs, int64_t lanes, int64_t C,
                          float *gradient, int is_first, int rows, int vectors) {
    vec sums[MAX_SUMS];
    UNROLL for (int t = 0; t < rows * vectors; t++) {
        int64_t v = t % vectors * LANES;
        sums[t] = (vec){0};
        if (!is_first) sums[t] = read_floats(gradient + t / vectors * C + v, lanes - v);
    }
    multiply(g, 2, 2 * LANES, x, pairs, sums, rows, vectors);
    UNROLL for (int t = 0; t < rows * vectors; t++) {
        int64_t v = t % vectors * LANES;
        write_floats(gradient + t / vectors * C + v, sums[t], lanes - v);
    }
}

/* The gradient of the weights (D, C). Each number is the sum over all pixels in their order,
   whatever the number of threads. */
static int sum_gradients(const pointwise *s, const bf16 *x, const bf16 *g, float *gradient) {
    const int64_t C = s->channels, D = s->out_channels;
    const int64_t of_x = count_vectors(C), of_g = count_vectors(D);
    const int64_t part = MAX(128, PART_BYTES / (2 * LANES * (of_x + of_g)) / 2 * 2);
    const int64_t length = MIN(part, s->pixels + 1) / 2 * 2 * LANES;
    bf16 *packed = allocate(length * (of_x + of_g) * sizeof *packed);
    if (!packed) return 1;
    bf16 *packed_g = packed + length * of_x;
#pragma omp parallel
    for (int64_t p = 0; p < s->pixels; p += part) {
        const int64_t number = MIN(part, s->pixels - p), pairs = (number + 1) / 2;
#pragma omp for schedule(static)
        for (int64_t v = 0; v < of_x + of_g; v++)
            if (v < of_x) pack_pixels(x + p * C, number, C, v, packed + v * pairs * 2 * LANES);
            else
                pack_pixels(g + p * D, number, D, v - of_x,
                            packed_g + (v - of_x) * pairs * 2 * LANES);
#pragma omp for collapse(2) schedule(static)
        for (int64_t d = 0; d < D; d += 8)
            for (int64_t v = 0; v < of_x; v += WIDE) {
                const bf16 *own_g = packed_g + (d / LANES * pairs * LANES + d % LANES) * 2;
                const bf16 *own = packed + v * pairs * 2 * LANES;
                float *out = gradient + d * C + v * LANES;
#define CALL(VECTORS) add_gradients(own_g, own, pairs, C - v * LANES, C, out, !p, 8, VECTORS)
                switch (MIN(WIDE, of_x - v)) {
                case 1: CALL(1); break;
                case 2: CALL(2); break;
                default: CALL(3);
                }
#undef CALL
            }
    }
    free(packed);
    return 0;
}

int useg_pointwise_forward(const pointwise *s, const bf16 *x, const float *weight, bf16 *y) {
    const int64_t C = s->channels, D = s->out_channels;
    bf16 *packed = allocate(count_vectors(D) * LANES * C * sizeof *packed);
    if (!packed) return 1;
    pack(weight, D, C, packed);
    multiply_pixels(x, s->pixels, C, packed, D, NULL, y);
    free(packed);
    return 0;
}

/* ``added`` is added to the gradient of x, if it is not NULL. */
int useg_pointwise_backward(const pointwise *s, const bf16 *x, const float *weight, const bf16 *g,
                            const bf16 *added, bf16 *gx, float *weight_gradient) {
    const int64_t C = s->channels, D = s->out_channels;
    bf16 *packed = allocate(count_vectors(C) * LANES * D * sizeof *packed);
    if (!packed) return 1;
    pack_transposed(weight, D, C, packed);
    multiply_pixels(g, s->pixels, D, packed, C, added, gx);
    free(packed);
    return sum_gradients(s, x, g, weight_gradient);
}

#else

int useg_pointwise_forward(const pointwise *s, const bf16 *x, const float *weight, bf16 *y) {
    return 1;
}

int useg_pointwise_backward(const pointwise *s, const bf16 *x, const float *weight, const bf16 *g,
                            const bf16 *added, bf16 *gx, float *weight_gradient) {
    return 1;
}

#endif
