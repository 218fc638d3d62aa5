// A picture's size -> equal windows whose answers together are the whole picture's: the same rule as in Python (inference/tiles.py).
// Windows start at multiples of the network's stride, and of each only what no artificial edge has reached is kept.

/** Returns the smallest size of at least `size` pixels that the network takes. */
export function validSize(size, { smallest, stride }) {
  return smallest + Math.max(0, Math.ceil((size - smallest) / stride)) * stride;
}

/** Covers `height` x `width` pixels: {size: [height, width], rows, columns}, each of these a list of {start, first, last}. 0 as `tile` is one pass. */
export function cover(height, width, network, tile) {
  const size = [height, width].map((length) => {
    const whole = validSize(length + 2 * network.margin, network);
    return tile ? Math.min(windowSize(tile, network), whole) : whole;
  });
  return { size, rows: spans(height, size[0], network), columns: spans(width, size[1], network) };
}

function halo({ margin, stride, context }) {
  return margin ? 0 : Math.ceil(context / stride) * stride;
}

function windowSize(tile, network) {
  const smallest = validSize(2 * (network.margin + halo(network)) + network.stride, network);
  const rest = (tile - smallest) % network.stride;
  return Math.max(smallest, tile - rest);
}

/** Covers `length` output pixels by windows of `window` input pixels: where each starts, and which pixels it answers for. */
export function spans(length, window, network) {
  const { margin, stride } = network;
  if (margin) {
    const output = window - 2 * margin;
    if (length <= output) return [{ start: 0, first: 0, last: length }];
    const step = Math.floor(output / stride) * stride;
    const count = 1 + Math.ceil((length - output) / step);
    return Array.from({ length: count }, (_, k) => ({ start: k * step, first: k * step, last: k === count - 1 ? length : (k + 1) * step }));
  }
  const padded = validSize(length, network);
  if (window >= padded) return [{ start: 0, first: 0, last: length }];
  const step = window - 2 * halo(network);
  const count = 1 + Math.ceil((padded - window) / step);
  const starts = Array.from({ length: count }, (_, k) => Math.min(k * step, padded - window));
  const edges = [0, ...starts.slice(1).map((start) => start + halo(network)), length];
  return starts.map((start, k) => ({ start, first: edges[k], last: edges[k + 1] }));
}

/** Cuts a window out of planes (each `width` x `height` bytes): where it lies outside, the picture is mirrored at its edges. */
export function cut(planes, width, height, top, left, [rows, columns]) {
  const window = new Uint8Array(planes.length * rows * columns);
  const places = Int32Array.from({ length: columns }, (_, x) => mirrored(left + x, width));
  let at = 0;
  for (const plane of planes) {
    for (let y = 0; y < rows; y++) {
      const row = mirrored(top + y, height) * width;
      for (let x = 0; x < columns; x++) window[at++] = plane[row + places[x]];
    }
  }
  return window;
}

/** Puts the part of a window's logits that is kept into those of the whole picture. */
export function paste(logits, width, height, answer, [rows, columns], row, column) {
  const numClasses = answer.length / (rows * columns);
  for (let k = 0; k < numClasses; k++) {
    for (let y = row.first; y < row.last; y++) {
      const from = (k * rows + y - row.start) * columns;
      logits.set(answer.subarray(from + column.first - column.start, from + column.last - column.start), (k * height + y) * width + column.first);
    }
  }
}

function mirrored(index, length) {
  const folded = ((index % (2 * length)) + 2 * length) % (2 * length);
  return Math.min(folded, 2 * length - 1 - folded);
}
