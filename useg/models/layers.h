/* Compiled layers that others are made of. */

#ifndef USEG_LAYERS_H
#define USEG_LAYERS_H

#include "kernels.h"

/* Of a depthwise convolution (depthwise.c). */
typedef struct {
    int64_t images, height, width, channels, kernel, stride, padding, out_height, out_width;
} sizes;

/* Of a 1x1 convolution (pointwise.c). */
typedef struct {
    int64_t pixels, channels, out_channels;
} pointwise;

int useg_norm_forward(const norm *n, const bf16 *x, const bf16 *residual, bf16 *y, int64_t pixels,
                      int64_t channels);
int useg_norm_backward(const norm *n, const bf16 *x, const bf16 *g, bf16 *gx, int64_t pixels,
                       int64_t channels);
int useg_filter_forward(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                        const float *weight, bf16 *filtered, bf16 *y);
int useg_filter_backward(const sizes *s, const norm *before, const norm *after, const bf16 *x,
                         const float *weight, const bf16 *filtered, const bf16 *g, bf16 *gx,
                         float *weight_gradient);
int useg_pointwise_forward(const pointwise *s, const bf16 *x, const float *weight, bf16 *y);
int useg_pointwise_backward(const pointwise *s, const bf16 *x, const float *weight, const bf16 *g,
                            const bf16 *added, bf16 *gx, float *weight_gradient);

#endif
