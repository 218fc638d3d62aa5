// Serves the site's files from a cache, with the headers with which browsers allow threads.

// The export writes the digest of the site's files here, so that a changed site is installed anew.
const VERSION = "of this site's files";
// The export writes the names of the small files here. The model and its runtime are cached at
// their first request.
const FILES = [];
const HEADERS = {
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-embedder-policy": "require-corp",
  "cross-origin-resource-policy": "same-origin",
};
// Sites on one host share its caches, so the address of a site is part of the cache's name.
const SITE = registration.scope;
const CACHE = `${SITE} ${VERSION}`;

addEventListener("install", (event) => {
  skipWaiting();
  const requests = FILES.map((file) => new Request(file, { cache: "no-cache" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)));
});

addEventListener("activate", (event) => event.waitUntil(activate()));

addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(SITE)) event.respondWith(respond(event));
});

/** Deletes the caches of older versions and takes over the open pages. */
async function activate() {
  for (const name of await caches.keys()) {
    if (name.startsWith(`${SITE} `) && name !== CACHE) await caches.delete(name);
  }
  await clients.claim();
}

async function respond(event) {
  const cache = await caches.open(CACHE);
  const cached = await cache.match(event.request, { ignoreSearch: true });
  if (cached) return withHeaders(cached);
  const response = await fetch(event.request.url, { cache: "no-cache" });
  if (response.ok) {
    // If the cache is full, the file is fetched again next time.
    event.waitUntil(cache.put(event.request.url, response.clone()).catch(() => {}));
  }
  return withHeaders(response);
}

function withHeaders({ body, status, statusText, headers }) {
  const allHeaders = new Headers(headers);
  for (const [name, value] of Object.entries(HEADERS)) allHeaders.set(name, value);
  return new Response(body, { status, statusText, headers: allHeaders });
}
