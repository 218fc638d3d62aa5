/* Layers of a network in training, in bf16, channels last: what PyTorch's own kernels do slowly.

   Batch normalisation with ReLU or ReLU6, depthwise convolutions, weights of repeated pixels, and
   the loss, forward and backward. All sums are in fp32 or wider, in an order that does not depend
   on the number of threads.
   kernels.py compiles this file and says what the arguments are. */

#include "kernels.h"

/* As omp.h declares it, which not every compiler brings. */
int omp_get_max_threads(void);

int useg_norm_forward(const norm *n, const bf16 *x, const bf16 *residual, bf16 *y, int64_t pixels,
                      int64_t channels) {
    return measure(n, x, pixels, channels) || apply(n, x, residual, y, pixels, channels);
}

int useg_norm_backward(const norm *n, const bf16 *x, const bf16 *g, bf16 *gx, int64_t pixels,
                       int64_t channels) {
    float *slopes = malloc(2 * channels * sizeof *slopes), *constants = slopes + channels;
    int failed = !slopes || measure_gradients(n, x, g, pixels, channels, slopes, constants)
        || apply_gradients(n, x, g, gx, pixels, channels, slopes, constants);
    free(slopes);
    return failed;
}

/* ---------------------------------------------------------------- depthwise convolutions

   y = after(filter(before(x))), where "before" and "after" are batch normalisations with their
   activations, or missing. No channel needs another one. So a group of channels goes through all
   passes, while its maps are in the cache, before the next one begins.

   Rows are converted to fp32 once, and normalised on the way, into a ring of as many rows as the
   kernel has. Zeros on both sides of a row make edges like any other place. */

#define MAX_KERNEL 5
#define MAX_VECTORS 2

typedef struct {
    int64_t images, height, width, channels, kernel, stride, padding, out_height, out_width;
} sizes;

typedef double wide __attribute__((vector_size(8 * LANES)));

/* A batch normalisation of one group, of ``vectors`` vectors of channels. ``limits`` are a copy:
   what is stored between two pixels might change the original, as far as the compiler knows. */
typedef struct {
    const norm *n;
    norm limits;
    vec shift[MAX_VECTORS], scale[MAX_VECTORS], offset[MAX_VECTORS];
    vec slope[MAX_VECTORS], constant[MAX_VECTORS];
    wide first[MAX_VECTORS], second[MAX_VECTORS];
} group_norm;

INLINE group_norm describe(const norm *n) {
    group_norm b = {n};
    if (n) b.limits = *n;
    return b;
}

INLINE void add_sums(group_norm *b, const vec *first, const vec *second, int vectors) {
    UNROLL for (int v = 0; v < vectors; v++) {
        b->first[v] += __builtin_convertvector(first[v], wide);
        b->second[v] += __builtin_convertvector(second[v], wide);
    }
}

/* Read the statistics of channels c, c + 1, ... */
INLINE void read_statistics(group_norm *b, const sizes *s, int64_t c, int vectors) {
    UNROLL for (int v = 0; v < vectors; v++) {
        const float *own = b->n->statistics + c + v * LANES;
        b->shift[v] = loadf(own);
        b->scale[v] = loadf(own + 2 * s->channels);
        b->offset[v] = loadf(own + 3 * s->channels);
        b->first[v] = b->second[v] = (wide){0};
    }
}

INLINE void compute_statistics(group_norm *b, const sizes *s, int64_t c, int64_t pixels,
                               int vectors) {
    for (int k = 0; k < vectors * LANES; k++)
        set_statistics(b->n, s->channels, c + k, pixels, b->shift[k / LANES][k % LANES],
                       b->first[k / LANES][k % LANES], b->second[k / LANES][k % LANES]);
    read_statistics(b, s, c, vectors);
}

INLINE void compute_gradients(group_norm *b, const sizes *s, int64_t c, int64_t pixels,
                              int vectors) {
    float slope[MAX_VECTORS * LANES], constant[MAX_VECTORS * LANES];
    for (int k = 0; k < vectors * LANES; k++)
        set_gradients(b->n, s->channels, c + k, pixels, b->first[k / LANES][k % LANES],
                      b->second[k / LANES][k % LANES], slope + k, constant + k);
    UNROLL for (int v = 0; v < vectors; v++) {
        b->slope[v] = loadf(slope + v * LANES);
        b->constant[v] = loadf(constant + v * LANES);
    }
}

