/* 3x3 convolutions of a network in training, with the batch normalisations before and after them.

   y = after(convolve(before(x))), in bf16, channels last, with zero padding. "before" and "after"
   are batch normalisations with their activations, or missing. What is normalised before is never
   stored, and the gradient of what is normalised after is not either: both are computed for a strip
   of some rows, which stays in the cache while it is multiplied.

   A strip holds blocks of 8 channels, one after the other. Each block is (rows + 2, width + 2, 8),
   with zeros around the image. So one shift of all places is one tap, and a tile of places may go
   on in the next row; what it computes for the places between rows is left out in the end.

   This needs a processor that multiplies bf16 numbers in vectors. With one that multiplies
   matrices (AMX), oneDNN is faster. */

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#include "kernels.h"

#define BLOCK 8
/* Places computed at once: as many vectors of sums, and three of weights, fit into registers. */
#define TILE 24
/* A strip and what is computed from it take about so many bytes. */
#define STRIP_BYTES (256 << 10)
/* Strips are distributed among so many chunks at most, whatever the number of threads. */
#define MAX_CHUNKS 32

typedef struct {
    int64_t images, height, width, channels, out_channels;
    /* From one tap of the weights to the next: ``channels`` or more. */
    int64_t weight_step;
    /* Whether the result is added to what there is. */
    int64_t is_added;
} convolution;

/* How images are cut into strips. */
typedef struct {
    int64_t pitch, rows, per_image, number, chunks;
    /* Places of a block of channels, and of the sums. */
    int64_t places, tiles;
} strips;

static strips cut(const convolution *s, int64_t bytes_per_place) {
    strips c = {s->width + 2};
    c.rows = MAX(1, MIN(s->height, STRIP_BYTES / (c.pitch * bytes_per_place)));
    c.per_image = (s->height + c.rows - 1) / c.rows;
    c.number = s->images * c.per_image;
    c.chunks = MIN(c.number, MAX_CHUNKS);
    c.places = (c.rows + 2) * c.pitch + 2 * TILE;
    c.tiles = (c.rows * c.pitch + TILE - 1) / TILE;
    return c;
}

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

/* Fill a strip with rows from ``first`` - 1 to ``first`` + ``rows`` of an image. */
static void fill(const convolution *s, const strips *cuts, int64_t channels, const conversion *how,
                 const bf16 *x, int64_t image, int64_t first, int64_t rows, bf16 *strip) {
    const int64_t size = cuts->places * BLOCK, C = channels, W = s->width;
    for (int64_t c = 0; c < C; c += LANES)
        for (int64_t r = 0; r < rows + 2; r++) {
            bf16 *out = strip + c / BLOCK * size + r * cuts->pitch * BLOCK;
            int64_t row = first - 1 + r, at = (image * s->height + row) * W * C + c;
            int is_outside = row < 0 || row >= s->height;
            for (bf16 *block = out; block <= out + size; block += size) {
                memset(block, 0, (is_outside ? cuts->pitch : 1) * BLOCK * sizeof *out);
                memset(block + (W + 1) * BLOCK, 0, BLOCK * sizeof *out);
            }
            if (is_outside) continue;
            if (!how->n)
                for (int64_t j = 0; j < W; j++)
                    for (int b = 0; b < 2; b++)
                        memcpy(out + b * size + (j + 1) * BLOCK, x + at + j * C + b * BLOCK,
                               BLOCK * sizeof *out);
            else if (how->values) convert_row(how, x, W, C, c, at, out + BLOCK, size, 1);
            else convert_row(how, x, W, C, c, at, out + BLOCK, size, 0);
        }
}

/* Multiply a tile of places with the weights of LANES output channels, packed as
   (3, blocks, BLOCK / 2, 3, LANES, 2). */
INLINE void multiply(const bf16 *strip, const strips *cuts, int64_t blocks, const bf16 *weight,
                     float *out) {
    vec sum[TILE];
    UNROLL for (int p = 0; p < TILE; p++) sum[p] = (vec){0};
    for (int64_t v = 0; v < 3; v++)
        for (int64_t b = 0; b < blocks; b++) {
            const bf16 *own = strip + (b * cuts->places + v * cuts->pitch) * BLOCK;
            for (int k = 0; k < BLOCK / 2; k++, own += 2, weight += 3 * 2 * LANES) {
                products w[3];
                UNROLL for (int u = 0; u < 3; u++)
                    w[u] = (products)_mm512_loadu_si512(weight + u * 2 * LANES);
                /* Each pair of numbers is loaded once for its three taps. */
                UNROLL for (int p = 0; p < TILE + 2; p++) {
                    int32_t pair;
                    memcpy(&pair, own + p * BLOCK, sizeof pair);
                    products x = (products)_mm512_set1_epi32(pair);
                    UNROLL for (int u = 0; u < 3; u++)
                        if (p >= u && p < TILE + u)
                            sum[p - u] = (vec)_mm512_dpbf16_ps((__m512)sum[p - u], w[u], x);
                }
            }
        }
    UNROLL for (int p = 0; p < TILE; p++) storef(out + p * LANES, sum[p]);
}

