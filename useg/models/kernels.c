/* Layers of a network in training, in bf16, channels last: what PyTorch's own kernels do slowly.

   Batch normalisation with ReLU or ReLU6, depthwise convolutions, and the loss, forward and
   backward. All sums are in fp32 or wider, in an order that does not depend on the number of
   threads.
   kernels.py compiles this file and says what the arguments are. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE vec load(const bf16 *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

INLINE vec loadf(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void storef(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* Round to the nearest, ties to even. */
INLINE void store(bf16 *p, vec v) {
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    bits u = (bits)v;
    bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    bits is_nan = (bits)((u & 0x7fffffff) > 0x7f800000);
    halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), halves);
#endif
    memcpy(p, &h, sizeof h);
}

INLINE float load1(const bf16 *p) {
    uint32_t u = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

INLINE void store1(bf16 *p, float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    *p = v != v ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE vec keep(bits mask, vec a) { return (vec)(mask & (bits)a); }

/* The activations: none, ReLU, ReLU6. NaN stays NaN. */
INLINE vec activate(vec v, int kind) {
    const vec zero = {0};
    if (kind) v = keep(~(bits)(v < zero), v);
    if (kind == 2) {
        bits above = (bits)(v > zero + 6.0f);
        v = (vec)((~above & (bits)v) | (above & (bits)(zero + 6.0f)));
    }
    return v;
}

/* Where the gradient of the activation is 1; elsewhere it is 0. */
INLINE bits passes(vec v, int kind) {
    const vec zero = {0};
    bits all = ~(bits){0};
    if (kind) all &= (bits)(v > zero);
    if (kind == 2) all &= (bits)(v < zero + 6.0f);
    return all;
}

INLINE float activate1(float v, int kind) {
    if (kind && v < 0) v = 0;
    return kind == 2 && v > 6 ? 6 : v;
}

INLINE int passes1(float v, int kind) { return !kind || (v > 0 && (kind < 2 || v < 6)); }

/* ---------------------------------------------------------------- batch normalisation

   The values (pixels, channels) are seen as rows of some whole pixels, so that a row is a multiple
   of the vector's lanes, and long enough. What is left over at the end is less than a row. Rows
   are summed in chunks, which are the same whatever the number of threads. */

typedef struct {
    int64_t length, rows, rest, chunks;
} layout;

static layout lay_out(int64_t pixels, int64_t channels) {
    int64_t fold = 1;
    while (fold * channels % LANES || (fold * channels < 4 * LANES && 2 * fold <= pixels)) fold++;
    layout a = {fold * channels, pixels / fold, pixels % fold * channels, 0};
    a.chunks = MAX(1, MIN(a.rows, MIN(32, pixels * channels / 16384)));
    return a;
}

static float *repeat(const float *values, int64_t channels, int64_t length, float *out) {
    for (int64_t k = 0; k < length; k++) out[k] = values[k % channels];
    return out;
}

/* Add the values that one chunk contributes to two sums per place of a row. In the forward pass:
   x - shift and its square; in the backward pass (g is given): the gradient that passes the
   activation, and its product with x - shift. */
INLINE void sum_rows(const bf16 *x, const bf16 *g, int64_t length, int64_t rows, int64_t place,
                     const float *shift, const float *scale, const float *offset, int kind,
                     float *first, float *second, int vectors) {
    vec s[4], a[4], b[4], one[4], two[4];
    for (int k = 0; k < vectors; k++) {
        s[k] = loadf(shift + place + LANES * k);
        if (g) {
            a[k] = loadf(scale + place + LANES * k);
            b[k] = loadf(offset + place + LANES * k);
        }
        one[k] = two[k] = (vec){0};
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * length + place;
        for (int k = 0; k < vectors; k++) {
            vec v = load(x + at + LANES * k);
            vec d = v - s[k];
            if (g) {
                vec passed = keep(passes(v * a[k] + b[k], kind), load(g + at + LANES * k));
                one[k] += passed;
                two[k] += passed * d;
            } else {
                one[k] += d;
                two[k] += d * d;
            }
        }
    }
    for (int k = 0; k < vectors; k++) {
        storef(first + place + LANES * k, one[k]);
        storef(second + place + LANES * k, two[k]);
    }
}

INLINE void sum_chunk(const bf16 *x, const bf16 *g, int64_t length, int64_t rows,
                      const float *shift, const float *scale, const float *offset, int kind,
                      float *first, float *second) {
    int64_t place = 0;
    for (; place + 4 * LANES <= length; place += 4 * LANES)
        sum_rows(x, g, length, rows, place, shift, scale, offset, kind, first, second, 4);
    for (; place < length; place += LANES)
        sum_rows(x, g, length, rows, place, shift, scale, offset, kind, first, second, 1);
}

static void sum_all(const bf16 *x, const bf16 *g, layout a, int64_t channels, const float *shift,
                    const float *scale, const float *offset, int kind, float *partial,
                    double *first, double *second) {
#pragma omp parallel for schedule(static) if (a.chunks > 1)
    for (int64_t k = 0; k < a.chunks; k++) {
        int64_t from = a.rows * k / a.chunks, to = a.rows * (k + 1) / a.chunks;
        const bf16 *own = x + from * a.length, *own_g = g + from * a.length;
        float *one = partial + 2 * k * a.length, *two = one + a.length;
        if (!g) sum_chunk(own, NULL, a.length, to - from, shift, NULL, NULL, 0, one, two);
        else if (kind == 2) sum_chunk(own, own_g, a.length, to - from, shift, scale, offset, 2, one, two);
        else if (kind == 1) sum_chunk(own, own_g, a.length, to - from, shift, scale, offset, 1, one, two);
        else sum_chunk(own, own_g, a.length, to - from, shift, scale, offset, 0, one, two);
    }
    memset(first, 0, channels * sizeof *first);
    memset(second, 0, channels * sizeof *second);
    for (int64_t k = 0; k < a.chunks; k++) {
        const float *one = partial + 2 * k * a.length, *two = one + a.length;
        for (int64_t start = 0; start < a.length; start += channels)
            for (int64_t c = 0; c < channels; c++) {
                first[c] += one[start + c];
                second[c] += two[start + c];
            }
    }
    for (int64_t k = 0; k < a.rest; k++) {
        int64_t at = a.rows * a.length + k, c = k % channels;
        float v = load1(x + at), d = v - shift[k];
        if (g) {
            float passed = passes1(v * scale[k] + offset[k], kind) ? load1(g + at) : 0;
            first[c] += passed;
            second[c] += passed * d;
        } else {
            first[c] += d;
            second[c] += d * d;
        }
    }
}

/* y = activation(x * scale + offset + residual) */
INLINE void scale_rows(const bf16 *x, const bf16 *residual, bf16 *y, layout a, int64_t from,
                       int64_t to, const float *scale, const float *offset, int kind) {
    for (int64_t row = from; row < to; row++)
        for (int64_t k = 0; k < a.length; k += LANES) {
            int64_t at = row * a.length + k;
            vec v = load(x + at) * loadf(scale + k) + loadf(offset + k);
            if (residual) v += load(residual + at);
            store(y + at, activate(v, kind));
        }
}

/* gx = scale * (gradient that passes) + slope * x + constant */
INLINE void gradient_rows(const bf16 *x, const bf16 *g, bf16 *gx, layout a, int64_t from,
                          int64_t to, const float *scale, const float *offset, const float *slope,
                          const float *constant, int kind) {
    for (int64_t row = from; row < to; row++)
        for (int64_t k = 0; k < a.length; k += LANES) {
            int64_t at = row * a.length + k;
            vec v = load(x + at), factor = loadf(scale + k);
            vec passed = keep(passes(v * factor + loadf(offset + k), kind), load(g + at));
            store(gx + at, factor * passed + loadf(slope + k) * v + loadf(constant + k));
        }
}

int useg_norm_forward(const bf16 *x, const bf16 *residual, bf16 *y, int64_t pixels,
                      int64_t channels, const float *weight, const float *bias,
                      float *running_mean, float *running_var, int64_t *tracked, float momentum,
                      float epsilon, int kind, float *mean, float *scale) {
    layout a = lay_out(pixels, channels);
    float *memory = malloc((2 * a.chunks + 3) * a.length * sizeof *memory);
    double *sums = malloc(2 * channels * sizeof *sums);
    if (!memory || !sums) return free(memory), free(sums), 1;
    float *shift = memory, *scales = shift + a.length, *offsets = scales + a.length;
    for (int64_t k = 0; k < a.length; k++) shift[k] = load1(x + k % channels);
    sum_all(x, NULL, a, channels, shift, NULL, NULL, 0, offsets + a.length, sums, sums + channels);
    for (int64_t c = 0; c < channels; c++) {
        double distance = sums[c] / pixels;
        double variance = MAX(0, sums[channels + c] / pixels - distance * distance);
        double center = shift[c] + distance, factor = weight[c] / sqrt(variance + epsilon);
        running_mean[c] += momentum * (center - running_mean[c]);
        running_var[c] += momentum * (variance * pixels / (pixels - 1) - running_var[c]);
        mean[c] = center;
        /* The deviation is kept apart from the weight, which may be 0. */
        mean[channels + c] = 1 / sqrt(variance + epsilon);
        scale[c] = factor;
        scale[channels + c] = bias[c] - center * factor;
    }
    *tracked += 1;
    repeat(scale, channels, a.length, scales);
    repeat(scale + channels, channels, a.length, offsets);
#pragma omp parallel for schedule(static) if (a.chunks > 1)
    for (int64_t k = 0; k < a.chunks; k++) {
        int64_t from = a.rows * k / a.chunks, to = a.rows * (k + 1) / a.chunks;
        if (residual) scale_rows(x, residual, y, a, from, to, scales, offsets, kind);
        else if (kind == 2) scale_rows(x, NULL, y, a, from, to, scales, offsets, 2);
        else if (kind == 1) scale_rows(x, NULL, y, a, from, to, scales, offsets, 1);
        else scale_rows(x, NULL, y, a, from, to, scales, offsets, 0);
    }
    for (int64_t k = 0; k < a.rest; k++) {
        int64_t at = a.rows * a.length + k;
        float v = load1(x + at) * scales[k] + offsets[k];
        if (residual) v += load1(residual + at);
        store1(y + at, activate1(v, kind));
    }
    free(memory), free(sums);
    return 0;
}

int useg_norm_backward(const bf16 *x, const bf16 *g, bf16 *gx, int64_t pixels, int64_t channels,
                       const float *mean, const float *scale, int kind, float *weight_gradient,
                       float *bias_gradient) {
    layout a = lay_out(pixels, channels);
    float *memory = malloc((2 * a.chunks + 5) * a.length * sizeof *memory);
    double *sums = malloc(2 * channels * sizeof *sums);
    if (!memory || !sums) return free(memory), free(sums), 1;
    float *shift = memory, *scales = shift + a.length, *offsets = scales + a.length;
    float *slopes = offsets + a.length, *constants = slopes + a.length;
    repeat(mean, channels, a.length, shift);
    repeat(scale, channels, a.length, scales);
    repeat(scale + channels, channels, a.length, offsets);
    sum_all(x, g, a, channels, shift, scales, offsets, kind, constants + a.length, sums,
            sums + channels);
    for (int64_t c = 0; c < channels; c++) {
        double inverse = mean[channels + c];
        bias_gradient[c] = sums[c];
        weight_gradient[c] = sums[channels + c] * inverse;
        double slope = -scale[c] * inverse * inverse * sums[channels + c] / pixels;
        slopes[c] = slope;
        constants[c] = -scale[c] * sums[c] / pixels - slope * mean[c];
    }
    for (int64_t k = channels; k < a.length; k++) {
        slopes[k] = slopes[k - channels];
        constants[k] = constants[k - channels];
    }
#pragma omp parallel for schedule(static) if (a.chunks > 1)
    for (int64_t k = 0; k < a.chunks; k++) {
        int64_t from = a.rows * k / a.chunks, to = a.rows * (k + 1) / a.chunks;
        if (kind == 2) gradient_rows(x, g, gx, a, from, to, scales, offsets, slopes, constants, 2);
        else if (kind == 1) gradient_rows(x, g, gx, a, from, to, scales, offsets, slopes, constants, 1);
        else gradient_rows(x, g, gx, a, from, to, scales, offsets, slopes, constants, 0);
    }
    for (int64_t k = 0; k < a.rest; k++) {
        int64_t at = a.rows * a.length + k;
        float v = load1(x + at);
        float passed = passes1(v * scales[k] + offsets[k], kind) ? load1(g + at) : 0;
        store1(gx + at, scales[k] * passed + slopes[k] * v + constants[k]);
    }
    free(memory), free(sums);
    return 0;
}

/* ---------------------------------------------------------------- depthwise convolutions

   A row of the output is a sum of taps: rows of the input, shifted, times a weight per channel.
   Output pixel ``phase + j * out_step`` takes pixel ``j * in_step + shift`` of each tap's row. */

#define MAX_TAPS 49

typedef struct {
    const bf16 *row;
    int64_t shift, weight;
} tap;

/* Weights (channels, taps) as blocks of LANES channels: (channels / LANES, taps, LANES). */
static float *pack(const float *weight, int64_t channels, int64_t taps) {
    float *packed = malloc(channels * taps * sizeof *packed);
    if (packed)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t k = 0; k < taps; k++)
                packed[(c / LANES * taps + k) * LANES + c % LANES] = weight[c * taps + k];
    return packed;
}

INLINE void filter_pixels(const tap *taps, int count, const float *packed, int64_t block_size,
                          bf16 *out, int64_t j, int64_t in_step, int64_t out_stride,
                          int64_t channels, int64_t width, int vectors, int pixels, int checked) {
    vec sum[4][2];
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++) sum[p][v] = (vec){0};
    for (int t = 0; t < count; t++) {
        int64_t at = j * in_step + taps[t].shift;
        if (checked && (at < 0 || at >= width)) continue;
        const bf16 *x = taps[t].row + at * channels;
        for (int v = 0; v < vectors; v++) {
            vec w = loadf(packed + v * block_size + taps[t].weight * LANES);
            for (int p = 0; p < pixels; p++)
                sum[p][v] += load(x + p * in_step * channels + v * LANES) * w;
        }
    }
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            store(out + p * out_stride + v * LANES, sum[p][v]);
}