/* Row ``row`` in a ring; its first pixel comes after the zeros. */
INLINE float *ring_row(float *ring, int64_t row, int64_t width, int vectors) {
    return ring + ((row % MAX_KERNEL) * (width + 2 * MAX_KERNEL) + MAX_KERNEL) * vectors * LANES;
}

INLINE int64_t ring_length(int64_t width, int vectors) {
    return MAX_KERNEL * (width + 2 * MAX_KERNEL) * vectors * LANES;
}

INLINE void convert_vectors(const group_norm *b, const bf16 *x, const sizes *s, float *out,
                            int vectors) {
    const norm limits = b->limits;
    const int is_normalized = b->n != NULL;
    for (int64_t j = 0; j < s->width; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec a = load(x + j * s->channels + v * LANES);
            if (is_normalized) a = activate(a * b->scale[v] + b->offset[v], &limits);
            storef(out + (j * vectors + v) * LANES, a);
        }
}

/* Convert a row of x to fp32, normalised. */
SEPARATE void convert_row(const group_norm *b, const bf16 *x, const sizes *s, float *out,
                          int vectors) {
    if (vectors == 2) convert_vectors(b, x, s, out, 2);
    else convert_vectors(b, x, s, out, 1);
}

/* A row of the output of a convolution is a sum of rows, shifted, times a weight per channel. */
typedef struct {
    const float *x, *weight;
} tap;

INLINE void filter_pixels(const tap *taps, int count, float *out, int64_t in_step,
                          int64_t out_step, int64_t j, int vectors, int pixels) {
    vec sum[4][MAX_VECTORS];
    UNROLL for (int p = 0; p < pixels; p++)
        UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = (vec){0};
    for (int t = 0; t < count; t++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec w = loadf(taps[t].weight + v * LANES);
            UNROLL for (int p = 0; p < pixels; p++)
                sum[p][v] += loadf(taps[t].x + ((j + p) * in_step * vectors + v) * LANES) * w;
        }
    UNROLL for (int p = 0; p < pixels; p++)
        UNROLL for (int v = 0; v < vectors; v++)
            storef(out + ((j + p) * out_step * vectors + v) * LANES, sum[p][v]);
}

/* Output pixel ``j * out_step`` takes pixel ``j * in_step`` of each tap. */
SEPARATE void filter_row(const tap *taps, int count, float *out, int64_t number, int64_t in_step,
                         int64_t out_step, int vectors) {
    int64_t j = 0;
#define CALL(V, PIXELS) filter_pixels(taps, count, out, in_step, out_step, j, V, PIXELS)
    if (vectors == 2) {
        for (; j + 4 <= number; j += 4) CALL(2, 4);
        for (; j < number; j++) CALL(2, 1);
    } else {
        for (; j + 4 <= number; j += 4) CALL(1, 4);
        for (; j < number; j++) CALL(1, 1);
    }
#undef CALL
}

/* The weights (channels, taps) of a group: (taps, group). */
INLINE void pack(const float *weight, int64_t taps, float *packed, int vectors) {
    for (int64_t t = 0; t < taps; t++)
        for (int k = 0; k < vectors * LANES; k++)
            packed[t * vectors * LANES + k] = weight[k * taps + t];
}

