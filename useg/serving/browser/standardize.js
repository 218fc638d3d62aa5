// Gives an image the same brightness and contrast as all others, as `standardize` in Python does.

const MEAN = 120;
const DEVIATION = 56;
// A smaller deviation is taken for this, so that the noise of an empty image is not enlarged more.
const MIN_DEVIATION = 8;

/** Changes the bytes of all bands `planes` alike, so that colours keep their relations. */
export function standardize(planes) {
  let numBytes = 0;
  let sum = 0;
  let squares = 0;
  for (const plane of planes) {
    numBytes += plane.length;
    for (const value of plane) {
      sum += value;
      squares += value * value;
    }
  }
  const mean = sum / numBytes;
  const variance = Math.max(0, squares / numBytes - mean * mean);
  const gain = DEVIATION / Math.max(MIN_DEVIATION, Math.sqrt(variance));
  const table = Uint8ClampedArray.from({ length: 256 }, (_, value) =>
    Math.floor((value - mean) * gain + (MEAN + 0.5)),
  );
  for (const plane of planes) {
    for (let k = 0; k < plane.length; k++) plane[k] = table[plane[k]];
  }
}
