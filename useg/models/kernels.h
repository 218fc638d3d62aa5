/* What the compiled layers share: vectors, and batch normalisation with ReLU or ReLU6. */

#ifndef USEG_KERNELS_H
#define USEG_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(4 * LANES)))
/* Loops that need all registers are functions of their own. */
#define SEPARATE static __attribute__((noinline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
#ifdef __AVX512BF16__
typedef __m512bh products;
#endif

/* Memory for vectors: none of them lies in two cache lines, which takes twice as long to read. NULL
   if there is none. */
static void *allocate(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static void *allocate_zeros(size_t bytes) {
    void *memory = allocate(bytes);
    return memory ? memset(memory, 0, bytes) : NULL;
}

INLINE vec load(const bf16 *p) {
    halves h;
    memcpy(&h, p, sizeof h);
#ifdef __AVX512BF16__
    /* In half as many instructions as gcc needs for the line below. */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vec)(__builtin_convertvector(h, bits) << 16);
#endif
}

INLINE vec loadf(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void storef(float *p, vec v) { memcpy(p, &v, sizeof v); }

/* The first ``lanes`` lanes, all or half of them; none if there is none. */
INLINE vec read_floats(const float *p, int64_t lanes) {
    vec v = {0};
    if (lanes >= LANES) memcpy(&v, p, sizeof v);
    else if (lanes > 0) memcpy(&v, p, sizeof v / 2);
    return v;
}

INLINE void write_floats(float *p, vec v, int64_t lanes) {
    if (lanes >= LANES) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, sizeof v / 2);
}

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

#ifdef __AVX512BF16__
INLINE halves round_floats(vec v) { return (halves)_mm512_cvtneps_pbh((__m512)v); }

/* Write pairs of the numbers of two rows. */
INLINE void write_pairs(bf16 *p, halves one, halves two) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)one), high = _mm512_cvtepu16_epi32((__m256i)two);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

/* Transpose LANES vectors. */
INLINE void transpose(bits *rows) {
#ifdef __AVX512BF16__
    bits next[LANES];
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = low + 0x0000000800000008;
    /* Each round interleaves both halves, which moves the bits of (row, column) by one place; four
       of them exchange row and column. */
    for (int round = 0; round < 4; round++) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            __m512i one = (__m512i)rows[i], two = (__m512i)rows[i + LANES / 2];
            next[2 * i] = (bits)_mm512_permutex2var_epi32(one, low, two);
            next[2 * i + 1] = (bits)_mm512_permutex2var_epi32(one, high, two);
        }
        UNROLL for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
#else
    uint32_t from[LANES][LANES], to[LANES][LANES];
    memcpy(from, rows, sizeof from);
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++) to[i][k] = from[k][i];
    memcpy(rows, to, sizeof to);
#endif
}

INLINE void add_sums(double *to, const vec *values, int vectors) {
    UNROLL for (int v = 0; v < vectors; v++)
        for (int k = 0; k < LANES; k++) to[v * LANES + k] += values[v][k];
}

INLINE vec keep(bits mask, vec a) { return (vec)(mask & (bits)a); }

INLINE vec choose(bits mask, vec a, vec b) { return (vec)((mask & (bits)a) | (~mask & (bits)b)); }

/* ---------------------------------------------------------------- batch normalisation

   The values (pixels, channels) are seen as rows of some whole pixels, so that a row is a multiple
   of the vector's lanes, and long enough. What is left over at the end is less than a row. Rows
   are summed in chunks, which are the same whatever the number of threads. */

/* A batch normalisation, and the activation after it: ReLU and ReLU6 cut values off at limits. */
typedef struct {
    const float *weight, *bias;
    float *running_mean, *running_var;
    int64_t *tracked;
    /* Mean, 1 / deviation, scale and offset of each channel: (4, channels). */
    float *statistics;
    /* The gradients of weight and bias: (2, channels). */
    float *gradients;
    float momentum, epsilon, low, high;
} norm;

