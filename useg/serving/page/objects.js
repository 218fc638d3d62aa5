// The objects of an image: which one lies at a pixel, and its row in words.

import { percent } from "./labels.js";

/** Returns the number of the object of each pixel, row by row; 0 for none. */
export function numberPixels({ width, height, objects }) {
  const numbers = new Uint32Array(width * height);
  for (const { id, segmentation } of objects) {
    // Runs outside and inside of the object, down the columns.
    let start = 0;
    decodeRuns(segmentation.counts).forEach((length, k) => {
      for (let at = start; k % 2 && at < start + length; at++) {
        numbers[(at % height) * width + Math.floor(at / height)] = id;
      }
      start += length;
    });
  }
  return numbers;
}

/** Decodes COCO's compressed run lengths: five bits per character, the lowest first. */
export function decodeRuns(text) {
  const runs = [];
  for (let at = 0; at < text.length; ) {
    let [value, shift, bits] = [0, 0, 0];
    do {
      bits = text.charCodeAt(at++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** Describes an object in one line. */
export function describeObject(row) {
  const [x, y] = row.center.map(Math.round);
  const [, , width, height] = row.bbox;
  const edge = row.at_edge ? ", at the edge of the image" : "";
  return (
    `Object ${row.id}: ${row.class}, ${row.pixels} pixels, ${width} x ${height}, ` +
    `centre ${x}, ${y}, confidence ${percent(row.confidence)}${edge}`
  );
}
