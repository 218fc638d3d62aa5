// The engine of the exported page: the reader's own browser predicts, in a worker. What an engine is stands in the served page's engine.

export async function connect({ progress }) {
  await settle();
  const worker = new Worker("worker.js", { type: "module" });
  const waiting = new Map(); // question -> how to answer it
  let asked = 0;

  function ask(question, signal) {
    const id = ++asked;
    return new Promise((resolve, reject) => {
      waiting.set(id, { resolve, reject });
      signal?.addEventListener("abort", () => reject(signal.reason));
      worker.postMessage({ id, ...question });
    }).finally(() => waiting.delete(id));
  }

  worker.addEventListener("message", ({ data: { id, answer, error, said } }) => {
    if (said) progress(said);
    else if (error) waiting.get(id)?.reject(new Error(error));
    else waiting.get(id)?.resolve(answer);
  });
  worker.addEventListener("error", (event) => {
    for (const { reject } of waiting.values()) reject(new Error(`The model could not be started (${event.message ?? "its files are missing"}).`));
  });

  const model = await ask({});
  return { model: () => model, predict: (picture, signal) => ask({ picture }, signal), glance: (frame) => ask({ frame }) };
}

/**
 * Lets the service worker answer for this page from now on: it keeps all files for use without a network, and sends the headers with which
 * a browser allows threads. Those count from the page's start, so the first visit starts twice. Without one (no https) the page works, too.
 */
async function settle() {
  const guard = navigator.serviceWorker;
  if (!guard) return;
  try {
    await guard.register("service-worker.js");
    await guard.ready;
    if (!guard.controller) await new Promise((resolve) => guard.addEventListener("controllerchange", resolve, { once: true }));
  } catch {
    return; // private windows have none, say
  }
  if (crossOriginIsolated || sessionStorage.getItem("started twice")) return;
  sessionStorage.setItem("started twice", "yes");
  location.reload();
  await new Promise(() => {}); // until it has
}