/* NaN stays NaN. */
INLINE vec activate(vec v, const norm *n) {
    const vec zero = {0}, low = zero + n->low, high = zero + n->high;
#ifdef __AVX512BF16__
    /* Of two numbers, one of which is NaN, these return the second. */
    return (vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)v));
#else
    v = choose((bits)(v < low), low, v);
    return choose((bits)(v > high), high, v);
#endif
}

/* Where the gradient of the activation is 1; elsewhere it is 0. */
INLINE bits passes(vec v, const norm *n) {
    const vec zero = {0};
    return (bits)(v > zero + n->low) & (bits)(v < zero + n->high);
}

INLINE float activate1(float v, const norm *n) {
    return v < n->low ? n->low : v > n->high ? n->high : v;
}

INLINE int passes1(float v, const norm *n) { return v > n->low && v < n->high; }

/* The statistics of a channel, from the sums of x - shift and its square. */
static void set_statistics(const norm *n, int64_t channels, int64_t c, int64_t pixels,
                           double shift, double first, double second) {
    double distance = first / pixels, variance = MAX(0, second / pixels - distance * distance);
    double mean = shift + distance, inverse = 1 / sqrt(variance + n->epsilon);
    double values[4] = {mean, inverse, n->weight[c] * inverse,
                        n->bias[c] - mean * n->weight[c] * inverse};
    for (int k = 0; k < 4; k++) n->statistics[k * channels + c] = values[k];
    n->running_mean[c] += n->momentum * (mean - n->running_mean[c]);
    n->running_var[c] += n->momentum * (variance * pixels / (pixels - 1) - n->running_var[c]);
}

/* The statistics of LANES channels at a time from those of ``number`` parts of the pixels: each
   has (4, channels) numbers, which are the number of its pixels, a shift, and the sums of x - shift
   and its square. */
static void set_moments(const norm *n, int64_t channels, int64_t pixels, const double *parts,
                        int64_t number) {
    for (int64_t c = 0; c < channels; c += LANES) {
        const double *shift = parts + channels + c;
        double first[LANES] = {0}, second[LANES] = {0};
        for (int64_t part = 0; part < number; part++) {
            const double *own = parts + part * 4 * channels + c;
            for (int k = 0; k < LANES; k++) {
                double count = own[k], d = own[channels + k] - shift[k];
                double sum = own[2 * channels + k];
                first[k] += sum + count * d;
                second[k] += own[3 * channels + k] + 2 * d * sum + count * d * d;
            }
        }
        for (int k = 0; k < LANES; k++)
            set_statistics(n, channels, c + k, pixels, shift[k], first[k], second[k]);
    }
    *n->tracked += 1;
}

/* Write the moments of LANES channels of one part. */
INLINE void write_moments(double *part, int64_t channels, double pixels, const float *shift,
                          const double *first, const double *second) {
    for (int k = 0; k < LANES; k++) {
        part[k] = pixels;
        part[channels + k] = shift[k];
        part[2 * channels + k] = first[k];
        part[3 * channels + k] = second[k];
    }
}

/* The gradients of weight and bias, and the slopes and constants of that of x, for each channel,
   from the sums of the gradients that pass the activation, and of their products with x - mean. */
static void set_gradients(const norm *n, int64_t channels, int64_t pixels, const double *first,
                          const double *second, float *slopes, float *constants) {
    for (int64_t c = 0; c < channels; c++) {
        double mean = n->statistics[c], inverse = n->statistics[channels + c];
        double scale = n->statistics[2 * channels + c];
        n->gradients[c] = second[c] * inverse;
        n->gradients[channels + c] = first[c];
        double factor = -scale * inverse * inverse * second[c] / pixels;
        slopes[c] = factor;
        constants[c] = -scale * first[c] / pixels - factor * mean;
    }
}

/* How numbers are converted on their way: normalised and activated, or, if they are gradients, led
   back through that. */
typedef struct {
    /* NULL: nothing is done. */
    const norm *n;
    /* Of gradients: the values that were normalised, and what set_gradients gives. */
    const bf16 *values;
    const float *slopes, *constants;
} conversion;