INLINE void filter_row(const tap *taps, int count, const float *packed, int64_t num_weights,
                       bf16 *out, int64_t number, int64_t in_step, int64_t out_stride,
                       int64_t channels, int64_t width, int vectors) {
    int64_t low = 0, high = 0;
    for (int t = 0; t < count; t++) {
        low = MIN(low, taps[t].shift);
        high = MAX(high, taps[t].shift);
    }
    for (int64_t j = 0; j < number;) {
        int inner = j * in_step + low >= 0 && j + 4 <= number
            && (j + 3) * in_step + high < width;
        if (inner) {
            filter_pixels(taps, count, packed, num_weights * LANES, out + j * out_stride, j,
                          in_step, out_stride, channels, width, vectors, 4, 0);
            j += 4;
        } else {
            filter_pixels(taps, count, packed, num_weights * LANES, out + j * out_stride, j,
                          in_step, out_stride, channels, width, vectors, 1, 1);
            j += 1;
        }
    }
}

static void filter_all(tap *taps, int count, const float *packed, int64_t num_weights, bf16 *out,
                       int64_t number, int64_t in_step, int64_t out_stride, int64_t channels,
                       int64_t width) {
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES) {
        filter_row(taps, count, packed + c * num_weights, num_weights, out + c, number, in_step,
                   out_stride, channels, width, 2);
        for (int t = 0; t < count; t++) taps[t].row += 2 * LANES;
    }
    if (c < channels)
        filter_row(taps, count, packed + c * num_weights, num_weights, out + c, number, in_step,
                   out_stride, channels, width, 1);
}

