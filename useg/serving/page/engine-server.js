// Predicts on the server: the engine of the page that `useg serve` shows.
//
// main.js imports an engine as "./engine.js":
//   connect({askToken, progress}) -> engine
//   engine.model() -> {name, classes: [{id, name, color: "#rrggbb"}], ...}
//   engine.predict(Blob | ImageBitmap, signal) -> {width, height, ids, confidence}
//     ids and confidence (0 to 255) are Uint8Arrays with one value per pixel.
//   engine.objects(Blob | ImageBitmap) -> {width, height, kept_apart, objects: [{id, class, pixels,
//     center, bbox, confidence, at_edge, segmentation}, ...]}; only engines on a server have it.
//   engine.predictFrame(ImageBitmap) -> the same, at the working size of the model.
//     It is fast enough for live video.
// Every Error that an engine throws has a message for the user.

export async function connect({ askToken }) {
  let token = sessionStorage.getItem("token") ?? "";

  async function request(path, options = {}) {
    for (;;) {
      const headers = token ? { authorization: `Bearer ${token}` } : {};
      const response = await fetch(path, { ...options, headers }).catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Error("The server does not respond. Check that it is still running.");
      });
      if (response.ok) return response;
      if (response.status !== 401) throw new Error(await errorMessage(response));
      token = await askToken();
      sessionStorage.setItem("token", token);
    }
  }

  async function predict(body, signal) {
    const response = await request("predict?format=planes", { method: "POST", body, signal });
    const [width, height] = ["x-width", "x-height"].map((key) => Number(response.headers.get(key)));
    const planes = new Uint8Array(await response.arrayBuffer());
    const numPixels = width * height;
    return {
      width,
      height,
      ids: planes.subarray(0, numPixels),
      confidence: planes.subarray(numPixels),
    };
  }

  const model = await (await request("model")).json();
  return {
    model: () => model,
    predict: async (image, signal) =>
      predict(image instanceof ImageBitmap ? await encode(image, 1, "image/png") : image, signal),
    async objects(image) {
      const body = image instanceof ImageBitmap ? await encode(image, 1, "image/png") : image;
      return (await request("predict?format=objects", { method: "POST", body })).json();
    },
    async predictFrame(frame) {
      const { frame: size, scale } = model.working;
      const numPixels = frame.width * frame.height;
      const factor = size ? Math.sqrt((size[0] * size[1]) / numPixels) : scale;
      return predict(await encode(frame, Math.min(factor, 1), "image/jpeg"));
    },
  };
}

/** Returns the error that the server sent, as a sentence. */
async function errorMessage(response) {
  const content = await response.json().catch(() => ({}));
  const text = content.error ?? response.statusText;
  return text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
}

/** Scales a bitmap by `factor` and encodes it as an image file. */
function encode(bitmap, factor, type) {
  const [width, height] = [bitmap.width, bitmap.height].map((length) =>
    Math.max(1, Math.round(length * factor)),
  );
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type, quality: 0.92 });
}
