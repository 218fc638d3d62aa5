// A request of the page -> the file as kept at the first visit, with the headers that allow threads.

const VERSION = "of this site's files"; // the export writes their digest here, so that a changed site is a changed service worker
const FILES = []; // and here the small ones; the model and what runs it are kept when they are first asked for
const HEADERS = {
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-embedder-policy": "require-corp",
  "cross-origin-resource-policy": "same-origin",
};
// Sites beside each other on one host share its caches: each names its own by its address.
const [OURS, KEPT] = [registration.scope, `${registration.scope} ${VERSION}`];

addEventListener("install", (event) => {
  skipWaiting();
  event.waitUntil(caches.open(KEPT).then((kept) => kept.addAll(FILES.map((file) => new Request(file, { cache: "no-cache" })))));
});

addEventListener("activate", (event) => {
  event.waitUntil(
    (async () => {
      for (const name of await caches.keys()) if (name.startsWith(`${OURS} `) && name !== KEPT) await caches.delete(name);
      await clients.claim();
    })(),
  );
});

addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(registration.scope)) event.respondWith(answer(event));
});

async function answer(event) {
  const kept = await caches.open(KEPT);
  const found = await kept.match(event.request, { ignoreSearch: true });
  if (found) return withHeaders(found);
  const fresh = await fetch(event.request.url, { cache: "no-cache" });
  if (fresh.ok) event.waitUntil(kept.put(event.request.url, fresh.clone()).catch(() => {})); // no room: it is fetched again next time
  return withHeaders(fresh);
}

function withHeaders({ body, status, statusText, headers }) {
  const added = new Headers(headers);
  for (const [name, value] of Object.entries(HEADERS)) added.set(name, value);
  return new Response(body, { status, statusText, headers: added });
}