int useg_depthwise_forward(const bf16 *x, const float *weight, bf16 *y, int64_t images,
                           int64_t height, int64_t width, int64_t channels, int64_t kernel,
                           int64_t stride, int64_t padding, int64_t out_height,
                           int64_t out_width) {
    float *packed = pack(weight, channels, kernel * kernel);
    if (!packed) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < images * out_height; k++) {
        tap taps[MAX_TAPS];
        int count = 0;
        for (int64_t v = 0; v < kernel; v++) {
            int64_t row = k % out_height * stride + v - padding;
            if (row < 0 || row >= height) continue;
            for (int64_t u = 0; u < kernel; u++)
                taps[count++] = (tap){x + (k / out_height * height + row) * width * channels,
                                      u - padding, v * kernel + u};
        }
        filter_all(taps, count, packed, kernel * kernel, y + k * out_width * channels, out_width,
                   stride, channels, channels, width);
    }
    free(packed);
    return 0;
}

int useg_depthwise_input_gradient(const bf16 *g, const float *weight, bf16 *gx, int64_t images,
                                  int64_t height, int64_t width, int64_t channels, int64_t kernel,
                                  int64_t stride, int64_t padding, int64_t out_height,
                                  int64_t out_width) {
    float *packed = pack(weight, channels, kernel * kernel);
    if (!packed) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < images * height; k++)
        for (int64_t phase = 0; phase < MIN(stride, width); phase++) {
            tap taps[MAX_TAPS];
            int count = 0;
            for (int64_t v = 0; v < kernel; v++) {
                int64_t row = k % height + padding - v;
                if (row < 0 || row % stride || row / stride >= out_height) continue;
                for (int64_t u = 0; u < kernel; u++) {
                    int64_t column = phase + padding - u;
                    if (column % stride) continue;
                    taps[count++] = (tap){
                        g + (k / height * out_height + row / stride) * out_width * channels,
                        column / stride, v * kernel + u};
                }
            }
            filter_all(taps, count, packed, kernel * kernel, gx + (k * width + phase) * channels,
                       (width - phase + stride - 1) / stride, 1, stride * channels, channels,
                       out_width);
        }
    free(packed);
    return 0;
}

