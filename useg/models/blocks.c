/* Inverted residual blocks of a network in training, one after the other, in one call.

   A block expands x by a 1x1 convolution, applies a depthwise convolution and projects the result
   by another 1x1 convolution; each is normalised, and x may be added. The layers are those of the
   other files. For small images, calling them from Python one by one takes longer than they do. */

#include "layers.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

typedef struct {
    sizes filter;
    int64_t channels, out_channels, is_sum;
    norm norms[3];
    /* Weights of the three convolutions. Without the first, the block does not expand. */
    const float *weights[3];
    float *weight_gradients[3];
    /* The result, if it is kept for others, and its gradient from them, or NULL. */
    bf16 *y;
    const bf16 *gradient;
} block;

/* What a block computes, in the order of its layers. The backward pass needs all of it. */
typedef struct {
    bf16 *hidden, *filtered, *normalized, *projected, *y;
} features;

/* The normalisation before the depthwise convolution. */
static const norm *norm_before(const block *b) { return b->weights[0] ? b->norms : NULL; }

static int64_t count_pixels(const block *b) {
    return b->filter.images * b->filter.height * b->filter.width;
}

static int64_t count_out_pixels(const block *b) {
    return b->filter.images * b->filter.out_height * b->filter.out_width;
}

static pointwise expansion(const block *b) {
    return (pointwise){count_pixels(b), b->channels, b->filter.channels};
}

static pointwise projection(const block *b) {
    return (pointwise){count_out_pixels(b), b->filter.channels, b->out_channels};
}

/* Numbers to the end of their last cache line. */
static int64_t fill_lines(int64_t number) { return (number + 31) / 32 * 32; }

/* A part of memory for so many numbers. */
static bf16 *take(bf16 **memory, int64_t number) {
    bf16 *part = *memory;
    *memory += fill_lines(number);
    return part;
}

static features find_features(const block *b, const bf16 *x, bf16 **memory) {
    int64_t pixels = count_out_pixels(b);
    features f = {(bf16 *)x};
    if (b->weights[0]) f.hidden = take(memory, count_pixels(b) * b->filter.channels);
    f.filtered = take(memory, pixels * b->filter.channels);
    f.normalized = take(memory, pixels * b->filter.channels);
    f.projected = take(memory, pixels * b->out_channels);
    f.y = b->y ? b->y : take(memory, pixels * b->out_channels);
    return f;
}

/* How many numbers ``memory`` is for in the functions below. */
int64_t useg_blocks_length(const block *blocks, int64_t number) {
    int64_t length = 0;
    for (const block *b = blocks; b < blocks + number; b++) {
        int64_t out = count_out_pixels(b);
        length += (b->weights[0] != NULL) * count_pixels(b) * b->filter.channels
            + out * (2 * b->filter.channels + 2 * b->out_channels) + 5 * 32;
    }
    return length;
}

int useg_blocks_forward(const block *blocks, int64_t number, const bf16 *x, bf16 *memory) {
    int failed = 0;
    for (const block *b = blocks; b < blocks + number && !failed; b++) {
        const features f = find_features(b, x, &memory);
        const pointwise wide = expansion(b), narrow = projection(b);
        failed = (b->weights[0] && useg_pointwise_forward(&wide, x, b->weights[0], f.hidden))
            || useg_filter_forward(&b->filter, norm_before(b), b->norms + 1, f.hidden,
                                   b->weights[1], f.filtered, f.normalized)
            || useg_pointwise_forward(&narrow, f.normalized, b->weights[2], f.projected)
            || useg_norm_forward(b->norms + 2, f.projected, b->is_sum ? x : NULL, f.y,
                                 narrow.pixels, b->out_channels);
        x = f.y;
    }
    return failed;
}

/* Compute the gradients of a block's x and weights from that of its result, g. ``added`` is added
   to that of x. The gradients within the block are written to ``memory``. */
static int lead_through(const block *b, const bf16 *x, const features *f, const bf16 *g,
                        const bf16 *added, bf16 *memory, bf16 *gx) {
    const pointwise wide = expansion(b), narrow = projection(b);
    bf16 *of_projected = take(&memory, narrow.pixels * b->out_channels);
    bf16 *of_normalized = take(&memory, narrow.pixels * b->filter.channels);
    bf16 *of_hidden = b->weights[0] ? take(&memory, wide.pixels * b->filter.channels) : gx;
    return useg_norm_backward(b->norms + 2, f->projected, g, of_projected, narrow.pixels,
                              b->out_channels)
        || useg_pointwise_backward(&narrow, f->normalized, b->weights[2], of_projected, NULL,
                                   of_normalized, b->weight_gradients[2])
        || useg_filter_backward(&b->filter, norm_before(b), b->norms + 1, f->hidden,
                                b->weights[1], f->filtered, of_normalized, of_hidden,
                                b->weight_gradients[1])
        || (b->weights[0]
            && useg_pointwise_backward(&wide, x, b->weights[0], of_hidden, added, gx,
                                       b->weight_gradients[0]));
}

/* The first convolution adds another gradient of x. There is one at most, and without it none. */
int useg_blocks_backward(const block *blocks, int64_t number, const bf16 *x, bf16 *memory,
                         bf16 *x_gradient) {
    features *all = malloc(number * sizeof *all);
    int64_t inner = 0, outer = 0;
    for (const block *b = blocks; b < blocks + number; b++) {
        const int64_t k = b - blocks;
        if (all) all[k] = find_features(b, k ? all[k - 1].y : x, &memory);
        int64_t wide = (count_pixels(b) + count_out_pixels(b)) * b->filter.channels;
        inner = MAX(inner, fill_lines(wide + count_out_pixels(b) * b->out_channels + 3 * 32));
        outer = MAX(outer, fill_lines(count_pixels(b) * b->channels));
    }
    bf16 *gradients = allocate((inner + 2 * outer) * sizeof *gradients);
    int failed = !all || !gradients;
    const bf16 *g = blocks[number - 1].gradient;
    for (int64_t k = number - 1; k >= 0 && !failed; k--) {
        const bf16 *own_x = k ? all[k - 1].y : x, *kept = k ? blocks[k - 1].gradient : NULL;
        bf16 *gx = k ? gradients + inner + k % 2 * outer : x_gradient;
        failed = lead_through(blocks + k, own_x, all + k, g, blocks[k].is_sum ? g : kept, gradients,
                              gx);
        g = gx;
    }
    free(all), free(gradients);
    return failed;
}

#else

int64_t useg_blocks_length(void) { return 0; }
int useg_blocks_forward(void) { return 1; }
int useg_blocks_backward(void) { return 1; }

#endif
