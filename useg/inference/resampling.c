/* Resize color images, and choose the class of every pixel of resized logits.

   Images are Pillow's to the bit. Logits are resized and compared in one pass, which does not store
   them. Their numbers are those of PyTorch's bilinear interpolation of columns, then of rows with
   the pixels of a row as channels: the same products, rounded at the same places. Where one class
   is the largest at all neighbouring pixels, it is the largest between them, too, so most blocks
   are not resized. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
/* Columns that are compared at a time: their numbers fit into the registers. */
#define BLOCK 32
/* Interpolated logits are off by less than this share of the largest logit. */
#define ROUNDING 1e-6f
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

/* A row of logits (classes, w), and what is known of each of its pixels. */
typedef struct {
    int64_t number;
    /* 2 * LANES copies of the last pixel follow the others. */
    float *logits;
    /* The largest class of each pixel, and how much larger it is than any other. */
    uint8_t *classes;
    float *margins;
    /* The largest absolute value of the row. */
    float largest;
    /* The row at its new width, and the blocks of it that have been computed. */
    float *resized;
    uint8_t *is_resized;
} row;

static void read_row(const float *logits, int64_t classes, int64_t step, int64_t w, row *to) {
    const int64_t length = w + 2 * LANES;
    for (int64_t k = 0; k < classes; k++) {
        memcpy(to->logits + k * length, logits + k * step, w * sizeof *logits);
        for (int64_t x = w; x < length; x++) to->logits[k * length + x] = logits[k * step + w - 1];
    }
    float largest[LANES] = {0};
    for (int64_t x = 0; x < w; x += LANES) {
        float best[LANES], second[LANES];
        int32_t label[LANES];
        for (int j = 0; j < LANES; j++) best[j] = second[j] = -INFINITY, label[j] = 0;
        for (int64_t k = 0; k < classes; k++) {
            const float *values = to->logits + k * length + x;
            for (int j = 0; j < LANES; j++) {
                const float value = values[j], smaller = MIN(value, best[j]);
                label[j] = value > best[j] ? (int32_t)k : label[j];
                best[j] = MAX(value, best[j]);
                second[j] = MAX(smaller, second[j]);
                largest[j] = MAX(fabsf(value), largest[j]);
            }
        }
        for (int j = 0; j < LANES; j++) to->classes[x + j] = label[j];
        for (int j = 0; j < LANES; j++) to->margins[x + j] = best[j] - second[j];
    }
    to->largest = 0;
    for (int j = 0; j < LANES; j++) to->largest = MAX(largest[j], to->largest);
}

/* The class that is largest at all pixels from ``start`` to ``stop`` of two rows, and so everywhere
   between them; -1 if there is none, or rounding could make another as large. */
static int find_only_class(const row *first, const row *second, int64_t start, int64_t stop) {
    const float margin = ROUNDING * MAX(first->largest, second->largest);
    const uint8_t class = first->classes[start];
    int others = 0;
    for (int64_t x = start; x < stop; x++) {
        others |= (first->classes[x] != class) | (second->classes[x] != class);
        others |= !(first->margins[x] > margin) | !(second->margins[x] > margin);
    }
    return others ? -1 : class;
}

/* logits (classes, h, w) -> labels (height, width); returns whether there was no memory. */
int useg_label(const float *logits, int64_t classes, int64_t h, int64_t w, int64_t height,
               int64_t width, uint8_t *labels) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK, step = blocks * BLOCK;
    const int64_t length = w + 2 * LANES, size = classes * step;
    float *resized = aligned_alloc(64, 2 * size * sizeof *resized);
    float *weights = aligned_alloc(64, step * sizeof *weights);
    int32_t *lows = aligned_alloc(64, step * sizeof *lows);
    float *numbers = malloc(2 * (classes + 1) * length * sizeof *numbers);
    uint8_t *bytes = malloc(2 * length + 2 * blocks + step);
    int *only = malloc(blocks * sizeof *only);
    const int failed = !resized || !weights || !lows || !numbers || !bytes || !only;
    uint8_t *line = bytes + 2 * length + 2 * blocks;
    for (int64_t x = 0; !failed && x < step; x++) {
        const place p = find_place(MIN(x, width - 1), w, width);
        lows[x] = p.low, weights[x] = p.weight;
    }
    /* Two neighbouring rows are kept, each where its number is even or odd. */
    row rows[2];
    for (int k = 0; k < 2; k++)
        rows[k] = (row){-1,
                        numbers + k * classes * length,
                        bytes + k * length,
                        numbers + (2 * classes + k) * length,
                        0,
                        resized + k * size,
                        bytes + 2 * length + k * blocks};
    int64_t compared = -1;
    for (int64_t y = 0; !failed && y < height; y++) {
        const place p = find_place(y, h, height);
        const int64_t high = MIN(p.low + 1, h - 1);
        row *first = rows + p.low % 2, *second = rows + high % 2;
        for (int64_t number = p.low; number <= high; number++) {
            row *one = rows + number % 2;
            if (one->number == number) continue;
            one->number = number;
            memset(one->is_resized, 0, blocks);
            read_row(logits + number * w, classes, h * w, w, one);
        }
        for (int64_t k = 0; k < blocks && compared != p.low; k++) {
            const int64_t last = lows[(k + 1) * BLOCK - 1] + 1;
            only[k] = find_only_class(first, second, lows[k * BLOCK], MIN(last, w - 1) + 1);
        }
        compared = p.low;
        for (int64_t k = 0; k < blocks; k++) {
            const int64_t x = k * BLOCK;
            if (only[k] >= 0) {
                memset(line + x, only[k], BLOCK);
                continue;
            }
            for (int j = 0; j < 2; j++) {
                row *one = j ? second : first;
                if (one->is_resized[k]) continue;
                one->is_resized[k] = 1;
                for (int64_t class = 0; class < classes; class++)
                    resize_row(one->logits + class * length, w <= width, BLOCK, lows + x,
                               weights + x, one->resized + class * step + x);
            }
            choose(first->resized + x, second->resized + x, p.weight, classes, step, line + x);
        }
        for (int64_t x = width / GROUP * GROUP; x < width; x++)
            if (only[x / BLOCK] < 0)
                line[x] = choose_last(first->resized + x, second->resized + x, p.weight, classes,
                                      step);
        memcpy(labels + y * width, line, width);
    }
    free(resized), free(weights), free(lows), free(numbers), free(bytes), free(only);
    return failed;
}

