// The engine of the served page: the server predicts.
//
// An engine is what main.js imports as "./engine.js":
//   connect({askToken, progress}) -> engine
//   engine.model() -> {name, classes: [{id, name, color: "#rrggbb"}], ...}
//   engine.predict(Blob | ImageBitmap, signal) -> {width, height, ids: Uint8Array, confidence: Uint8Array (0 to 255)}
//   engine.glance(ImageBitmap) -> the same at the smaller size at which the model looks: for pictures that move, as fast as can be
// What goes wrong is thrown as an Error whose message is a sentence for people.

export async function connect({ askToken }) {
  let token = sessionStorage.getItem("token") ?? "";

  async function ask(path, options = {}) {
    for (;;) {
      const headers = token ? { authorization: `Bearer ${token}` } : {};
      const answer = await fetch(path, { ...options, headers }).catch((error) => {
        throw error.name === "AbortError" ? error : new Error("The server does not answer; is it still running?");
      });
      if (answer.ok) return answer;
      if (answer.status !== 401) throw new Error(sentence((await answer.json().catch(() => ({}))).error ?? answer.statusText));
      token = await askToken();
      sessionStorage.setItem("token", token);
    }
  }

  async function predict(body, signal) {
    const answer = await ask("predict?format=planes", { method: "POST", body, signal });
    const [width, height] = [Number(answer.headers.get("x-width")), Number(answer.headers.get("x-height"))];
    const planes = new Uint8Array(await answer.arrayBuffer());
    return { width, height, ids: planes.subarray(0, width * height), confidence: planes.subarray(width * height) };
  }

  const model = await (await ask("model")).json();
  return {
    model: () => model,
    predict: async (picture, signal) => predict(picture instanceof ImageBitmap ? await encoded(picture, 1, "image/png") : picture, signal),
    async glance(frame) {
      const { frame: size, scale } = model.working;
      const factor = size ? Math.sqrt((size[0] * size[1]) / (frame.width * frame.height)) : scale;
      return predict(await encoded(frame, Math.min(factor, 1), "image/jpeg"));
    },
  };
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
}

function encoded(bitmap, factor, type) {
  const [width, height] = [bitmap.width, bitmap.height].map((length) => Math.max(1, Math.round(length * factor)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type, quality: 0.92 });
}