/* The gradient of a value v that was normalised and activated, from that of the result, g. */
INLINE vec lead_back(vec v, vec g, vec scale, vec offset, vec slope, vec constant, const norm *n) {
    return keep(passes(v * scale + offset, n), g) * scale + v * slope + constant;
}

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
    for (int64_t k = 0; k < length; k += channels) memcpy(out + k, values, channels * sizeof *out);
    return out;
}

/* Add the values that one chunk contributes to two sums per place of a row. In the forward pass:
   x - shift and its square; in the backward pass (g is given): the gradient that passes the
   activation, and its product with x - shift. */
INLINE void sum_rows(const norm *n, const bf16 *x, const bf16 *g, int64_t length, int64_t rows,
                     int64_t place, const float *shift, const float *scale, const float *offset,
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
                vec passed = keep(passes(v * a[k] + b[k], n), load(g + at + LANES * k));
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

INLINE void sum_chunk(const norm *n, const bf16 *x, const bf16 *g, int64_t length, int64_t rows,
                      const float *shift, const float *scale, const float *offset, float *first,
                      float *second) {
    int64_t place = 0;
    for (; place + 4 * LANES <= length; place += 4 * LANES)
        sum_rows(n, x, g, length, rows, place, shift, scale, offset, first, second, 4);
    for (; place < length; place += LANES)
        sum_rows(n, x, g, length, rows, place, shift, scale, offset, first, second, 1);
}

static void sum_all(const norm *n, const bf16 *x, const bf16 *g, layout a, int64_t channels,
                    const float *shift, const float *scale, const float *offset, float *partial,
                    double *first, double *second) {
#pragma omp parallel for schedule(static) if (a.chunks > 1)
    for (int64_t k = 0; k < a.chunks; k++) {
        int64_t from = a.rows * k / a.chunks, rows = a.rows * (k + 1) / a.chunks - from;
        const bf16 *own = x + from * a.length;
        float *one = partial + 2 * k * a.length, *two = one + a.length;
        if (g)
            sum_chunk(n, own, g + from * a.length, a.length, rows, shift, scale, offset, one, two);
        else sum_chunk(n, own, NULL, a.length, rows, shift, NULL, NULL, one, two);
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
            float passed = passes1(v * scale[k] + offset[k], n) ? load1(g + at) : 0;
            first[c] += passed;
            second[c] += passed * d;
        } else {
            first[c] += d;
            second[c] += d * d;
        }
    }
}

/* Compute the statistics of x (pixels, channels); returns 1 if there is no memory. */
static int measure(const norm *n, const bf16 *x, int64_t pixels, int64_t channels) {
    layout a = lay_out(pixels, channels);
    float *memory = allocate((2 * a.chunks + 1) * a.length * sizeof *memory);
    double *sums = malloc(2 * channels * sizeof *sums);
    if (!memory || !sums) return free(memory), free(sums), 1;
    for (int64_t c = 0; c < channels; c++) memory[c] = load1(x + c);
    for (int64_t k = channels; k < a.length; k++) memory[k] = memory[k - channels];
    sum_all(n, x, NULL, a, channels, memory, NULL, NULL, memory + a.length, sums, sums + channels);
    for (int64_t c = 0; c < channels; c++)
        set_statistics(n, channels, c, pixels, memory[c], sums[c], sums[channels + c]);
    *n->tracked += 1;
    free(memory), free(sums);
    return 0;
}

/* y = activation(x * scale + offset + residual) */
INLINE void scale_rows(const norm *n, const bf16 *x, const bf16 *residual, bf16 *y, layout a,
                       int64_t from, int64_t to, const float *scale, const float *offset) {
    for (int64_t row = from; row < to; row++)
        for (int64_t k = 0; k < a.length; k += LANES) {
            int64_t at = row * a.length + k;
            vec v = load(x + at) * loadf(scale + k) + loadf(offset + k);
            if (residual) v += load(residual + at);
            store(y + at, activate(v, n));
        }
}

