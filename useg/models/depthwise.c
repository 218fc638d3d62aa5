/* Depthwise convolutions of a network in training, with the batch normalisations before and after
   them, in bf16, channels last.

   y = after(filter(before(x))), where "before" and "after" are batch normalisations with their
   activations, or missing. Features are large beside what is computed from them, so what counts is
   how often, and in which order, memory is read: each pass goes through it row by row.

   A part of the work is some rows of an image, and a block of its channels. Rows are converted to
   fp32 once, and normalised on the way, into rings of as many rows as the kernel has: one ring per
   group of one or two vectors of channels. Zeros on both sides of a row make edges like any other
   place. */

#include "layers.h"

#define MAX_KERNEL 5
/* Vectors of a group at most: all channels of a cache line. */
#define MAX_VECTORS 2
/* Vectors of a block of channels at most: its rings stay in the cache. */
#define MAX_BLOCK 12
/* Images are cut into strips of rows until there are about so many parts, for as many threads. */
#define MIN_PARTS 16
/* A strip has so many rows at least, because some rows around it are converted twice. */
#define MIN_ROWS 8
/* Zeros on each side of a row. */
#define EDGE 4

/* How the work is divided, whatever the number of threads. */
typedef struct {
    int64_t vectors, blocks, strips, number;
} division;

/* One part: rows of the output, and vectors of channels. */
typedef struct {
    int64_t strip, image, from, to, vector, end;
} part;

static division divide(const sizes *s) {
    division d = {s->channels / LANES};
    d.blocks = (d.vectors + MAX_BLOCK - 1) / MAX_BLOCK;
    int64_t wanted = (MIN_PARTS + s->images * d.blocks - 1) / (s->images * d.blocks);
    d.strips = MAX(1, MIN(wanted, s->out_height / MIN_ROWS));
    d.number = s->images * d.strips * d.blocks;
    return d;
}

static part find_part(const sizes *s, const division *d, int64_t number) {
    int64_t strip = number / d->blocks, block = number % d->blocks, k = strip % d->strips;
    return (part){strip,
                  strip / d->strips,
                  s->out_height * k / d->strips,
                  s->out_height * (k + 1) / d->strips,
                  d->vectors * block / d->blocks,
                  d->vectors * (block + 1) / d->blocks};
}

/* Row ``row`` in a ring; its first pixel comes after the zeros. */
INLINE float *ring_row(float *ring, int64_t row, int64_t width, int vectors) {
    return ring + ((row % MAX_KERNEL) * (width + 2 * EDGE) + EDGE) * vectors * LANES;
}

INLINE int64_t ring_length(int64_t width) {
    return MAX_KERNEL * (width + 2 * EDGE) * MAX_VECTORS * LANES;
}

/* The rings of all groups of a part. */
static int64_t rings_length(const part *p, int64_t width) {
    return (p->end - p->vector + MAX_VECTORS - 1) / MAX_VECTORS * ring_length(width);
}

/* Write the zeros beside the rows of all rings of a part. */
static void clear_edges(const part *p, float *rings, int64_t width) {
    for (int64_t v = p->vector; v < p->end; v += MAX_VECTORS, rings += ring_length(width)) {
        const int vectors = MIN(MAX_VECTORS, p->end - v), lanes = vectors * LANES;
        for (int64_t row = 0; row < MAX_KERNEL; row++) {
            float *own = ring_row(rings, row, width, vectors);
            memset(own - EDGE * lanes, 0, EDGE * lanes * sizeof *own);
            memset(own + width * lanes, 0, EDGE * lanes * sizeof *own);
        }
    }
}

/* Scale and offset of a group's normalisation, and its limits. They are a copy: what is stored
   between two pixels might change the original, as far as the compiler knows. */
typedef struct {
    norm limits;
    vec mean[MAX_VECTORS], scale[MAX_VECTORS], offset[MAX_VECTORS];
} group_norm;