/* Pack weights (out_channels, 3, 3, channels) for the forward pass. */
static void pack(const convolution *s, const float *weight, bf16 *packed) {
    const int64_t pairs = s->channels / 2;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t d = 0; d < s->out_channels; d += LANES)
        for (int64_t t = 0; t < 9; t++)
            for (int64_t c = 0; c < s->channels; c += LANES) {
                bits rows[LANES] = {0};
                for (int k = 0; k < LANES; k++) {
                    const float *from = weight + ((d + k) * 9 + t) * s->weight_step + c;
                    halves own = round_floats(loadf(from));
                    memcpy(rows + k, &own, sizeof own);
                }
                transpose(rows);
                int64_t first = ((d / LANES * 3 + t / 3) * pairs + c / 2) * 3 + t % 3;
                for (int k = 0; k < LANES / 2; k++)
                    memcpy(packed + (first + 3 * k) * 2 * LANES, rows + k, sizeof *rows);
            }
}

/* Pack them for the gradient of the input: taps in reverse order, and the channels exchanged. */
static void pack_reversed(const convolution *s, const float *weight, bf16 *packed) {
    const int64_t pairs = s->out_channels / 2;
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t t = 0; t < 9; t++)
            for (int64_t c = 0; c < s->channels; c += LANES) {
                const float *own = weight + (2 * pair * 9 + 8 - t) * s->weight_step + c;
                int64_t at = ((c / LANES * 3 + t / 3) * pairs + pair) * 3 + t % 3;
                write_pairs(packed + at * 2 * LANES, round_floats(loadf(own)),
                            round_floats(loadf(own + 9 * s->weight_step)));
            }
}

/* Write LANES channels of a strip of the result, and measure them. */
static void finish_forward(const convolution *s, const strips *cuts, const float *sums,
                           int64_t rows, bf16 *out, double *m) {
    vec shift = loadf(sums), first = {0}, second = {0};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < s->width; j++) {
            bf16 *own = out + (r * s->width + j) * s->out_channels;
            vec v = loadf(sums + (r * cuts->pitch + j) * LANES), d = v - shift;
            first += d;
            second += d * d;
            store(own, s->is_added ? v + load(own) : v);
        }
    double totals[2][LANES] = {0};
    add_sums(totals[0], &first, 1);
    add_sums(totals[1], &second, 1);
    write_moments(m, s->out_channels, rows * s->width, sums, totals[0], totals[1]);
}

/* ``convolved`` is kept for the backward pass. Without ``after``, it is the result. */
int useg_convolution_forward(const convolution *s, const norm *before, const norm *after,
                             const bf16 *x, const float *weight, bf16 *convolved, bf16 *y) {
    const int64_t pixels = s->images * s->height * s->width, D = s->out_channels;
    const strips cuts = cut(s, 2 * s->channels + 4 * LANES);
    const conversion how = {before};
    bf16 *packed = allocate(9 * s->channels * D * sizeof *packed);
    double *m = malloc(cuts.number * 4 * D * sizeof *m);
    int64_t failed = !packed || !m || (before && measure(before, x, pixels, s->channels));
    if (failed) return free(packed), free(m), 1;
    pack(s, weight, packed);
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t k = 0; k < cuts.number; k++) {
        int64_t image = k / cuts.per_image, first = k % cuts.per_image * cuts.rows;
        int64_t rows = MIN(cuts.rows, s->height - first);
        bf16 *strip = allocate(cuts.places * s->channels * sizeof *strip);
        float *sums = allocate(cuts.tiles * TILE * LANES * sizeof *sums);
        if (!strip || !sums) failed = 1;
        else fill(s, &cuts, s->channels, &how, x, image, first, rows, strip);
        for (int64_t d = 0; d < D && strip && sums; d += LANES) {
            for (int64_t p = 0; p < rows * cuts.pitch; p += TILE)
                multiply(strip + p * BLOCK, &cuts, s->channels / BLOCK,
                         packed + 9 * s->channels * d, sums + p * LANES);
            finish_forward(s, &cuts, sums, rows,
                           convolved + (image * s->height + first) * s->width * D + d,
                           m + k * 4 * D + d);
        }
        free(strip), free(sums);
    }
    if (after && !failed) {
        set_moments(after, D, pixels, m, cuts.number);
        failed = apply(after, convolved, NULL, y, pixels, D);
    }
    free(packed), free(m);
    return failed;
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

