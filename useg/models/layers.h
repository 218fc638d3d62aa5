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

/* Of a 3x3 convolution (convolutions.c). */
typedef struct {
    int64_t images, height, width, channels, out_channels;
} convolution;

/* Of a 3x3 convolution of repeated pixels and of a skip connection, which has twice the height and
   width (upsampling.c). */
typedef struct {
    int64_t images, height, width, channels, skip_channels, out_channels;
} upsampling;

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

/* Convolve what ``before`` normalises, whose statistics are known, and compute those of ``after``;
   either may be NULL. */
int useg_convolve(const convolution *s, const norm *before, const norm *after, const bf16 *x,
                  const float *weight, bf16 *y);
int useg_upsample(const upsampling *s, const norm *before, const norm *after, const bf16 *x,
                  const bf16 *skip, const float *weight, bf16 *y);
/* Compute the gradients from that of the result, ``g``, which is converted on its way. That of x
   lacks what the statistics of ``before`` contribute: slopes and constants tell. */
int useg_convolve_backward(const convolution *s, const norm *before, const conversion *of_g,
                           const bf16 *x, const float *weight, const bf16 *g, bf16 *gx,
                           float *weight_gradient, float *slopes, float *constants);
int useg_upsample_backward(const upsampling *s, const norm *before, const conversion *of_g,
                           const bf16 *x, const bf16 *skip, const float *weight, const bf16 *g,
                           bf16 *gx, bf16 *skip_gradient, float *weight_gradient, float *slopes,
                           float *constants);

#endif