INLINE void forward_group(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                          const float *weight, bf16 *filtered, bf16 *y, int64_t c, float *memory,
                          int vectors) {
    const int64_t C = s->channels, pixels = s->images * s->height * s->width;
    const int64_t out_pixels = s->images * s->out_height * s->out_width;
    const int lanes = vectors * LANES;
    float *ring = memory, *out = ring + ring_length(s->width, vectors);
    ALIGNED float packed[MAX_KERNEL * MAX_KERNEL * MAX_VECTORS * LANES];
    group_norm b = describe(before), a = describe(after);
    pack(weight, s->kernel * s->kernel, packed, vectors);
    if (before) {
        UNROLL for (int v = 0; v < vectors; v++) b.shift[v] = load(x + v * LANES);
        for (int64_t at = 0; at < pixels;) {
            vec first[MAX_VECTORS] = {0}, second[MAX_VECTORS] = {0};
            for (int64_t end = MIN(pixels, at + 1024); at < end; at++)
                UNROLL for (int v = 0; v < vectors; v++) {
                    vec d = load(x + at * C + v * LANES) - b.shift[v];
                    first[v] += d;
                    second[v] += d * d;
                }
            add_sums(&b, first, second, vectors);
        }
        compute_statistics(&b, s, c, pixels, vectors);
    }
    for (int64_t image = 0, row = 0; image < s->images; image++) {
        const bf16 *own = x + image * s->height * s->width * C;
        for (int64_t i = 0, ready = 0; i < s->out_height; i++, row++) {
            int64_t top = i * s->stride - s->padding;
            for (; ready < MIN(s->height, top + s->kernel); ready++)
                convert_row(&b, own + ready * s->width * C, s,
                            ring_row(ring, ready, s->width, vectors), vectors);
            tap taps[MAX_KERNEL * MAX_KERNEL];
            int count = 0;
            for (int64_t v = MAX(0, -top); v < MIN(s->kernel, s->height - top); v++)
                for (int64_t u = 0; u < s->kernel; u++)
                    taps[count++] = (tap){
                        ring_row(ring, top + v, s->width, vectors) + (u - s->padding) * lanes,
                        packed + (v * s->kernel + u) * lanes};
            filter_row(taps, count, out, s->out_width, s->stride, 1, vectors);
            if (!row)
                UNROLL for (int v = 0; v < vectors; v++) a.shift[v] = loadf(out + v * LANES);
            vec first[MAX_VECTORS] = {0}, second[MAX_VECTORS] = {0};
            for (int64_t j = 0; j < s->out_width; j++)
                UNROLL for (int v = 0; v < vectors; v++) {
                    vec f = loadf(out + (j * vectors + v) * LANES), d = f - a.shift[v];
                    first[v] += d;
                    second[v] += d * d;
                    store(filtered + (row * s->out_width + j) * C + v * LANES, f);
                }
            add_sums(&a, first, second, vectors);
        }
    }
    if (!after) return;
    compute_statistics(&a, s, c, out_pixels, vectors);
    for (int64_t at = 0; at < out_pixels; at++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec f = load(filtered + at * C + v * LANES);
            store(y + at * C + v * LANES, activate(f * a.scale[v] + a.offset[v], &a.limits));
        }
}