/* The gradients of the weights in one row of the kernel, from one row of the output. */
INLINE void weight_row(const bf16 *x, const bf16 *g, float *sums, int64_t width,
                       int64_t out_width, int64_t channels, int64_t stride, int64_t padding,
                       int kernel, int vectors) {
    vec sum[7][2];
    for (int u = 0; u < kernel; u++)
        for (int v = 0; v < vectors; v++) sum[u][v] = loadf(sums + (u * vectors + v) * LANES);
    int64_t first = MIN(out_width, (padding + stride - 1) / stride);
    int64_t last = MAX(first, MIN(out_width, (width + padding - kernel) / stride + 1));
    for (int64_t j = 0; j < out_width; j++) {
        const bf16 *own = x + (j * stride - padding) * channels;
        vec grad[2];
        for (int v = 0; v < vectors; v++) grad[v] = load(g + j * channels + v * LANES);
        if (j >= first && j < last) {
            for (int u = 0; u < kernel; u++)
                for (int v = 0; v < vectors; v++)
                    sum[u][v] += load(own + u * channels + v * LANES) * grad[v];
        } else {
            for (int u = 0; u < kernel; u++) {
                int64_t at = j * stride + u - padding;
                if (at < 0 || at >= width) continue;
                for (int v = 0; v < vectors; v++)
                    sum[u][v] += load(own + u * channels + v * LANES) * grad[v];
            }
        }
    }
    for (int u = 0; u < kernel; u++)
        for (int v = 0; v < vectors; v++) storef(sums + (u * vectors + v) * LANES, sum[u][v]);
}