/* Pillow's integer weights have this many fraction bits. */
#define WEIGHT_BITS 22
#define HALF (1 << (WEIGHT_BITS - 1))
#define CHANNELS 3

/* Rows that are resized at a time: their sums fit into the registers. */
#define ROWS 4

/* One pixel: its three colors, and the first color of the next pixel, which is not used. */
typedef int32_t pixel __attribute__((vector_size(16)));
typedef uint8_t narrow_pixel __attribute__((vector_size(4)));

/* Along one axis, each new pixel is a weighted mean of ``taps`` pixels in a row from its first. */
typedef struct {
    int64_t taps;
    const int32_t *firsts, *weights;
} filter;

/* Resize ROWS rows of ``length`` colors to rows of ``width`` pixels and one byte. */
static void resize_rows(const int32_t *from, int64_t length, int64_t width, filter columns,
                        uint8_t *to) {
    const int32_t *weight = columns.weights;
    for (int64_t x = 0; x < width; x++) {
        const int32_t *values = from + CHANNELS * columns.firsts[x];
        pixel sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = HALF - (pixel){0};
        for (int64_t k = 0; k < columns.taps; k++, weight++, values += CHANNELS)
            for (int r = 0; r < ROWS; r++) {
                pixel one;
                memcpy(&one, values + r * length, sizeof one);
                sums[r] += *weight * one;
            }
        for (int r = 0; r < ROWS; r++) {
            const narrow_pixel one = __builtin_convertvector(sums[r] >> WEIGHT_BITS, narrow_pixel);
            /* The next pixel overwrites the fourth byte. */
            memcpy(to + r * (CHANNELS * width + 1) + CHANNELS * x, &one, sizeof one);
        }
    }
}

/* image (h, w, 3) -> resized (height, width, 3), columns first; returns whether there was no
   memory. */
int useg_resize(const uint8_t *image, int64_t h, int64_t w, int64_t height, int64_t width,
                int64_t column_taps, const int32_t *column_firsts, const int32_t *column_weights,
                int64_t row_taps, const int32_t *row_firsts, const int32_t *row_weights,
                uint8_t *resized) {
    const filter columns = {column_taps, column_firsts, column_weights};
    const int64_t size = CHANNELS * width, step = size + 1;
    /* Taps with a weight of 0 lie behind the last pixel of a row. */
    const int64_t length = CHANNELS * (w + column_taps) + 1;
    int32_t *lines = calloc(ROWS * length, sizeof *lines);
    int32_t *sums = malloc(size * sizeof *sums);
    uint8_t *rows = malloc((h + ROWS) * step);
    const int failed = !lines || !sums || !rows;
    for (int64_t y = 0; !failed && y < h; y += ROWS) {
        for (int64_t r = 0; r < MIN(ROWS, h - y); r++)
            for (int64_t x = 0; x < CHANNELS * w; x++)
                lines[r * length + x] = image[(y + r) * CHANNELS * w + x];
        resize_rows(lines, length, width, columns, rows + y * step);
    }
    for (int64_t y = 0; !failed && y < height; y++) {
        for (int64_t x = 0; x < size; x++) sums[x] = HALF;
        for (int64_t k = 0; k < row_taps; k++) {
            const int32_t weight = row_weights[y * row_taps + k];
            const uint8_t *row = rows + (row_firsts[y] + k) * step;
            for (int64_t x = 0; weight && x < size; x++) sums[x] += weight * row[x];
        }
        for (int64_t x = 0; x < size; x++) resized[y * size + x] = sums[x] >> WEIGHT_BITS;
    }
    free(lines), free(sums), free(rows);
    return failed;
}