/* Add what one row of the output contributes to the gradients of one row of weights. */
INLINE void add_weight_gradients(const float *x, const float *g, float *sums, const sizes *s,
                                 int kernel, int vectors) {
    vec sum[MAX_KERNEL][MAX_VECTORS];
    UNROLL for (int u = 0; u < kernel; u++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[u][v] = loadf(sums + (u * vectors + v) * LANES);
    for (int64_t j = 0; j < s->out_width; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec gradient = loadf(g + (j * vectors + v) * LANES);
            UNROLL for (int u = 0; u < kernel; u++)
                sum[u][v] += gradient * loadf(x + ((j * s->stride + u) * vectors + v) * LANES);
        }
    UNROLL for (int u = 0; u < kernel; u++)
        UNROLL for (int v = 0; v < vectors; v++)
            storef(sums + (u * vectors + v) * LANES, sum[u][v]);
}

/* The gradient of a row of the input, from the rows in the ring. */
INLINE void gradient_row(const sizes *s, float *ring, const float *packed, int64_t row, float *out,
                         int vectors) {
    const int lanes = vectors * LANES;
    for (int64_t phase = 0; phase < MIN(s->stride, s->width); phase++) {
        tap taps[MAX_KERNEL * MAX_KERNEL];
        int count = 0;
        for (int64_t v = 0; v < s->kernel; v++) {
            int64_t i = row + s->padding - v;
            if (i < 0 || i % s->stride || i / s->stride >= s->out_height) continue;
            for (int64_t u = 0; u < s->kernel; u++) {
                int64_t j = phase + s->padding - u;
                if (j % s->stride) continue;
                taps[count++] = (tap){
                    ring_row(ring, i / s->stride, s->out_width, vectors) + j / s->stride * lanes,
                    packed + (v * s->kernel + u) * lanes};
            }
        }
        filter_row(taps, count, out + phase * lanes, (s->width - phase + s->stride - 1) / s->stride,
                   1, s->stride, vectors);
    }
}

INLINE void backward_group(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                           const float *weight, const bf16 *filtered, const bf16 *g, bf16 *gx,
                           float *weight_gradient, int64_t c, float *memory, int kernel,
                           int vectors) {
    const int64_t C = s->channels, pixels = s->images * s->height * s->width;
    const int64_t out_pixels = s->images * s->out_height * s->out_width;
    const int lanes = vectors * LANES;
    float *ring = memory, *g_ring = ring + ring_length(s->width, vectors);
    float *out = g_ring + ring_length(s->out_width, vectors);
    ALIGNED float packed[MAX_KERNEL * MAX_KERNEL * MAX_VECTORS * LANES];
    ALIGNED float sums[MAX_KERNEL * MAX_KERNEL * MAX_VECTORS * LANES];
    double totals[MAX_KERNEL * MAX_KERNEL * MAX_VECTORS * LANES] = {0};
    group_norm b = describe(before), a = describe(after);
    pack(weight, kernel * kernel, packed, vectors);
    if (before) read_statistics(&b, s, c, vectors);
    if (after) {
        read_statistics(&a, s, c, vectors);
        for (int64_t at = 0; at < out_pixels;) {
            vec first[MAX_VECTORS] = {0}, second[MAX_VECTORS] = {0};
            for (int64_t end = MIN(out_pixels, at + 1024); at < end; at++)
                UNROLL for (int v = 0; v < vectors; v++) {
                    vec f = load(filtered + at * C + v * LANES);
                    vec passed = keep(passes(f * a.scale[v] + a.offset[v], &a.limits),
                                      load(g + at * C + v * LANES));
                    first[v] += passed;
                    second[v] += passed * (f - a.shift[v]);
                }
            add_sums(&a, first, second, vectors);
        }
        compute_gradients(&a, s, c, out_pixels, vectors);
    }
    for (int64_t image = 0; image < s->images; image++) {
        const bf16 *own = x + image * s->height * s->width * C;
        bf16 *own_gx = gx + image * s->height * s->width * C;
        memset(sums, 0, sizeof sums);
        for (int64_t i = 0, ready = 0, done = 0; i < s->out_height; i++) {
            float *g_row = ring_row(g_ring, i, s->out_width, vectors);
            for (int64_t j = 0; j < s->out_width; j++)
                UNROLL for (int v = 0; v < vectors; v++) {
                    int64_t at = ((image * s->out_height + i) * s->out_width + j) * C + v * LANES;
                    vec gradient = load(g + at);
                    if (after) {
                        vec f = load(filtered + at);
                        gradient = keep(passes(f * a.scale[v] + a.offset[v], &a.limits), gradient)
                            * a.scale[v] + a.slope[v] * f + a.constant[v];
                    }
                    storef(g_row + (j * vectors + v) * LANES, gradient);
                }
            int64_t top = i * s->stride - s->padding;
            for (; ready < MIN(s->height, top + kernel); ready++)
                convert_row(&b, own + ready * s->width * C, s,
                            ring_row(ring, ready, s->width, vectors), vectors);
            for (int64_t v = MAX(0, -top); v < MIN(kernel, s->height - top); v++)
                add_weight_gradients(
                    ring_row(ring, top + v, s->width, vectors) - s->padding * lanes, g_row,
                    sums + v * kernel * lanes, s, kernel, vectors);
            /* Rows of the input that no later row of the output takes. */
            int64_t end = i + 1 < s->out_height ? (i + 1) * s->stride - s->padding : s->height;
            for (; done < end; done++) {
                gradient_row(s, g_ring, packed, done, out, vectors);
                vec first[MAX_VECTORS] = {0}, second[MAX_VECTORS] = {0};
                for (int64_t j = 0; j < s->width; j++)
                    UNROLL for (int v = 0; v < vectors; v++) {
                        int64_t at = (done * s->width + j) * C + v * LANES;
                        vec gradient = loadf(out + (j * vectors + v) * LANES);
                        if (before) {
                            vec e = load(own + at);
                            vec n = e * b.scale[v] + b.offset[v];
                            gradient = keep(passes(n, &b.limits), gradient);
                            first[v] += gradient;
                            second[v] += gradient * (e - b.shift[v]);
                        }
                        store(own_gx + at, gradient);
                    }
                add_sums(&b, first, second, vectors);
            }
        }
        for (int k = 0; k < kernel * kernel * lanes; k++) totals[k] += sums[k];
    }
    for (int t = 0; t < kernel * kernel; t++)
        for (int k = 0; k < lanes; k++)
            weight_gradient[k * kernel * kernel + t] = totals[t * lanes + k];
    if (!before) return;
    compute_gradients(&b, s, c, pixels, vectors);
    for (int64_t at = 0; at < pixels; at++)
        UNROLL for (int v = 0; v < vectors; v++) {
            bf16 *own = gx + at * C + v * LANES;
            store(own, load(own) * b.scale[v] + load(x + at * C + v * LANES) * b.slope[v]
                           + b.constant[v]);
        }
}

/* Groups of channels. The first ``pairs`` of them have two vectors, which fill cache lines; the
   others have one, so that all threads end at about the same time. */
typedef struct {
    int64_t pairs, number;
} groups;

static groups divide(const sizes *s) {
    int64_t vectors = s->channels / LANES;
    int64_t pairs = MAX(0, MIN(vectors / 2 - 1, vectors - 2 * omp_get_max_threads()));
    return (groups){pairs, vectors - pairs};
}

static int64_t first_channel(const groups *all, int64_t group, int *vectors) {
    *vectors = group < all->pairs ? 2 : 1;
    return (group + MIN(group, all->pairs)) * LANES;
}

/* ``filtered`` is kept for the backward pass. Without ``after``, it is the result. */
int useg_filter_forward(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                        const float *weight, bf16 *filtered, bf16 *y) {
    int64_t taps = s->kernel * s->kernel, failed = 0;
    if (before) *before->tracked += 1;
    if (after) *after->tracked += 1;
    const groups all = divide(s);
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t group = 0; group < all.number; group++) {
        int vectors;
        int64_t c = first_channel(&all, group, &vectors);
        int64_t length = ring_length(s->width, vectors) + s->out_width * vectors * LANES;
        float *memory = allocate_zeros(length * sizeof *memory);
#define CALL(V)                                                                                    \
    forward_group(s, before, after, x + c, weight + c * taps, filtered + c, y + c, c, memory, V)
        if (!memory) failed = 1;
        else if (vectors == 2) CALL(2);
        else CALL(1);
#undef CALL
        free(memory);
    }
    return failed;
}

