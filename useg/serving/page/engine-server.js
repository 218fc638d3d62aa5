// The engine of the served page: the server predicts.
//
// An engine is what main.js imports as "./engine.js":
//   connect({askToken, progress}) -> engine
//   engine.model() -> {name, classes: [{id, name, color: "#rrggbb"}], ...}
//   engine.predict(Blob | ImageBitmap, signal) -> {width, height, ids: Uint8Array, confidence: Uint8Array (0 to 255)}
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

  const model = await (await ask("model")).json();
  return {
    model: () => model,
    async predict(picture, signal) {
      const body = picture instanceof ImageBitmap ? await encoded(picture) : picture;
      const answer = await ask("predict?format=planes", { method: "POST", body, signal });
      const [width, height] = [Number(answer.headers.get("x-width")), Number(answer.headers.get("x-height"))];
      const planes = new Uint8Array(await answer.arrayBuffer());
      return { width, height, ids: planes.subarray(0, width * height), confidence: planes.subarray(width * height) };
    },
  };
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
}

async function encoded(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}