/* Add to the gradients of three taps of one row of the weights, of BLOCK by LANES channels.
   x: pairs of places of one block. even, odd: pairs of gradients, the first of which is that of
   place 0, and place -1. */
INLINE void add_products(const bf16 *x, const bf16 *even, const bf16 *odd, int64_t number,
                         float *sums) {
    vec sum[3][BLOCK];
    UNROLL for (int t = 0; t < 3 * BLOCK; t++) sum[t / BLOCK][t % BLOCK] = loadf(sums + t * LANES);
    for (int64_t k = 0; k < number; k++) {
        products g[3] = {(products)_mm512_loadu_si512(even + k * 2 * LANES),
                         (products)_mm512_loadu_si512(odd + k * 2 * LANES),
                         (products)_mm512_loadu_si512(even + (k - 1) * 2 * LANES)};
        UNROLL for (int c = 0; c < BLOCK; c++) {
            int32_t pair;
            memcpy(&pair, x + (k * BLOCK + c) * 2, sizeof pair);
            products p = (products)_mm512_set1_epi32(pair);
            UNROLL for (int u = 0; u < 3; u++)
                sum[u][c] = (vec)_mm512_dpbf16_ps((__m512)sum[u][c], g[u], p);
        }
    }
    UNROLL for (int t = 0; t < 3 * BLOCK; t++) storef(sums + t * LANES, sum[t / BLOCK][t % BLOCK]);
}

/* Memory of one thread for the backward pass. */
typedef struct {
    bf16 *x, *g, *pairs, *even, *odd;
    float *sums;
} workplace;

static size_t reserve(const convolution *s, const strips *cuts, char *memory, workplace *w) {
    int64_t C = s->channels, D = s->out_channels, half = cuts->places / 2 + 2;
    size_t sizes[] = {2 * cuts->places * C, 2 * cuts->places * D, 4 * half * BLOCK,
                      4 * half * LANES, 4 * half * LANES, 4 * cuts->tiles * TILE * LANES};
    char *parts[6];
    size_t used = 0;
    for (int k = 0; k < 6; k++) {
        parts[k] = memory + used;
        used += (sizes[k] + 63) / 64 * 64;
    }
    *w = (workplace){(bf16 *)parts[0], (bf16 *)parts[1], (bf16 *)parts[2],
                     (bf16 *)parts[3], (bf16 *)parts[4], (float *)parts[5]};
    return used;
}

/* Add the gradients of the weights from one strip: (D / LANES, C / BLOCK, 3, 3, BLOCK, LANES). */
static void add_weight_gradients(const convolution *s, const strips *cuts, const workplace *w,
                                 int64_t rows, float *gradients) {
    const int64_t size = cuts->places * BLOCK, number = rows * cuts->pitch / 2;
    for (int64_t d = 0; d < s->out_channels; d += LANES) {
        /* Place 0 is the first pixel of the second row of the strip. */
        const bf16 *g = w->g + d / BLOCK * size + (cuts->pitch + 1) * BLOCK;
        pair_places(g - 2 * BLOCK, size, number + 1, 2, w->even);
        pair_places(g - BLOCK, size, number, 2, w->odd);
        for (int64_t c = 0; c < s->channels; c += BLOCK) {
            pair_places(w->x + c / BLOCK * size, size, (rows + 2) * cuts->pitch / 2, 1, w->pairs);
            for (int64_t v = 0; v < 3; v++, gradients += 3 * BLOCK * LANES)
                add_products(w->pairs + v * cuts->pitch * BLOCK, w->even + 2 * LANES, w->odd,
                             number, gradients);
        }
    }
}

/* Write LANES channels of the gradient of the input: of the values before ``before``, without what
   its statistics contribute. ``totals`` are sums of it, and of its product with x - mean. */
static void finish_backward(const convolution *s, const strips *cuts, const norm *before,
                            const float *sums, int64_t rows, const bf16 *x, bf16 *gx, int64_t c,
                            double *totals) {
    vec mean = {0}, scale = {0}, offset = {0}, first = {0}, second = {0};
    if (before) {
        mean = loadf(before->statistics + c);
        scale = loadf(before->statistics + 2 * s->channels + c);
        offset = loadf(before->statistics + 3 * s->channels + c);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < s->width; j++) {
            int64_t at = (r * s->width + j) * s->channels;
            vec g = loadf(sums + (r * cuts->pitch + j) * LANES);
            if (before) {
                vec v = load(x + at);
                g = keep(passes(v * scale + offset, before), g);
                first += g;
                second += g * (v - mean);
            }
            store(gx + at, g);
        }
    for (int k = 0; k < LANES && before; k++) {
        totals[c + k] += first[k];
        totals[s->channels + c + k] += second[k];
    }
}