int useg_filter_backward(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                         const float *weight, const bf16 *filtered, const bf16 *g, bf16 *gx,
                         float *weight_gradient) {
    int64_t taps = s->kernel * s->kernel, failed = 0;
    const groups all = divide(s);
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t group = 0; group < all.number; group++) {
        int vectors;
        int64_t c = first_channel(&all, group, &vectors);
        int64_t length = ring_length(s->width, vectors) + ring_length(s->out_width, vectors)
            + s->width * vectors * LANES;
        float *memory = allocate_zeros(length * sizeof *memory);
#define CALL(K, V)                                                                                 \
    backward_group(s, before, after, x + c, weight + c * taps, filtered + c, g + c, gx + c,        \
                   weight_gradient + c * taps, c, memory, K, V)
        if (!memory) failed = 1;
        else if (s->kernel == 5 && vectors == 2) CALL(5, 2);
        else if (s->kernel == 5) CALL(5, 1);
        else if (vectors == 2) CALL(3, 2);
        else CALL(3, 1);
#undef CALL
        free(memory);
    }
    return failed;
}

/* ---------------------------------------------------------------- weights of repeated pixels

   A 3x3 convolution of pixels that are repeated in both directions is a transposed convolution with
   4x4 weights, and each of these is a sum of the 3x3 ones. Along one axis, tap r of the four is the
   sum of taps FIRST[r] to LAST[r] of the three. */

