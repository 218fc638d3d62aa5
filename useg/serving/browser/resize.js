// A plane of bytes -> the same at another size, to the bit as Pillow's bilinear filter makes it, which averages over the source area when
// shrinking: the model has learned from pictures resized so, and a browser's own filter is another one.

const BITS = 22; // after the binary point of a weight

/** Returns `plane`, `width` x `height` bytes row by row, at another size. */
export function resize(plane, width, height, newWidth, newHeight) {
  const wide = newWidth === width ? plane : across(plane, width, height, newWidth);
  return newHeight === height ? wide : down(wide, newWidth, height, newHeight);
}

function across(plane, width, height, newWidth) {
  const answer = new Uint8Array(newWidth * height);
  filters(width, newWidth).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      let sum = 1 << (BITS - 1);
      for (let k = 0; k < weights.length; k++) sum += weights[k] * plane[y * width + first + k];
      answer[y * newWidth + x] = sum >> BITS;
    }
  });
  return answer;
}

function down(plane, width, height, newHeight) {
  const answer = new Uint8Array(width * newHeight);
  const sums = new Int32Array(width);
  filters(height, newHeight).forEach(({ first, weights }, y) => {
    sums.fill(1 << (BITS - 1));
    for (let k = 0; k < weights.length; k++) {
      const row = (first + k) * width;
      for (let x = 0; x < width; x++) sums[x] += weights[k] * plane[row + x];
    }
    for (let x = 0; x < width; x++) answer[y * width + x] = sums[x] >> BITS;
  });
  return answer;
}

/** Returns of each new pixel the first old one that counts and the weights from there on: a triangle about its centre. */
function filters(length, newLength) {
  const scale = length / newLength;
  const reach = Math.max(scale, 1);
  return Array.from({ length: newLength }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => Math.max(0, 1 - Math.abs((first + k - centre + 0.5) / reach)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: Int32Array.from(weights, (weight) => Math.trunc((weight / total) * (1 << BITS) + 0.5)) };
  });
}