INLINE group_norm describe(const norm *n, int64_t channels, int64_t c, int vectors) {
    group_norm b = {0};
    if (!n) return b;
    b.limits = *n;
    UNROLL for (int v = 0; v < vectors; v++) {
        const float *own = n->statistics + c + v * LANES;
        b.mean[v] = loadf(own);
        b.scale[v] = loadf(own + 2 * channels);
        b.offset[v] = loadf(own + 3 * channels);
    }
    return b;
}

INLINE void convert_vectors(const norm *n, const bf16 *x, const sizes *s, int64_t c, float *out,
                            int vectors) {
    const group_norm b = describe(n, s->channels, c, vectors);
    for (int64_t j = 0; j < s->width; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec a = load(x + j * s->channels + v * LANES);
            if (n) a = activate(a * b.scale[v] + b.offset[v], &b.limits);
            storef(out + (j * vectors + v) * LANES, a);
        }
}

/* Convert a row of x, of channels c, c + 1, ..., to fp32, normalised. */
SEPARATE void convert_row(const norm *n, const bf16 *x, const sizes *s, int64_t c, float *out,
                          int vectors) {
    if (vectors == 2) convert_vectors(n, x, s, c, out, 2);
    else convert_vectors(n, x, s, c, out, 1);
}

/* A row of the output of a convolution is a sum of rows, shifted, times a weight per channel.
   ``weight_step``: from the weights of one vector to those of the next. */
typedef struct {
    const float *x, *weight;
} tap;

INLINE void filter_pixels(const tap *taps, int count, int64_t weight_step, float *out,
                          int64_t in_step, int64_t out_step, int64_t j, int vectors, int pixels) {
    vec sum[4][MAX_VECTORS];
    UNROLL for (int p = 0; p < pixels; p++)
        UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = (vec){0};
    for (int t = 0; t < count; t++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec w = loadf(taps[t].weight + v * weight_step);
            UNROLL for (int p = 0; p < pixels; p++)
                sum[p][v] += loadf(taps[t].x + ((j + p) * in_step * vectors + v) * LANES) * w;
        }
    UNROLL for (int p = 0; p < pixels; p++)
        UNROLL for (int v = 0; v < vectors; v++)
            storef(out + ((j + p) * out_step * vectors + v) * LANES, sum[p][v]);
}

/* Output pixel ``j * out_step`` takes pixel ``j * in_step`` of each tap. */
SEPARATE void filter_row(const tap *taps, int count, int64_t weight_step, float *out,
                         int64_t number, int64_t in_step, int64_t out_step, int vectors) {
    int64_t j = 0;
#define CALL(V, PIXELS)                                                                            \
    filter_pixels(taps, count, weight_step, out, in_step, out_step, j, V, PIXELS)
    if (vectors == 2) {
        for (; j + 4 <= number; j += 4) CALL(2, 4);
        for (; j < number; j++) CALL(2, 1);
    } else {
        for (; j + 4 <= number; j += 4) CALL(1, 4);
        for (; j < number; j++) CALL(1, 1);
    }
#undef CALL
}

/* The weights (channels, taps): (vectors, taps, LANES). */
static float *pack(const float *weight, int64_t channels, int64_t taps) {
    float *packed = allocate(channels * taps * sizeof *packed);
#pragma omp parallel for schedule(static) if (packed != NULL)
    for (int64_t v = 0; v < (packed ? channels / LANES : 0); v++)
        for (int64_t t = 0; t < taps; t++)
            for (int64_t k = 0; k < LANES; k++)
                packed[(v * taps + t) * LANES + k] = weight[(v * LANES + k) * taps + t];
    return packed;
}

/* ---------------------------------------------------------------- forward */

/* Sums of f - shift and its square over the pixels of a part. */
typedef struct {
    ALIGNED float shift[MAX_BLOCK * LANES];
    double first[MAX_BLOCK * LANES], second[MAX_BLOCK * LANES];
} part_sums;

