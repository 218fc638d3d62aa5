// Logits at the model's working size -> label map and confidence at the picture's own size, row by row: the enlarged logits of a large
// picture would not fit into memory.

const STEPS = 512;
const SMALLER = Float32Array.from({ length: 16 * STEPS }, (_, k) => Math.exp(-k / STEPS)); // a camera has no time for a million exponentials

/**
 * Enlarges logits (numClasses planes of `width` x `height` numbers) bilinearly and returns, of each pixel, the class of the highest and its
 * probability, 0 to 255, at the model's temperature.
 */
export function read(logits, numClasses, width, height, newWidth, newHeight, temperature) {
  const [ids, confidence] = [new Uint8Array(newWidth * newHeight), new Uint8Array(newWidth * newHeight)];
  const [columns, rows] = [between(width, newWidth), between(height, newHeight)];
  const values = new Float32Array(numClasses * newWidth);
  const steps = STEPS / temperature;
  const wide = new Map(); // row -> its logits, enlarged across

  function across(row) {
    if (!wide.has(row)) {
      for (const other of wide.keys()) if (other < row - 1) wide.delete(other);
      wide.set(row, enlarged(logits, numClasses, width, height, row, columns));
    }
    return wide.get(row);
  }

  const [best, total] = [new Float32Array(newWidth), new Float32Array(newWidth)];
  for (let y = 0; y < newHeight; y++) {
    const [above, below, part] = [across(rows.first[y]), across(rows.second[y]), rows.part[y]];
    const row = ids.subarray(y * newWidth, (y + 1) * newWidth);
    for (let k = 0; k < values.length; k++) values[k] = above[k] + part * (below[k] - above[k]);
    best.set(values.subarray(0, newWidth));
    for (let k = 1, at = newWidth; k < numClasses; k++) {
      for (let x = 0; x < newWidth; x++, at++) if (values[at] > best[x]) [best[x], row[x]] = [values[at], k];
    }
    total.fill(0);
    for (let k = 0, at = 0; k < numClasses; k++) {
      for (let x = 0; x < newWidth; x++, at++) total[x] += SMALLER[Math.min(SMALLER.length - 1, (best[x] - values[at]) * steps + 0.5) | 0];
    }
    for (let x = 0; x < newWidth; x++) confidence[y * newWidth + x] = Math.round(255 / total[x]);
  }
  return { width: newWidth, height: newHeight, ids, confidence };
}

function enlarged(logits, numClasses, width, height, row, { first, second, part }) {
  const wide = new Float32Array(numClasses * part.length);
  for (let k = 0, at = 0; k < numClasses; k++) {
    const from = (k * height + row) * width;
    for (let x = 0; x < part.length; x++) {
      const left = logits[from + first[x]];
      wide[at++] = left + part[x] * (logits[from + second[x]] - left);
    }
  }
  return wide;
}

/** Returns of each new pixel the two old ones that it lies between, and how far it is towards the second (pixels are areas, not points). */
function between(length, newLength) {
  const places = Float64Array.from({ length: newLength }, (_, k) => Math.max(0, ((k + 0.5) * length) / newLength - 0.5));
  const first = Int32Array.from(places, (place) => Math.min(Math.floor(place), length - 1));
  return {
    first,
    second: first.map((place) => Math.min(place + 1, length - 1)),
    part: places.map((place, k) => place - first[k]),
  };
}
