// Splits an image into equal windows whose results together equal that of the whole image.
//
// The rule is the same as in Python: windows start at multiples of the network's stride, and only
// pixels that no artificial edge can influence are kept.

/** Returns the smallest input size of the network that is at least `size`. */
export function validSize(size, { smallest, stride }) {
  return smallest + Math.max(0, Math.ceil((size - smallest) / stride)) * stride;
}

/**
 * Covers `height` x `width` pixels by windows of at most `tile` pixels (0: one window).
 *
 * Returns {size: [height, width], rows, columns}. Rows and columns are lists of spans.
 */
export function cover(height, width, network, tile) {
  const size = [height, width].map((length) => {
    const whole = validSize(length + 2 * network.margin, network);
    return tile ? Math.min(windowSize(tile, network), whole) : whole;
  });
  return {
    size,
    rows: spans(height, size[0], network),
    columns: spans(width, size[1], network),
  };
}

/** Returns how many pixels at the edge of a window are not kept. */
function halo({ margin, stride, context }) {
  return margin ? 0 : Math.ceil(context / stride) * stride;
}

function windowSize(tile, network) {
  const border = network.margin + halo(network);
  const smallest = validSize(2 * border + network.stride, network);
  const rest = (tile - smallest) % network.stride;
  return Math.max(smallest, tile - rest);
}

/**
 * Covers `length` output pixels by windows of `window` input pixels.
 *
 * Returns a list of {start, first, last}: a window starts at `start`, and its output counts for the
 * pixels from `first` to before `last`.
 */
export function spans(length, window, network) {
  const { margin, stride } = network;
  if (margin) {
    const output = window - 2 * margin;
    if (length <= output) return [{ start: 0, first: 0, last: length }];
    const step = Math.floor(output / stride) * stride;
    const count = 1 + Math.ceil((length - output) / step);
    return Array.from({ length: count }, (_, k) => {
      const last = k === count - 1 ? length : (k + 1) * step;
      return { start: k * step, first: k * step, last };
    });
  }
  const padded = validSize(length, network);
  if (window >= padded) return [{ start: 0, first: 0, last: length }];
  const step = window - 2 * halo(network);
  const count = 1 + Math.ceil((padded - window) / step);
  const starts = Array.from({ length: count }, (_, k) => Math.min(k * step, padded - window));
  const edges = [0, ...starts.slice(1).map((start) => start + halo(network)), length];
  return starts.map((start, k) => ({ start, first: edges[k], last: edges[k + 1] }));
}

/** Cuts a window out of planes of bytes. Outside the image, it contains the mirrored image. */
export function cut(planes, width, height, top, left, [rows, columns]) {
  const window = new Uint8Array(planes.length * rows * columns);
  const sources = Int32Array.from({ length: columns }, (_, x) => mirror(left + x, width));
  let at = 0;
  for (const plane of planes) {
    for (let y = 0; y < rows; y++) {
      const row = mirror(top + y, height) * width;
      for (let x = 0; x < columns; x++) window[at++] = plane[row + sources[x]];
    }
  }
  return window;
}

/** Copies the part of a window's logits that counts into the logits of the whole image. */
export function paste(logits, width, height, windowLogits, [rows, columns], row, column) {
  const numClasses = windowLogits.length / (rows * columns);
  const [left, right] = [column.first - column.start, column.last - column.start];
  for (let k = 0; k < numClasses; k++) {
    for (let y = row.first; y < row.last; y++) {
      const start = (k * rows + y - row.start) * columns;
      const part = windowLogits.subarray(start + left, start + right);
      logits.set(part, (k * height + y) * width + column.first);
    }
  }
}

function mirror(index, length) {
  const period = 2 * length;
  const folded = ((index % period) + period) % period;
  return Math.min(folded, period - 1 - folded);
}