/* Compute row i of the output of channels c, c + 1, ... from the rows in their ring. ``at``: their
   place in the sums. */
INLINE void forward_vectors(const sizes *s, float *ring, const float *packed, int64_t i, float *out,
                            bf16 *filtered, part_sums *sums, int64_t at, int is_first,
                            int vectors) {
    const int64_t top = i * s->stride - s->padding, taps = s->kernel * s->kernel;
    tap own[MAX_KERNEL * MAX_KERNEL];
    int count = 0;
    for (int64_t v = MAX(0, -top); v < MIN(s->kernel, s->height - top); v++)
        for (int64_t u = 0; u < s->kernel; u++)
            own[count++] = (tap){
                ring_row(ring, top + v, s->width, vectors) + (u - s->padding) * vectors * LANES,
                packed + (v * s->kernel + u) * LANES};
    filter_row(own, count, taps * LANES, out, s->out_width, s->stride, 1, vectors);
    if (is_first) memcpy(sums->shift + at, out, vectors * LANES * sizeof *out);
    vec first[MAX_VECTORS] = {0}, second[MAX_VECTORS] = {0}, shift[MAX_VECTORS];
    UNROLL for (int v = 0; v < vectors; v++) shift[v] = loadf(sums->shift + at + v * LANES);
    for (int64_t j = 0; j < s->out_width; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec f = loadf(out + (j * vectors + v) * LANES), d = f - shift[v];
            first[v] += d;
            second[v] += d * d;
            store(filtered + j * s->channels + v * LANES, f);
        }
    add_sums(sums->first + at, first, vectors);
    add_sums(sums->second + at, second, vectors);
}

SEPARATE void forward_row(const sizes *s, float *ring, const float *packed, int64_t i, float *out,
                          bf16 *filtered, part_sums *sums, int64_t at, int is_first, int vectors) {
    if (vectors == 2)
        forward_vectors(s, ring, packed, i, out, filtered, sums, at, is_first, 2);
    else forward_vectors(s, ring, packed, i, out, filtered, sums, at, is_first, 1);
}

/* Compute one part of the output. ``memory`` is for the rings and a row. */
static void forward_part(const sizes *s, const part *p, const norm *before, const bf16 *x,
                         const float *packed, bf16 *filtered, float *memory, double *m) {
    const int64_t C = s->channels, taps = s->kernel * s->kernel;
    float *out = memory + rings_length(p, s->width);
    clear_edges(p, memory, s->width);
    part_sums sums = {0};
    for (int64_t i = p->from, ready = MAX(0, p->from * s->stride - s->padding); i < p->to; i++) {
        int64_t end = MIN(s->height, i * s->stride - s->padding + s->kernel);
        for (int64_t v = p->vector; v < p->end; v += MAX_VECTORS) {
            int vectors = MIN(MAX_VECTORS, p->end - v);
            int64_t c = v * LANES, at = (v - p->vector) * LANES;
            float *ring = memory + (v - p->vector) / MAX_VECTORS * ring_length(s->width);
            for (int64_t row = ready; row < end; row++)
                convert_row(before, x + (p->image * s->height + row) * s->width * C + c, s, c,
                            ring_row(ring, row, s->width, vectors), vectors);
            forward_row(s, ring, packed + c * taps, i, out,
                        filtered + (p->image * s->out_height + i) * s->out_width * C + c, &sums, at,
                        i == p->from, vectors);
        }
        ready = MAX(ready, end);
    }
    for (int64_t at = 0; at < (p->end - p->vector) * LANES; at += LANES)
        write_moments(m + p->strip * 4 * C + p->vector * LANES + at, C,
                      (p->to - p->from) * s->out_width, sums.shift + at, sums.first + at,
                      sums.second + at);
}

