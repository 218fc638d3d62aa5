// A picture -> its bands, each a plane of bytes.

const BANDS = 3;

/**
 * Reads the pixels as they are in the file, without a colour profile's corrections: the model has learned from such. With `size`, [width, height],
 * the browser shrinks them first, by whatever filter it has.
 */
export async function decoded(picture, channels, size) {
  const bitmap =
    picture instanceof ImageBitmap
      ? picture
      : await createImageBitmap(picture, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
          throw new Error("This browser cannot read this file as a picture; give a PNG, JPEG or WebP.");
        });
  const [width, height] = size ?? [bitmap.width, bitmap.height];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "medium";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  const planes = Array.from({ length: BANDS }, () => new Uint8Array(width * height));
  for (let k = 0; k < width * height; k++) for (let band = 0; band < BANDS; band++) planes[band][k] = pixels[4 * k + band];
  if (channels === BANDS) return { planes, width, height };
  if (!planes[0].every((value, k) => value === planes[1][k] && value === planes[2][k])) throw new Error("This model takes grey pictures; this one has colours.");
  return { planes: planes.slice(0, 1), width, height };
}