INLINE void weight_rows(const bf16 *x, const bf16 *g, float *sums, int64_t height, int64_t width,
                        int64_t channels, int64_t stride, int64_t padding, int64_t out_height,
                        int64_t out_width, int kernel, int vectors) {
    for (int64_t i = 0; i < out_height; i++)
        for (int64_t v = 0; v < kernel; v++) {
            int64_t row = i * stride + v - padding;
            if (row < 0 || row >= height) continue;
            weight_row(x + row * width * channels, g + i * out_width * channels,
                       sums + v * kernel * vectors * LANES, width, out_width, channels, stride,
                       padding, kernel, vectors);
        }
}

int useg_depthwise_weight_gradient(const bf16 *x, const bf16 *g, float *weight_gradient,
                                   int64_t images, int64_t height, int64_t width,
                                   int64_t channels, int64_t kernel, int64_t stride,
                                   int64_t padding, int64_t out_height, int64_t out_width) {
    if (kernel != 3 && kernel != 5) return 2;
    int64_t blocks = (channels + 2 * LANES - 1) / (2 * LANES), taps = kernel * kernel;
    /* Of each image and block: (taps, vectors, LANES). */
    float *memory = calloc(images * blocks * taps * 2 * LANES, sizeof *memory);
    if (!memory) return 1;
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < images * blocks; k++) {
        int64_t image = k / blocks, c = k % blocks * 2 * LANES;
        const bf16 *own = x + image * height * width * channels + c;
        const bf16 *own_g = g + image * out_height * out_width * channels + c;
        float *sums = memory + k * taps * 2 * LANES;
        int wide = c + 2 * LANES <= channels;
#define CALL(K, V) weight_rows(own, own_g, sums, height, width, channels, stride, padding, out_height, out_width, K, V)
        if (kernel == 5 && wide) CALL(5, 2);
        else if (kernel == 5) CALL(5, 1);
        else if (wide) CALL(3, 2);
        else CALL(3, 1);
#undef CALL
    }
    for (int64_t c = 0; c < channels; c++) {
        int64_t block = c / (2 * LANES);
        int64_t vectors = MIN(2, channels / LANES - 2 * block);
        for (int64_t t = 0; t < taps; t++) {
            float total = 0;
            for (int64_t n = 0; n < images; n++)
                total += memory[((n * blocks + block) * taps * 2 + t * vectors) * LANES
                                + c % (2 * LANES)];
            weight_gradient[c * taps + t] = total;
        }
    }
    free(memory);
    return 0;
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
        coefficients[1 + classes + c] = dice_factor * is_present * 2 * hits[c] / (both * both) / present;
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
