// Label map -> colours, counts: plain functions on arrays.

/** Returns how many pixels each class has. */
export function countPixels(ids, numClasses) {
  const counts = new Array(256).fill(0);
  for (let k = 0; k < ids.length; k++) counts[ids[k]]++;
  return counts.slice(0, numClasses);
}

/** Returns a look-up table from class id to a canvas pixel; classes that are not shown, and ids that are none, are transparent. */
export function colorTable(classes, shown) {
  const table = new Uint32Array(256);
  const bytes = new Uint8Array(table.buffer);
  for (const { id, color } of classes) {
    if (shown.has(id)) bytes.set([1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)).concat(255), 4 * id);
  }
  return table;
}

/** Paints a label map on a canvas of its size. */
export function paint(canvas, { width, height, ids }, table) {
  resizeCanvas(canvas, width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let k = 0; k < ids.length; k++) pixels[k] = table[ids[k]];
  context.putImageData(image, 0, 0);
}

/** Gives a canvas a size; one that has it keeps what is on it. */
export function resizeCanvas(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

/** Writes a share as people read it. */
export function percent(share) {
  return share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}
