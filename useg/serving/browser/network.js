// A model file -> a function from a window's raw pixels to its logits, computed by the fastest means that this browser has and that answers right.

const AGREEMENT = 0.999; // of the probe's labels: what the graphics processor must reach to be trusted with the others
const MOST_THREADS = 8;

/** Returns {run(pixels, height, width) -> logits, name}. `content` is the ONNX file, `probe` {pixels, labels, height, width}. */
export async function start(content, channels, probe) {
  if (await hasGraphicsProcessor()) {
    try {
      const network = await open("webgpu", content, channels);
      const labels = highest(await network.run(probe.pixels, probe.height, probe.width), probe.labels.length);
      const same = labels.reduce((count, id, k) => count + (id === probe.labels[k]), 0);
      if (same >= AGREEMENT * labels.length) return network;
    } catch {} // a driver's fault: there is another way
  }
  return open("wasm", content, channels);
}

async function hasGraphicsProcessor() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter); // that is one in software: 30 times slower than WebAssembly
}

async function open(name, content, channels) {
  const ort = await import(`./runtime/ort.${name}.min.mjs`);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = new URL("runtime/", self.location.href).href;
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  const session = await ort.InferenceSession.create(content, { executionProviders: [name] });
  const [input, output] = [session.inputNames[0], session.outputNames[0]];
  return {
    name: name === "webgpu" ? "WebGPU" : `WebAssembly, ${ort.env.wasm.numThreads} ${ort.env.wasm.numThreads > 1 ? "threads" : "thread"}`,
    async run(pixels, height, width) {
      const x = new ort.Tensor("uint8", pixels, [1, channels, height, width]);
      const answer = (await session.run({ [input]: x }))[output];
      const logits = await answer.getData();
      answer.dispose();
      return logits;
    },
  };
}

function highest(logits, count) {
  return Uint8Array.from({ length: count }, (_, at) => {
    let id = 0;
    for (let k = 1; k * count < logits.length; k++) if (logits[k * count + at] > logits[id * count + at]) id = k;
    return id;
  });
}
