// Requests to the labelling server. Each error has a message for the user and a status code.

let session = "";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    // 0: no response; 409: the mask has changed; 423: another browser is editing.
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { "x-session": session };
  const response = await fetch(path, { ...options, headers }).catch(() => {
    throw new ServerError("The server does not respond. Check that useg label is running.", 0);
  });
  if (response.ok) return response;
  const content = await response.json().catch(() => ({}));
  const text = content.error ?? response.statusText;
  const sentence = text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
  throw new ServerError(sentence, response.status);
}

const number = (response, name) => Number(response.headers.get(name));
const bytes = async (response) => new Uint8Array(await response.arrayBuffer());
const post = (path, content) => {
  const body = content === undefined ? undefined : JSON.stringify(content);
  return request(path, { method: "POST", body });
};

/** Joins the session. Returns whether this browser may edit. */
export async function join(take = false) {
  const answer = await (await post(`session?take=${take}`)).json();
  session = answer.session;
  return answer.editor;
}

export const readFolder = async () => (await request("folder")).json();
export const readState = async () => (await request("state")).json();
export const saveClasses = async (classes) => (await post("classes", { classes })).json();
export const setDone = async (k, done) => (await post(`images/${k}/done?done=${done}`)).json();
export const trainRound = () => post("round");
export const train = (minutes) => post(`train?minutes=${minutes}`);
export const stopTraining = () => post("train/stop");

/** Returns an image as a Blob that the browser can decode. */
export const readImage = async (k) => (await request(`images/${k}`)).blob();

export async function readMask(k) {
  const response = await request(`images/${k}/mask`);
  return { ids: await bytes(response), revision: response.headers.get("x-revision") };
}

/** Saves a rectangle of a mask. Returns the new revision and the state of the image. */
export async function paintMask(k, { x, y, width, height }, body, revision) {
  const query = new URLSearchParams({ x, y, width, height, revision });
  return (await request(`images/${k}/mask?${query}`, { method: "PATCH", body })).json();
}

/** Returns {width, height, ids, confidence, unsure, round}, or null without a model. */
export async function readSuggestion(k) {
  const response = await request(`images/${k}/suggestion`);
  if (response.status === 204) return null;
  const [width, height] = [number(response, "x-width"), number(response, "x-height")];
  const [planes, size] = [await bytes(response), width * height];
  const [ids, confidence, unsure] = [0, 1, 2].map((p) => planes.subarray(p * size, (p + 1) * size));
  return { width, height, ids, confidence, unsure, round: number(response, "x-round") };
}

/** Returns the region that clicks select: {x, y, width, height, inside}. */
export async function findRegion(k, wanted) {
  const response = await post(`images/${k}/region`, wanted);
  const [x, y, width, height] = ["x-x", "x-y", "x-width", "x-height"].map((name) =>
    number(response, name),
  );
  return { x, y, width, height, inside: await bytes(response) };
}
