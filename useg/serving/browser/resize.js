// Resizes a plane of bytes exactly as Pillow's bilinear filter does.
//
// Pillow's filter averages over the source area when it shrinks an image. Training resizes images
// with it, and the filters of browsers differ.

// Fractional bits of the fixed-point weights.
const BITS = 22;
const HALF = 1 << (BITS - 1);

/** Resizes `plane` (`width` x `height` bytes, row by row). */
export function resize(plane, width, height, newWidth, newHeight) {
  const wide = newWidth === width ? plane : resizeRows(plane, width, height, newWidth);
  return newHeight === height ? wide : resizeColumns(wide, newWidth, height, newHeight);
}

function resizeRows(plane, width, height, newWidth) {
  const result = new Uint8Array(newWidth * height);
  filters(width, newWidth).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      const start = y * width + first;
      let sum = HALF;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * plane[start + k];
      result[y * newWidth + x] = sum >> BITS;
    }
  });
  return result;
}

function resizeColumns(plane, width, height, newHeight) {
  const result = new Uint8Array(width * newHeight);
  const sums = new Int32Array(width);
  filters(height, newHeight).forEach(({ first, weights }, y) => {
    sums.fill(HALF);
    for (let k = 0; k < weights.length; k++) {
      const start = (first + k) * width;
      for (let x = 0; x < width; x++) sums[x] += weights[k] * plane[start + x];
    }
    for (let x = 0; x < width; x++) result[y * width + x] = sums[x] >> BITS;
  });
  return result;
}

/** Returns, for each new pixel, its first source pixel and the weights from there: a triangle. */
function filters(length, newLength) {
  const scale = length / newLength;
  const radius = Math.max(scale, 1);
  return Array.from({ length: newLength }, (_, k) => {
    const centre = (k + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - radius + 0.5));
    const last = Math.min(length, Math.trunc(centre + radius + 0.5));
    const weights = Array.from({ length: last - first }, (_, j) =>
      Math.max(0, 1 - Math.abs((first + j - centre + 0.5) / radius)),
    );
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const toFixed = (weight) => Math.trunc((weight / total) * (1 << BITS) + 0.5);
    return { first, weights: Int32Array.from(weights, toFixed) };
  });
}
