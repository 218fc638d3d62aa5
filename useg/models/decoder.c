/* The levels of an expanding path in training, one after the other, in one call.

   A level upsamples x by repeating pixels, concatenates it with a skip connection, and has two 3x3
   convolutions, each with batch normalisation and activation. What is normalised is never stored:
   the next convolution normalises what it reads, and its gradient is led back where it is read. */

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#include "layers.h"

typedef struct {
    upsampling sizes;
    norm norms[2];
    const float *weights[2];
    float *weight_gradients[2];
    /* NULL if there is none. */
    const bf16 *skip;
    bf16 *skip_gradient;
} level;

static int64_t count_pixels(const level *l) {
    return 4 * l->sizes.images * l->sizes.height * l->sizes.width;
}

static convolution second(const level *l) {
    const upsampling *s = &l->sizes;
    return (convolution){s->images, 2 * s->height, 2 * s->width, s->out_channels, s->out_channels};
}

/* How many numbers ``memory`` is for in the functions below: the results of both convolutions. */
int64_t useg_levels_length(const level *levels, int64_t number) {
    int64_t length = 0;
    for (const level *l = levels; l < levels + number; l++)
        length += 2 * count_pixels(l) * l->sizes.out_channels;
    return length;
}

int useg_levels_forward(const level *levels, int64_t number, const bf16 *x, bf16 *memory, bf16 *y) {
    const norm *before = NULL;
    int failed = 0;
    for (const level *l = levels; l < levels + number && !failed; l++) {
        const convolution conv = second(l);
        bf16 *merged = memory, *convolved = merged + count_pixels(l) * l->sizes.out_channels;
        failed = useg_upsample(&l->sizes, before, l->norms, x, l->skip, l->weights[0], merged)
            || useg_convolve(&conv, l->norms, l->norms + 1, merged, l->weights[1], convolved);
        x = convolved, before = l->norms + 1;
        memory = convolved + count_pixels(l) * l->sizes.out_channels;
    }
    const level *last = levels + number - 1;
    return failed || apply(before, x, NULL, y, count_pixels(last), last->sizes.out_channels);
}

/* ``g``: the gradient of y. */
int useg_levels_backward(const level *levels, int64_t number, const bf16 *x, const bf16 *memory,
                         const bf16 *g, bf16 *x_gradient) {
    int64_t longest = 0, widest = 0;
    for (const level *l = levels; l < levels + number; l++) {
        longest = MAX(longest, count_pixels(l) * l->sizes.out_channels);
        widest = MAX(widest, MAX(l->sizes.channels, l->sizes.out_channels));
        memory += 2 * count_pixels(l) * l->sizes.out_channels;
    }
    /* Two gradients, and what set_gradients gives of both normalisations of a level. */
    bf16 *gradients = allocate(2 * longest * sizeof *gradients);
    float *slopes = malloc(4 * widest * sizeof *slopes);
    int failed = !gradients || !slopes;
    float *const outer = slopes, *const inner = slopes + 2 * widest;
    for (const level *l = levels + number - 1; l >= levels && !failed; l--) {
        const int64_t pixels = count_pixels(l), D = l->sizes.out_channels;
        const int is_first = l == levels, is_last = l == levels + number - 1;
        const convolution conv = second(l);
        const bf16 *convolved = memory - pixels * D, *merged = convolved - pixels * D;
        const bf16 *own_x = is_first ? x : merged - count_pixels(l - 1) * l->sizes.channels;
        const norm *before = is_first ? NULL : l[-1].norms + 1;
        const conversion of_y = {l->norms + 1, convolved, outer, outer + widest};
        const conversion of_merged = {l->norms, merged, inner, inner + widest};
        bf16 *gx = is_first ? x_gradient : gradients;
        failed = (is_last
                  && measure_gradients(l->norms + 1, convolved, g, pixels, D, outer,
                                       outer + widest))
            || useg_convolve_backward(&conv, l->norms, &of_y, merged, l->weights[1], g,
                                      gradients + longest, l->weight_gradients[1], inner,
                                      inner + widest)
            || useg_upsample_backward(&l->sizes, before, &of_merged, own_x, l->skip, l->weights[0],
                                      gradients + longest, gx, l->skip_gradient,
                                      l->weight_gradients[0], outer, outer + widest);
        g = gx, memory = merged;
    }
    free(gradients), free(slopes);
    return failed;
}

#else

#include <stdint.h>

int64_t useg_levels_length(void) { return 0; }
int useg_levels_forward(void) { return 1; }
int useg_levels_backward(void) { return 1; }

#endif