/* ``filtered`` is kept for the backward pass. Without ``after``, it is the result. */
int useg_filter_forward(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                        const float *weight, bf16 *filtered, bf16 *y) {
    const int64_t C = s->channels, pixels = s->images * s->out_height * s->out_width;
    const division d = divide(s);
    float *packed = pack(weight, C, s->kernel * s->kernel);
    double *m = malloc(s->images * d.strips * 4 * C * sizeof *m);
    int64_t failed = !packed || !m
        || (before && measure(before, x, s->images * s->height * s->width, C));
#pragma omp parallel for schedule(dynamic) reduction(+ : failed) if (!failed)
    for (int64_t number = 0; number < (failed ? 0 : d.number); number++) {
        const part p = find_part(s, &d, number);
        float *memory =
            allocate((rings_length(&p, s->width) + s->out_width * MAX_VECTORS * LANES) * 4);
        if (memory) forward_part(s, &p, before, x, packed, filtered, memory, m);
        else failed += 1;
        free(memory);
    }
    if (after && !failed) {
        set_moments(after, C, pixels, m, s->images * d.strips);
        failed = apply(after, filtered, NULL, y, pixels, C);
    }
    free(packed), free(m);
    return failed;
}

/* ---------------------------------------------------------------- backward */

INLINE void convert_gradient_vectors(const conversion *how, const bf16 *g, const sizes *s,
                                     int64_t at, int64_t c, float *out, int vectors) {
    const group_norm a = describe(how->n, s->channels, c, vectors);
    const int is_normalized = how->n != NULL;
    vec slope[MAX_VECTORS], constant[MAX_VECTORS];
    UNROLL for (int v = 0; v < vectors; v++) {
        slope[v] = loadf(how->slopes + c + v * LANES);
        constant[v] = loadf(how->constants + c + v * LANES);
    }
    for (int64_t j = 0; j < s->out_width; j++, at += s->channels)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec gradient = load(g + at + v * LANES);
            if (is_normalized)
                gradient = lead_back(load(how->values + at + v * LANES), gradient, a.scale[v],
                                     a.offset[v], slope[v], constant[v], &a.limits);
            storef(out + (j * vectors + v) * LANES, gradient);
        }
}

/* Convert a row of the gradient, which begins at place ``at``, to fp32. */
SEPARATE void convert_gradient_row(const conversion *how, const bf16 *g, const sizes *s, int64_t at,
                                   int64_t c, float *out, int vectors) {
    if (vectors == 2) convert_gradient_vectors(how, g, s, at, c, out, 2);
    else convert_gradient_vectors(how, g, s, at, c, out, 1);
}

INLINE void add_products(const float *x, const float *g, float *sums, const sizes *s, int kernel,
                         int vectors) {
    vec sum[MAX_KERNEL][MAX_VECTORS];
    UNROLL for (int u = 0; u < kernel; u++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[u][v] = loadf(sums + (v * kernel * kernel + u) * LANES);
    for (int64_t j = 0; j < s->out_width; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec gradient = loadf(g + (j * vectors + v) * LANES);
            UNROLL for (int u = 0; u < kernel; u++)
                sum[u][v] += gradient * loadf(x + ((j * s->stride + u) * vectors + v) * LANES);
        }
    UNROLL for (int u = 0; u < kernel; u++)
        UNROLL for (int v = 0; v < vectors; v++)
            storef(sums + (v * kernel * kernel + u) * LANES, sum[u][v]);
}

/* Add what one row of the output contributes to the gradients of one row of weights. */
SEPARATE void add_weight_gradients(const float *x, const float *g, float *sums, const sizes *s,
                                   int vectors) {
    if (s->kernel == 5 && vectors == 2) add_products(x, g, sums, s, 5, 2);
    else if (s->kernel == 5) add_products(x, g, sums, s, 5, 1);
    else if (vectors == 2) add_products(x, g, sums, s, 3, 2);
    else add_products(x, g, sums, s, 3, 1);
}

/* The gradient of a row of the input, from the rows in the ring. */
static void gradient_row(const sizes *s, float *ring, const float *packed, int64_t row, float *out,
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
                    packed + (v * s->kernel + u) * LANES};
            }
        }
        filter_row(taps, count, s->kernel * s->kernel * LANES, out + phase * lanes,
                   (s->width - phase + s->stride - 1) / s->stride, 1, s->stride, vectors);
    }
}