static const int FIRST[4] = {2, 1, 0, 0}, LAST[4] = {2, 2, 1, 0};

/* From weight (D, 3, 3, C + S) to sums (C, 4, 4, D) and, if it is not NULL, rest (D, 3, 3, S).
   LANES by LANES channels at once, which are exchanged as a matrix. */
void useg_upsampling_weights(const float *weight, int64_t D, int64_t C, int64_t S, bf16 *sums,
                             bf16 *rest) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t c = 0; c < C; c += LANES)
        for (int64_t d = 0; d < D; d += LANES) {
            const int64_t width = MIN(LANES, C - c), number = MIN(LANES, D - d);
            bits w[9][LANES] = {0};
            for (int64_t t = 0; t < 9; t++) {
                for (int64_t k = 0; k < number; k++)
                    memcpy(w[t] + k, weight + ((d + k) * 9 + t) * (C + S) + c, 4 * width);
                transpose(w[t]);
            }
            for (int64_t k = 0; k < width; k++)
                for (int t = 0; t < 16; t++) {
                    vec sum = {0};
                    for (int i = FIRST[t / 4]; i <= LAST[t / 4]; i++)
                        for (int j = FIRST[t % 4]; j <= LAST[t % 4]; j++)
                            sum += (vec)w[3 * i + j][k];
                    bf16 rounded[LANES];
                    store(rounded, sum);
                    memcpy(sums + ((c + k) * 16 + t) * D + d, rounded, number * sizeof *rounded);
                }
        }
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < (rest ? 9 * D : 0); k++)
        for (int64_t c = 0; c < S; c++) store1(rest + k * S + c, weight[k * (C + S) + C + c]);
}

/* The gradient of the weight from those of sums and, if it is not NULL, of rest. */
void useg_upsampling_weight_gradient(const bf16 *sums, const bf16 *rest, int64_t D, int64_t C,
                                     int64_t S, float *weight) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t c = 0; c < C; c += LANES)
        for (int64_t d = 0; d < D; d += LANES) {
            const int64_t width = MIN(LANES, C - c), number = MIN(LANES, D - d);
            bits w[9][LANES] = {0};
            for (int64_t k = 0; k < width; k++)
                for (int t = 0; t < 16; t++) {
                    bf16 own[LANES] = {0};
                    memcpy(own, sums + ((c + k) * 16 + t) * D + d, number * sizeof *own);
                    for (int i = FIRST[t / 4]; i <= LAST[t / 4]; i++)
                        for (int j = FIRST[t % 4]; j <= LAST[t % 4]; j++)
                            w[3 * i + j][k] = (bits)((vec)w[3 * i + j][k] + load(own));
                }
            for (int64_t t = 0; t < 9; t++) {
                transpose(w[t]);
                for (int64_t k = 0; k < number; k++)
                    memcpy(weight + ((d + k) * 9 + t) * (C + S) + c, w[t] + k, 4 * width);
            }
        }
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < (rest ? 9 * D : 0); k++)
        for (int64_t c = 0; c < S; c++) weight[k * (C + S) + C + c] = load1(rest + k * S + c);
}

/* ---------------------------------------------------------------- cross-entropy and Dice

   Of logits (pixels, classes) and class ids (pixels); IGNORED and other ids that are no class do
   not count. A vector holds one class of LANES pixels. The probabilities are computed in both
   passes and never stored. */

#define MAX_CLASSES 256
#define CHUNKS 32

/* exp(v) for v <= 0, to about 1e-7 of the result; 0 below -87. NaN stays NaN. */
INLINE vec exponential(vec v) {
    const vec zero = {0};
    bits is_small = (bits)(v < zero - 87.0f);
    vec magic = zero + 12582912.0f;
    vec n = (v * 1.44269504f + magic) - magic;
    vec r = v - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    bits exponent = ((bits)(n + (magic + 127.0f)) << 23);
    return keep(~is_small, p * (vec)exponent);
}

