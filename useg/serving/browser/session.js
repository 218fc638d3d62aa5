// ONNX model -> inference session, on WebGPU if that computes correctly, else on WebAssembly.

// Share of the probe's labels that WebGPU must predict as recorded.
const MIN_AGREEMENT = 0.999;
const MAX_THREADS = 8;

/**
 * Starts a model. Returns {name, run(pixels, height, width) -> logits of the classes}.
 *
 * `content` is the ONNX file; `model` has `channels` and `classes`. `probe` is {pixels, labels,
 * height, width}: an image and its labels.
 */
export async function startSession(content, model, probe) {
  if (await hasGpu()) {
    try {
      const session = await createSession("webgpu", content, model);
      const logits = await session.run(probe.pixels, probe.height, probe.width);
      const labels = argmax(logits, probe.labels.length);
      const numEqual = labels.reduce((count, id, k) => count + (id === probe.labels[k]), 0);
      if (numEqual >= MIN_AGREEMENT * labels.length) return session;
    } catch {
      // The graphics driver fails. WebAssembly always works.
    }
  }
  return createSession("wasm", content, model);
}

async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  // A fallback adapter computes on the CPU, 30 times more slowly than WebAssembly.
  return adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

async function createSession(provider, content, { channels, classes }) {
  const ort = await import(`./runtime/ort.${provider}.min.mjs`);
  const numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = new URL("runtime/", self.location.href).href;
  ort.env.wasm.numThreads = numThreads;
  const session = await ort.InferenceSession.create(content, { executionProviders: [provider] });
  const [input, output] = [session.inputNames[0], session.outputNames[0]];
  const threads = `${numThreads} ${numThreads > 1 ? "threads" : "thread"}`;
  return {
    name: provider === "webgpu" ? "WebGPU" : `WebAssembly, ${threads}`,
    async run(pixels, height, width) {
      const x = new ort.Tensor("uint8", pixels, [1, channels, height, width]);
      const tensor = (await session.run({ [input]: x }))[output];
      const [, , rows, columns] = tensor.dims;
      const logits = await tensor.getData();
      tensor.dispose();
      // What tells objects apart follows the classes.
      return logits.subarray(0, classes.length * rows * columns);
    },
  };
}

/** Returns the class with the highest logit for each of `numPixels` pixels. */
function argmax(logits, numPixels) {
  return Uint8Array.from({ length: numPixels }, (_, pixel) => {
    let id = 0;
    for (let k = 1; k * numPixels < logits.length; k++) {
      if (logits[k * numPixels + pixel] > logits[id * numPixels + pixel]) id = k;
    }
    return id;
  });
}
