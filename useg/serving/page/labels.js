// Label maps: count their pixels, choose their colours, paint them on a canvas.

// Brightest channel of a class colour that counts as black. Python's overlays use the same.
const BLACKEST = 24;

/** Returns the number of pixels of each class. */
export function countPixels(ids, numClasses) {
  const counts = new Array(256).fill(0);
  for (let k = 0; k < ids.length; k++) counts[ids[k]]++;
  return counts.slice(0, numClasses);
}

/** Converts "#rrggbb" to [red, green, blue]. */
export function toRgb(color) {
  return [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
}

export function isBlack(color) {
  return Math.max(...toRgb(color)) <= BLACKEST;
}

/**
 * Returns two look-up tables from class id to canvas pixel. Hidden classes are transparent.
 *
 * `exact` holds the class colours. `overlay` also leaves black classes transparent: black over an
 * image only darkens it, and then a dark grey class looks the same.
 */
export function colorTables(classes, visible) {
  const [exact, overlay] = [new Uint32Array(256), new Uint32Array(256)];
  for (const { id, color } of classes) {
    if (!visible.has(id)) continue;
    const pixel = new Uint32Array(Uint8Array.from([...toRgb(color), 255]).buffer)[0];
    exact[id] = pixel;
    if (!isBlack(color)) overlay[id] = pixel;
  }
  return { exact, overlay };
}

/** Paints a label map on a canvas and gives the canvas its size. */
export function paint(canvas, { width, height, ids }, table) {
  resizeCanvas(canvas, width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let k = 0; k < ids.length; k++) pixels[k] = table[ids[k]];
  context.putImageData(image, 0, 0);
}

/** Resizes a canvas. A canvas of the right size keeps its content. */
export function resizeCanvas(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

/** Formats a share (0 to 1) in percent. */
export function percent(share) {
  return share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}