/* log(v) for v >= 1: v = m * 2**n with m between sqrt(1/2) and sqrt(2), and
   log(m) = 2 * artanh((m - 1) / (m + 1)). Infinity and NaN give NaN. */
INLINE vec logarithm(vec v) {
    integers n = ((integers)v - 0x3f3504f3) >> 23;
    vec m = (vec)((bits)v - ((bits)n << 23));
    vec t = (m - 1.0f) / (m + 1.0f), s = t * t;
    vec series = 1.0f + s * (1.0f / 3 + s * (1.0f / 5 + s * (1.0f / 7 + s * (1.0f / 9))));
    return __builtin_convertvector(n, vec) * 0.693147181f + 2.0f * t * series + (v - v);
}

/* The class ids of up to LANES pixels; ``classes`` where a pixel does not count. */
INLINE bits read_ids(const int64_t *target, int64_t pixels, int64_t classes) {
    bits ids;
    for (int k = 0; k < LANES; k++)
        ids[k] = k < pixels && (uint64_t)target[k] < (uint64_t)classes ? target[k] : classes;
    return ids;
}

/* The probabilities of up to LANES pixels; returns minus the logarithms of those of their own
   classes. */
INLINE vec softmax(const bf16 *logits, int64_t pixels, int64_t classes, bits ids, vec *p) {
    float values[MAX_CLASSES][LANES];
    for (int64_t c = 0; c < classes; c++)
        for (int64_t k = 0; k < LANES; k++)
            values[c][k] = load1(logits + MIN(k, pixels - 1) * classes + c);
    vec top = loadf(values[0]), sum = {0}, own = {0};
    for (int64_t c = 1; c < classes; c++) {
        vec v = loadf(values[c]);
        bits is_larger = (bits)(v > top);
        top = (vec)((is_larger & (bits)v) | (~is_larger & (bits)top));
    }
    for (int64_t c = 0; c < classes; c++) {
        vec v = loadf(values[c]) - top;
        own += keep((bits)(ids == (uint32_t)c), v);
        sum += p[c] = exponential(v);
    }
    vec inverse = 1.0f / sum;
    for (int64_t c = 0; c < classes; c++) p[c] *= inverse;
    return logarithm(sum) - own;
}

INLINE double total(vec v) {
    double sum = 0;
    for (int k = 0; k < LANES; k++) sum += v[k];
    return sum;
}

/* Sums of one chunk: cross-entropy, weights, and per class hits, pixels, probabilities. */
static void loss_chunk(const bf16 *logits, const int64_t *target, int64_t pixels, int64_t classes,
                       const float *weight, double *sums) {
    vec p[MAX_CLASSES], hits[MAX_CLASSES], truth[MAX_CLASSES], area[MAX_CLASSES];
    vec entropy = {0}, weights = {0};
    for (int64_t c = 0; c < classes; c++) hits[c] = truth[c] = area[c] = (vec){0};
    for (int64_t at = 0; at < pixels; at += LANES) {
        bits ids = read_ids(target + at, pixels - at, classes);
        bits counts = (bits)(ids < (uint32_t)classes);
        vec surprise = softmax(logits + at * classes, pixels - at, classes, ids, p), own = {0};
        for (int64_t c = 0; c < classes; c++) {
            bits is_own = (bits)(ids == (uint32_t)c);
            own += keep(is_own, (vec){0} + weight[c]);
            hits[c] += keep(is_own, p[c]);
            truth[c] += keep(is_own, (vec){0} + 1.0f);
            area[c] += keep(counts, p[c]);
        }
        entropy += keep(counts, own * surprise);
        weights += own;
    }
    sums[0] = total(entropy);
    sums[1] = total(weights);
    for (int64_t c = 0; c < classes; c++) {
        sums[2 + c] = total(hits[c]);
        sums[2 + classes + c] = total(truth[c]);
        sums[2 + 2 * classes + c] = total(area[c]);
    }
}

/* gradient of a logit: ce * weight * (p - truth) + p * (d - sum of p * d), where d is the gradient
   of the Dice loss with respect to the probabilities */
