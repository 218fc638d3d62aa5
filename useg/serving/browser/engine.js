// Predicts in the browser: the engine of an exported site. A worker runs the model.
//
// engine-server.js describes what an engine offers.

export async function connect({ progress }) {
  await startServiceWorker();
  const worker = new Worker("worker.js", { type: "module" });
  // Request id -> {resolve, reject}.
  const pending = new Map();
  let lastId = 0;

  function request(content, signal) {
    const id = ++lastId;
    return new Promise((resolve, reject) => {
      pending.set(id, { resolve, reject });
      signal?.addEventListener("abort", () => reject(signal.reason));
      worker.postMessage({ id, ...content });
    }).finally(() => pending.delete(id));
  }

  worker.addEventListener("message", ({ data: { id, result, error, status } }) => {
    if (status) progress(status);
    else if (error) pending.get(id)?.reject(new Error(error));
    else pending.get(id)?.resolve(result);
  });
  worker.addEventListener("error", (event) => {
    const reason = event.message ?? "its files are missing";
    for (const { reject } of pending.values()) {
      reject(new Error(`The model does not start (${reason}).`));
    }
  });

  const model = await request({});
  return {
    model: () => model,
    predict: (image, signal) => request({ image }, signal),
    predictFrame: (frame) => request({ frame }),
  };
}

/**
 * Lets the service worker answer this page's requests. It keeps all files for use offline, and it
 * sends the headers with which browsers allow threads. Headers take effect when a page loads, so
 * the first visit reloads the page once. Without a service worker (no HTTPS) the page works too.
 */
async function startServiceWorker() {
  const container = navigator.serviceWorker;
  if (!container) return;
  try {
    await container.register("service-worker.js");
    await container.ready;
    if (!container.controller) {
      await new Promise((resolve) =>
        container.addEventListener("controllerchange", resolve, { once: true }),
      );
    }
  } catch {
    // Private windows, for example, have no service workers.
    return;
  }
  if (crossOriginIsolated || sessionStorage.getItem("reloaded")) return;
  sessionStorage.setItem("reloaded", "yes");
  location.reload();
  // Wait until the page is gone.
  await new Promise(() => {});
}
