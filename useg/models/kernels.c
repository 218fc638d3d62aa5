/* Layers of a network in training, in bf16, channels last: what PyTorch's own kernels do slowly.

   Batch normalisation with ReLU or ReLU6, weights of repeated pixels, and the loss, forward and
   backward. All sums are in fp32 or wider, in an order that does not depend on the number of
   threads.
   kernels.py compiles this file and says what the arguments are. */

#include "layers.h"

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