INLINE void store_vectors(const sizes *s, const norm *before, const float *row, const bf16 *x,
                          bf16 *gx, int64_t c, double *totals, int vectors) {
    const group_norm b = describe(before, s->channels, c, vectors);
    vec first[MAX_VECTORS] = {0}, second[MAX_VECTORS] = {0};
    for (int64_t j = 0; j < s->width; j++, x += s->channels, gx += s->channels)
        UNROLL for (int v = 0; v < vectors; v++) {
            vec gradient = loadf(row + (j * vectors + v) * LANES);
            if (before) {
                vec e = load(x + v * LANES);
                gradient = keep(passes(e * b.scale[v] + b.offset[v], &b.limits), gradient);
                first[v] += gradient;
                second[v] += gradient * (e - b.mean[v]);
            }
            store(gx + v * LANES, gradient);
        }
    add_sums(totals + c, first, vectors);
    add_sums(totals + s->channels + c, second, vectors);
}

/* Write a row of the gradient of the input: of the values before ``before``, without what its
   statistics contribute. ``totals`` are sums of it, and of its product with x - mean. */
SEPARATE void store_row(const sizes *s, const norm *before, const float *row, const bf16 *x,
                        bf16 *gx, int64_t c, double *totals, int vectors) {
    if (vectors == 2) store_vectors(s, before, row, x, gx, c, totals, 2);
    else store_vectors(s, before, row, x, gx, c, totals, 1);
}

/* Compute one part of the gradients. ``memory`` is for the rings of x and g, and a row. */
static void backward_part(const sizes *s, const part *p, const norm *before, const conversion *of_g,
                          const bf16 *x, const float *packed, const bf16 *g, bf16 *gx,
                          float *memory, float *gradients, double *totals) {
    const int64_t C = s->channels, taps = s->kernel * s->kernel, stride = s->stride;
    float *g_rings = memory + rings_length(p, s->width);
    float *out = g_rings + rings_length(p, s->out_width);
    clear_edges(p, memory, s->width);
    clear_edges(p, g_rings, s->out_width);
    x += p->image * s->height * s->width * C, gx += p->image * s->height * s->width * C;
    /* The rows of the input that belong to this part, and those of the output that take them. */
    const int64_t last = p->to < s->out_height ? p->to * stride : s->height;
    const int64_t above = (p->from * stride + s->padding - s->kernel) / stride + 1;
    const int64_t below = MIN(s->out_height, (last - 1 + s->padding) / stride + 1);
    int64_t ready = MAX(0, p->from * stride - s->padding), done = p->from * stride;
    for (int64_t i = p->from ? MAX(0, above) : 0; i < below; i++) {
        const int is_own = i >= p->from && i < p->to;
        const int64_t top = i * stride - s->padding;
        const int64_t end = is_own ? MIN(s->height, top + s->kernel) : 0;
        /* Rows of the input that no later row of the output takes. */
        const int64_t finished = i + 1 < below ? MIN(last, top + stride) : last;
        for (int64_t v = p->vector; v < p->end; v += MAX_VECTORS) {
            int vectors = MIN(MAX_VECTORS, p->end - v);
            int64_t c = v * LANES, group = (v - p->vector) / MAX_VECTORS;
            float *ring = memory + group * ring_length(s->width);
            float *g_ring = g_rings + group * ring_length(s->out_width);
            float *g_row = ring_row(g_ring, i, s->out_width, vectors);
            convert_gradient_row(of_g, g, s,
                                 (p->image * s->out_height + i) * s->out_width * C + c, c, g_row,
                                 vectors);
            for (int64_t row = ready; row < end; row++)
                convert_row(before, x + row * s->width * C + c, s, c,
                            ring_row(ring, row, s->width, vectors), vectors);
            for (int64_t u = MAX(0, -top); is_own && u < MIN(s->kernel, s->height - top); u++)
                add_weight_gradients(ring_row(ring, top + u, s->width, vectors)
                                         - s->padding * vectors * LANES,
                                     g_row, gradients + (v * taps + u * s->kernel) * LANES, s,
                                     vectors);
            for (int64_t row = done; row < finished; row++) {
                gradient_row(s, g_ring, packed + c * taps, row, out, vectors);
                store_row(s, before, out, x + row * s->width * C + c, gx + row * s->width * C + c,
                          c, totals, vectors);
            }
        }
        ready = MAX(ready, end), done = MAX(done, finished);
    }
}