static void backward_strip(const convolution *s, const strips *cuts, const norm *before,
                           const conversion *of_g, const bf16 *x, const bf16 *packed, const bf16 *g,
                           bf16 *gx, int64_t k, const workplace *w, float *gradients,
                           double *totals) {
    int64_t image = k / cuts->per_image, first = k % cuts->per_image * cuts->rows;
    int64_t rows = MIN(cuts->rows, s->height - first), C = s->channels, D = s->out_channels;
    int64_t start = (image * s->height + first) * s->width * C;
    const conversion of_x = {before};
    fill(s, cuts, C, &of_x, x, image, first, rows, w->x);
    fill(s, cuts, D, of_g, g, image, first, rows, w->g);
    for (int64_t c = 0; c < C; c += LANES) {
        for (int64_t p = 0; p < rows * cuts->pitch; p += TILE)
            multiply(w->g + p * BLOCK, cuts, D / BLOCK, packed + 9 * D * c, w->sums + p * LANES);
        finish_backward(s, cuts, before, w->sums, rows, x + start + c, gx + start + c, c, totals);
    }
    add_weight_gradients(s, cuts, w, rows, gradients);
}

/* The gradients of the weights (D, 3, 3, C), and the totals, from those of all chunks. */
static void add_chunks(const convolution *s, int64_t chunks, const float *gradients, double *totals,
                       float *weight_gradient) {
    const int64_t C = s->channels, length = 9 * C * s->out_channels;
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < length / (BLOCK * LANES); part++) {
        int64_t t = part % 9, block = part / 9;
        int64_t c = block % (C / BLOCK) * BLOCK, d = block / (C / BLOCK) * LANES;
        float sum[BLOCK * LANES] = {0};
        for (int64_t k = 0; k < chunks; k++)
            for (int i = 0; i < BLOCK * LANES; i++)
                sum[i] += gradients[k * length + part * BLOCK * LANES + i];
        for (int i = 0; i < BLOCK * LANES; i++)
            weight_gradient[((d + i % LANES) * 9 + t) * s->weight_step + c + i / LANES] = sum[i];
    }
    for (int64_t k = 1; k < chunks; k++)
        for (int64_t c = 0; c < 2 * C; c++) totals[c] += totals[k * 2 * C + c];
}

int useg_convolution_backward(const convolution *s, const norm *before, const norm *after,
                              const bf16 *x, const float *weight, const bf16 *convolved,
                              const bf16 *g, bf16 *gx, float *weight_gradient) {
    const int64_t pixels = s->images * s->height * s->width, C = s->channels, D = s->out_channels;
    const strips cuts = cut(s, 2 * C + 2 * D + 8 * LANES + 2 * BLOCK);
    const int64_t length = 9 * C * D;
    bf16 *packed = allocate(length * sizeof *packed);
    float *gradients = allocate_zeros(cuts.chunks * length * sizeof *gradients);
    float *slopes = malloc(2 * (C + D) * sizeof *slopes), *constants = slopes + C + D;
    double *totals = calloc(cuts.chunks * 2 * C, sizeof *totals);
    int64_t failed = !packed || !gradients || !slopes || !totals
        || (after && measure_gradients(after, convolved, g, pixels, D, slopes + C, constants + C));
    const conversion of_g = {after, convolved, slopes + C, constants + C};
    if (!failed) pack_reversed(s, weight, packed);
    const int64_t chunks = failed ? 0 : cuts.chunks;
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        workplace w;
        char *memory = allocate(reserve(s, &cuts, NULL, &w));
        if (memory) reserve(s, &cuts, memory, &w);
        else failed += 1;
        for (int64_t k = cuts.number * chunk / cuts.chunks;
             memory && k < cuts.number * (chunk + 1) / cuts.chunks; k++)
            backward_strip(s, &cuts, before, &of_g, x, packed, g, gx, k, &w,
                           gradients + chunk * length, totals + chunk * 2 * C);
        free(memory);
    }
    if (!failed) add_chunks(s, cuts.chunks, gradients, totals, weight_gradient);
    if (!failed && before) {
        set_gradients(before, C, pixels, totals, totals + C, slopes, constants);
        failed = apply_gradients(before, x, gx, gx, pixels, C, slopes, constants);
    }
    free(packed), free(gradients), free(slopes), free(totals);
    return failed;
}

int useg_has_convolutions(void) { return 1; }

#else

int useg_convolution_forward(void) { return 1; }
int useg_convolution_backward(void) { return 1; }
int useg_has_convolutions(void) { return 0; }

#endif