/* Normalise x with its statistics; returns 1 if there is no memory. */
static int apply(const norm *n, const bf16 *x, const bf16 *residual, bf16 *y, int64_t pixels,
                 int64_t channels) {
    layout a = lay_out(pixels, channels);
    float *scales = allocate(2 * a.length * sizeof *scales), *offsets = scales + a.length;
    if (!scales) return 1;
    repeat(n->statistics + 2 * channels, channels, a.length, scales);
    repeat(n->statistics + 3 * channels, channels, a.length, offsets);
#pragma omp parallel for schedule(static) if (a.chunks > 1)
    for (int64_t k = 0; k < a.chunks; k++) {
        int64_t from = a.rows * k / a.chunks, to = a.rows * (k + 1) / a.chunks;
        if (residual) scale_rows(n, x, residual, y, a, from, to, scales, offsets);
        else scale_rows(n, x, NULL, y, a, from, to, scales, offsets);
    }
    for (int64_t k = 0; k < a.rest; k++) {
        int64_t at = a.rows * a.length + k;
        float v = load1(x + at) * scales[k] + offsets[k];
        if (residual) v += load1(residual + at);
        store1(y + at, activate1(v, n));
    }
    free(scales);
    return 0;
}

/* Compute the gradients of weight and bias, and the slopes and constants of that of x, from the
   gradient of the result; returns 1 if there is no memory. */
static int measure_gradients(const norm *n, const bf16 *x, const bf16 *g, int64_t pixels,
                             int64_t channels, float *slopes, float *constants) {
    layout a = lay_out(pixels, channels);
    float *memory = allocate((2 * a.chunks + 3) * a.length * sizeof *memory);
    double *sums = malloc(2 * channels * sizeof *sums);
    if (!memory || !sums) return free(memory), free(sums), 1;
    float *shift = memory, *scales = shift + a.length, *offsets = scales + a.length;
    repeat(n->statistics, channels, a.length, shift);
    repeat(n->statistics + 2 * channels, channels, a.length, scales);
    repeat(n->statistics + 3 * channels, channels, a.length, offsets);
    sum_all(n, x, g, a, channels, shift, scales, offsets, offsets + a.length, sums,
            sums + channels);
    set_gradients(n, channels, pixels, sums, sums + channels, slopes, constants);
    free(memory), free(sums);
    return 0;
}

/* Compute the gradient of x; returns 1 if there is no memory. */
static int apply_gradients(const norm *n, const bf16 *x, const bf16 *g, bf16 *gx, int64_t pixels,
                           int64_t channels, const float *slope, const float *constant) {
    layout a = lay_out(pixels, channels);
    float *memory = allocate(4 * a.length * sizeof *memory);
    if (!memory) return 1;
    float *scales = repeat(n->statistics + 2 * channels, channels, a.length, memory);
    float *offsets = repeat(n->statistics + 3 * channels, channels, a.length, scales + a.length);
    float *slopes = repeat(slope, channels, a.length, offsets + a.length);
    float *constants = repeat(constant, channels, a.length, slopes + a.length);
#pragma omp parallel for schedule(static) if (a.chunks > 1)
    for (int64_t chunk = 0; chunk < a.chunks; chunk++)
        for (int64_t row = a.rows * chunk / a.chunks; row < a.rows * (chunk + 1) / a.chunks; row++)
            for (int64_t k = 0; k < a.length; k += LANES) {
                int64_t at = row * a.length + k;
                store(gx + at,
                      lead_back(load(x + at), load(g + at), loadf(scales + k), loadf(offsets + k),
                                loadf(slopes + k), loadf(constants + k), n));
            }
    for (int64_t k = 0; k < a.rest; k++) {
        int64_t at = a.rows * a.length + k;
        float v = load1(x + at);
        float passed = passes1(v * scales[k] + offsets[k], n) ? load1(g + at) : 0;
        store1(gx + at, scales[k] * passed + slopes[k] * v + constants[k]);
    }
    free(memory);
    return 0;
}

#endif
