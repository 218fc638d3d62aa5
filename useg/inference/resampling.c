/* Resize color images, and choose the class of every pixel of resized logits.

   Images are Pillow's to the bit. Logits are resized and compared in one pass, which does not store
   them. Their numbers are those of PyTorch's bilinear interpolation of columns, then of rows with
   the pixels of a row as channels: the same products, rounded at the same places. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
/* Columns that are compared at a time: their numbers fit into the registers. */
#define BLOCK 64
/* PyTorch computes the last columns, fewer than these, in another order. */
#define GROUP 8
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* Along one axis: the first of two neighbours, and the weight of the second. */
typedef struct {
    int32_t low;
    float weight;
} place;

static place find_place(int64_t k, int64_t source, int64_t target) {
    const float scale = (float)source / (float)target;
    const float position = MAX(fmaf(k + 0.5f, scale, -0.5f), 0.0f);
    const int32_t low = MIN((int32_t)position, (int32_t)source - 1);
    return (place){low, position - low};
}

static float mix(float first, float second, float weight) {
    return fmaf(first, 1 - weight, second * weight);
}

/* Resize a row of numbers to ``width``, a multiple of LANES. 2 * LANES copies of the last number
   follow. */
static void resize_row(const float *from, int is_enlarged, int64_t width, const int32_t *lows,
                       const float *weights, float *restrict to) {
#if defined __AVX512F__ && !defined __clang__
    /* The neighbours of a vector lie within two vectors. */
    for (int64_t x = 0; is_enlarged && x < width; x += LANES) {
        vec one, two, mixed;
        integers low;
        memcpy(&one, from + lows[x], sizeof one);
        memcpy(&two, from + lows[x] + LANES, sizeof two);
        memcpy(&low, lows + x, sizeof low);
        low -= lows[x];
        const vec first = __builtin_shuffle(one, two, low);
        const vec second = __builtin_shuffle(one, two, low + 1);
        for (int j = 0; j < LANES; j++) mixed[j] = mix(first[j], second[j], weights[x + j]);
        memcpy(to + x, &mixed, sizeof mixed);
    }
    if (is_enlarged) return;
#endif
    for (int64_t x = 0; x < width; x++)
        to[x] = mix(from[lows[x]], from[lows[x] + 1], weights[x]);
}

/* Choose the classes of BLOCK pixels between two rows; the next class is ``step`` further. */
static void choose(const float *first, const float *second, float weight, int64_t classes,
                   int64_t step, uint8_t *labels) {
    float best[BLOCK];
    int32_t label[BLOCK];
    for (int j = 0; j < BLOCK; j++) best[j] = mix(first[j], second[j], weight), label[j] = 0;
    for (int64_t k = 1; k < classes; k++) {
        first += step, second += step;
        for (int j = 0; j < BLOCK; j++) {
            const float value = mix(first[j], second[j], weight);
            label[j] = value > best[j] ? (int32_t)k : label[j];
            best[j] = value > best[j] ? value : best[j];
        }
    }
    for (int j = 0; j < BLOCK; j++) labels[j] = label[j];
}

/* As ``choose`` for one of the last columns, in the other order. */
static uint8_t choose_last(const float *first, const float *second, float weight, int64_t classes,
                           int64_t step) {
    float best = 0;
    uint8_t label = 0;
    for (int64_t k = 0; k < classes; k++) {
        const float value = fmaf(second[k * step], weight, first[k * step] * (1 - weight));
        if (k == 0 || value > best) best = value, label = k;
    }
    return label;
}

