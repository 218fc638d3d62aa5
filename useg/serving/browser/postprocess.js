// Logits at the working size -> label map and confidence at the size of the image.
//
// It works row by row, because the enlarged logits of a large image do not fit into memory.

// exp(-k / STEPS) for every k that can occur. Live video has no time for a million calls of exp.
const STEPS = 512;
const EXP_TABLE = Float32Array.from({ length: 16 * STEPS }, (_, k) => Math.exp(-k / STEPS));

/**
 * Enlarges logits (numClasses planes, `width` x `height`) bilinearly. Returns the most probable
 * class of each pixel and its probability (0 to 255), which takes the temperature into account.
 */
export function toPrediction(logits, numClasses, width, height, newWidth, newHeight, temperature) {
  const ids = new Uint8Array(newWidth * newHeight);
  const confidence = new Uint8Array(newWidth * newHeight);
  const [columns, rows] = [interpolation(width, newWidth), interpolation(height, newHeight)];
  const values = new Float32Array(numClasses * newWidth);
  const [best, total] = [new Float32Array(newWidth), new Float32Array(newWidth)];
  const scale = STEPS / temperature;
  // Row of the logits -> its values, enlarged horizontally. It holds two rows.
  const wideRows = new Map();

  function wideRow(row) {
    if (!wideRows.has(row)) {
      for (const other of wideRows.keys()) if (other < row - 1) wideRows.delete(other);
      wideRows.set(row, widen(logits, numClasses, width, height, row, columns));
    }
    return wideRows.get(row);
  }

  for (let y = 0; y < newHeight; y++) {
    const [above, below] = [wideRow(rows.first[y]), wideRow(rows.second[y])];
    const weight = rows.weight[y];
    const rowIds = ids.subarray(y * newWidth, (y + 1) * newWidth);
    for (let k = 0; k < values.length; k++) {
      values[k] = above[k] + weight * (below[k] - above[k]);
    }
    best.set(values.subarray(0, newWidth));
    for (let k = 1, at = newWidth; k < numClasses; k++) {
      for (let x = 0; x < newWidth; x++, at++) {
        if (values[at] > best[x]) [best[x], rowIds[x]] = [values[at], k];
      }
    }
    total.fill(0);
    for (let k = 0, at = 0; k < numClasses; k++) {
      for (let x = 0; x < newWidth; x++, at++) {
        const step = (best[x] - values[at]) * scale + 0.5;
        total[x] += EXP_TABLE[Math.min(EXP_TABLE.length - 1, step) | 0];
      }
    }
    for (let x = 0; x < newWidth; x++) confidence[y * newWidth + x] = Math.round(255 / total[x]);
  }
  return { width: newWidth, height: newHeight, ids, confidence };
}

/** Enlarges one row of the logits of all classes horizontally. */
function widen(logits, numClasses, width, height, row, { first, second, weight }) {
  const wide = new Float32Array(numClasses * weight.length);
  for (let k = 0, at = 0; k < numClasses; k++) {
    const start = (k * height + row) * width;
    for (let x = 0; x < weight.length; x++) {
      const left = logits[start + first[x]];
      wide[at++] = left + weight[x] * (logits[start + second[x]] - left);
    }
  }
  return wide;
}

/**
 * Returns the two source pixels between which each new pixel lies, and the weight of the second.
 * Pixel centres are at 0.5, 1.5, ..., as with align_corners=False in PyTorch.
 */
function interpolation(length, newLength) {
  const places = Float64Array.from({ length: newLength }, (_, k) =>
    Math.max(0, ((k + 0.5) * length) / newLength - 0.5),
  );
  const first = Int32Array.from(places, (place) => Math.min(Math.floor(place), length - 1));
  return {
    first,
    second: first.map((place) => Math.min(place + 1, length - 1)),
    weight: places.map((place, k) => place - first[k]),
  };
}