/* The gradients of the weights (channels, taps), and the totals, from those of all strips. */
static void add_strips(const sizes *s, int64_t strips, const float *gradients, double *totals,
                       float *weight_gradient) {
    const int64_t C = s->channels, taps = s->kernel * s->kernel;
#pragma omp parallel for schedule(static)
    for (int64_t v = 0; v < C / LANES; v++)
        for (int64_t t = 0; t < taps; t++) {
            double sum[LANES] = {0};
            for (int64_t strip = 0; strip < strips; strip++)
                for (int k = 0; k < LANES; k++)
                    sum[k] += gradients[strip * taps * C + (v * taps + t) * LANES + k];
            for (int k = 0; k < LANES; k++)
                weight_gradient[(v * LANES + k) * taps + t] = sum[k];
        }
    for (int64_t strip = 1; strip < strips; strip++)
        for (int64_t c = 0; c < 2 * C; c++) totals[c] += totals[strip * 2 * C + c];
}

int useg_filter_backward(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                         const float *weight, const bf16 *filtered, const bf16 *g, bf16 *gx,
                         float *weight_gradient) {
    const int64_t C = s->channels, taps = s->kernel * s->kernel;
    const int64_t pixels = s->images * s->height * s->width;
    const division d = divide(s);
    const int64_t strips = s->images * d.strips;
    float *packed = pack(weight, C, taps), *slopes = malloc(2 * C * sizeof *slopes);
    float *constants = slopes + C;
    float *gradients = allocate_zeros(strips * C * taps * sizeof *gradients);
    double *totals = calloc(strips * 2 * C, sizeof *totals);
    int64_t failed = !packed || !slopes || !gradients || !totals
        || (after
            && measure_gradients(after, filtered, g, s->images * s->out_height * s->out_width, C,
                                 slopes, constants));
    const conversion of_g = {after, filtered, slopes, constants};
#pragma omp parallel for schedule(dynamic) reduction(+ : failed) if (!failed)
    for (int64_t number = 0; number < (failed ? 0 : d.number); number++) {
        const part p = find_part(s, &d, number);
        float *memory = allocate((rings_length(&p, s->width) + rings_length(&p, s->out_width)
                                  + s->width * MAX_VECTORS * LANES) * 4);
        if (memory)
            backward_part(s, &p, before, &of_g, x, packed, g, gx, memory,
                          gradients + p.strip * C * taps, totals + p.strip * 2 * C);
        else failed += 1;
        free(memory);
    }
    if (!failed) add_strips(s, strips, gradients, totals, weight_gradient);
    if (!failed && before) {
        set_gradients(before, C, pixels, totals, totals + C, slopes, constants);
        failed = apply_gradients(before, x, gx, gx, pixels, C, slopes, constants);
    }
    free(packed), free(slopes), free(gradients), free(totals);
    return failed;
}