static void loss_gradient_chunk(const bf16 *logits, const int64_t *target, int64_t pixels,
                                int64_t classes, const float *weight, float entropy,
                                const float *of_hits, const float *of_areas, bf16 *gradient) {
    vec p[MAX_CLASSES];
    bf16 values[MAX_CLASSES][LANES];
    for (int64_t at = 0; at < pixels; at += LANES) {
        bits ids = read_ids(target + at, pixels - at, classes);
        bits counts = (bits)(ids < (uint32_t)classes);
        softmax(logits + at * classes, pixels - at, classes, ids, p);
        vec average = {0}, factor = {0};
        for (int64_t c = 0; c < classes; c++) {
            bits is_own = (bits)(ids == (uint32_t)c);
            average += p[c] * (of_areas[c] + keep(is_own, (vec){0} + of_hits[c]));
            factor += keep(is_own, (vec){0} + entropy * weight[c]);
        }
        for (int64_t c = 0; c < classes; c++) {
            vec slope = of_areas[c] + factor - average;
            vec own = keep((bits)(ids == (uint32_t)c), p[c] * of_hits[c] - factor);
            store(values[c], keep(counts, p[c] * slope + own));
        }
        bf16 *out = gradient + at * classes;
        int64_t number = MIN(LANES, pixels - at);
        for (int64_t c = 0; c < classes; c++)
            for (int64_t k = 0; k < number; k++) out[k * classes + c] = values[c][k];
    }
}

/* loss = entropy_factor * cross-entropy + dice_factor * Dice; coefficients (2 * classes + 1) are
   for the backward pass. */
int useg_loss_forward(const bf16 *logits, const int64_t *target, int64_t pixels, int64_t classes,
                      const float *weight, float entropy_factor, float dice_factor, float *loss,
                      float *coefficients) {
    int64_t length = 2 + 3 * classes;
    if (classes > MAX_CLASSES) return 2;
    double *sums = malloc(CHUNKS * length * sizeof *sums);
    if (!sums) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < CHUNKS; k++) {
        int64_t from = pixels * k / CHUNKS, to = pixels * (k + 1) / CHUNKS;
        loss_chunk(logits + from * classes, target + from, to - from, classes, weight,
                   sums + k * length);
    }
    for (int64_t k = 1; k < CHUNKS; k++)
        for (int64_t c = 0; c < length; c++) sums[c] += sums[k * length + c];
    double present = 0, dice = 0, counted = MAX(sums[1], 1e-12);
    const double *hits = sums + 2, *truth = hits + classes, *area = truth + classes;
    for (int64_t c = 0; c < classes; c++) present += truth[c] > 0;
    present = MAX(present, 1);
    coefficients[0] = entropy_factor / counted;
    for (int64_t c = 0; c < classes; c++) {
        double both = MAX(area[c] + truth[c], 1e-6), is_present = truth[c] > 0;
        dice += is_present * (1 - 2 * hits[c] / both) / present;
        coefficients[1 + c] = -dice_factor * is_present * 2 / both / present;
        coefficients[1 + classes + c] =
            dice_factor * is_present * 2 * hits[c] / (both * both) / present;
    }
    *loss = entropy_factor * sums[0] / counted + dice_factor * dice;
    free(sums);
    return 0;
}

int useg_loss_backward(const bf16 *logits, const int64_t *target, int64_t pixels, int64_t classes,
                       const float *weight, const float *coefficients, float upstream,
                       bf16 *gradient) {
    float of_hits[MAX_CLASSES], of_areas[MAX_CLASSES];
    if (classes > MAX_CLASSES) return 2;
    for (int64_t c = 0; c < classes; c++) {
        of_hits[c] = upstream * coefficients[1 + c];
        of_areas[c] = upstream * coefficients[1 + classes + c];
    }
    float entropy = upstream * coefficients[0];
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < CHUNKS; k++) {
        int64_t from = pixels * k / CHUNKS, to = pixels * (k + 1) / CHUNKS;
        loss_gradient_chunk(logits + from * classes, target + from, to - from, classes, weight,
                            entropy, of_hits, of_areas, gradient + from * classes);
    }
    return 0;
}