/* logits (classes, h, w) -> labels (height, width); returns whether there was no memory. */
int useg_label(const float *logits, int64_t classes, int64_t h, int64_t w, int64_t height,
               int64_t width, uint8_t *labels) {
    const int64_t step = (width + BLOCK - 1) / BLOCK * BLOCK, size = classes * step;
    float *rows = aligned_alloc(64, 2 * size * sizeof *rows);
    float *weights = aligned_alloc(64, step * sizeof *weights);
    int32_t *lows = aligned_alloc(64, step * sizeof *lows);
    float *padded = malloc((w + 2 * LANES) * sizeof *padded);
    uint8_t *line = malloc(step);
    const int failed = !rows || !weights || !lows || !padded || !line;
    for (int64_t x = 0; !failed && x < step; x++) {
        const place p = find_place(MIN(x, width - 1), w, width);
        lows[x] = p.low, weights[x] = p.weight;
    }
    /* Two neighbouring rows are kept, each where its number is even or odd. */
    int64_t kept[2] = {-1, -1};
    for (int64_t y = 0; !failed && y < height; y++) {
        const place p = find_place(y, h, height);
        const int64_t low = p.low, high = MIN(low + 1, h - 1);
        for (int64_t row = low; row <= high; row++) {
            if (kept[row % 2] == row) continue;
            kept[row % 2] = row;
            for (int64_t k = 0; k < classes; k++) {
                memcpy(padded, logits + (k * h + row) * w, w * sizeof *padded);
                for (int j = 0; j < 2 * LANES; j++) padded[w + j] = padded[w - 1];
                resize_row(padded, w <= width, step, lows, weights,
                           rows + row % 2 * size + k * step);
            }
        }
        const float *first = rows + low % 2 * size, *second = rows + high % 2 * size;
        for (int64_t x = 0; x < step; x += BLOCK)
            choose(first + x, second + x, p.weight, classes, step, line + x);
        for (int64_t x = width / GROUP * GROUP; x < width; x++)
            line[x] = choose_last(first + x, second + x, p.weight, classes, step);
        memcpy(labels + y * width, line, width);
    }
    free(rows), free(weights), free(lows), free(padded), free(line);
    return failed;
}

/* Pillow's integer weights have this many fraction bits. */
#define WEIGHT_BITS 22
#define HALF (1 << (WEIGHT_BITS - 1))
#define CHANNELS 3

/* One pixel: its three colors, and the first color of the next pixel, which is not used. */
typedef int32_t pixel __attribute__((vector_size(16)));

/* Along one axis, each new pixel is a weighted mean of ``taps`` pixels in a row from its first. */
typedef struct {
    int64_t taps;
    const int32_t *firsts, *weights;
} filter;

static void resize_pixels(const int32_t *from, int64_t width, filter columns, uint8_t *to) {
    const int32_t *weight = columns.weights;
    for (int64_t x = 0; x < width; x++) {
        const int32_t *values = from + CHANNELS * columns.firsts[x];
        pixel sum = {HALF, HALF, HALF, HALF};
        for (int64_t k = 0; k < columns.taps; k++, values += CHANNELS) {
            pixel one;
            memcpy(&one, values, sizeof one);
            sum += *weight++ * one;
        }
        for (int c = 0; c < CHANNELS; c++) to[CHANNELS * x + c] = sum[c] >> WEIGHT_BITS;
    }
}

/* image (h, w, 3) -> resized (height, width, 3), columns first; returns whether there was no
   memory. */
int useg_resize(const uint8_t *image, int64_t h, int64_t w, int64_t height, int64_t width,
                int64_t column_taps, const int32_t *column_firsts, const int32_t *column_weights,
                int64_t row_taps, const int32_t *row_firsts, const int32_t *row_weights,
                uint8_t *resized) {
    const filter columns = {column_taps, column_firsts, column_weights};
    const int64_t size = CHANNELS * width, length = CHANNELS * w;
    /* Taps with a weight of 0 lie behind the last pixel of a row. */
    int32_t *line = calloc(length + CHANNELS * column_taps + 1, sizeof *line);
    int32_t *sums = malloc(size * sizeof *sums);
    uint8_t *rows = malloc(h * size);
    const int failed = !line || !sums || !rows;
    for (int64_t y = 0; !failed && y < h; y++) {
        for (int64_t x = 0; x < length; x++) line[x] = image[y * length + x];
        resize_pixels(line, width, columns, rows + y * size);
    }
    for (int64_t y = 0; !failed && y < height; y++) {
        for (int64_t x = 0; x < size; x++) sums[x] = HALF;
        for (int64_t k = 0; k < row_taps; k++) {
            const int32_t weight = row_weights[y * row_taps + k];
            const uint8_t *row = rows + (row_firsts[y] + k) * size;
            for (int64_t x = 0; weight && x < size; x++) sums[x] += weight * row[x];
        }
        for (int64_t x = 0; x < size; x++) resized[y * size + x] = sums[x] >> WEIGHT_BITS;
    }
    free(line), free(sums), free(rows);
    return failed;
}
