// Image file or bitmap -> its bands as planes of bytes.

const RGB = 3;

/**
 * Decodes an image without colour management, as the training images were decoded. `size` is
 * [width, height]: if it is given, the browser resizes the image with a filter of its own.
 */
export async function decodeImage(image, channels, size) {
  const bitmap = image instanceof ImageBitmap ? image : await toBitmap(image);
  const [width, height] = size ?? [bitmap.width, bitmap.height];
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "medium";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  const planes = Array.from({ length: RGB }, () => new Uint8Array(width * height));
  for (let k = 0; k < width * height; k++) {
    for (let band = 0; band < RGB; band++) planes[band][k] = pixels[4 * k + band];
  }
  if (channels === RGB) return { planes, width, height };
  if (!isGrey(planes)) throw new Error("This model needs greyscale images. This one has colours.");
  return { planes: planes.slice(0, 1), width, height };
}

function toBitmap(file) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  return createImageBitmap(file, options).catch(() => {
    throw new Error("This browser cannot read this file as an image. Use PNG, JPEG or WebP.");
  });
}

function isGrey([red, green, blue]) {
  return red.every((value, k) => value === green[k] && value === blue[k]);
}
