// A picture -> its label map, away from the page's own thread so that the page never stops. Pictures do not leave the browser.

import { read } from "./answers.js";
import { start } from "./network.js";
import { resize } from "./resize.js";
import { cover, cut, paste } from "./tiles.js";

const [WHOLE_PIXELS, TILE] = [600_000, 512]; // above so many pixels a picture is predicted in windows; the answer is the same
const MOST_NUMBERS = 2 ** 28; // logits of one picture that are kept: 1 GB
const BANDS = 3;

let newest = 0;
const ready = load();
ready.catch(() => {}); // it is told to whoever asks

addEventListener("message", async ({ data: { id, picture } }) => {
  newest = id;
  try {
    const { model, network } = await ready;
    const answer = picture ? await predict(picture, model, network, () => newest === id) : { ...model, runtime: network.name };
    postMessage({ id, answer }, picture ? [answer.ids.buffer, answer.confidence.buffer] : []);
  } catch (problem) {
    postMessage({ id, error: problem.message });
  }
});

async function load() {
  const model = await (await file("model.json")).json();
  const [content, probe] = [await loaded(model.file, model.bytes), new Uint8Array(await (await file(model.probe.file)).arrayBuffer())];
  postMessage({ said: "Starting the model" });
  const { height, width } = model.probe;
  const pixels = probe.subarray(0, model.channels * height * width);
  return { model, network: await start(content, model.channels, { pixels, labels: probe.subarray(pixels.length), height, width }) };
}

async function file(name) {
  const answer = await fetch(name).catch(() => null);
  if (!answer?.ok) throw new Error(`The file ${name} could not be loaded; reload the page when there is a network.`);
  return answer;
}

async function loaded(name, size) {
  const content = new Uint8Array(size);
  let [at, told] = [0, -1];
  for await (const chunk of parts((await file(name)).body)) {
    content.set(chunk, at);
    at += chunk.length;
    const share = Math.floor((100 * at) / size);
    if (share > told) postMessage({ said: `Loading the model, ${(told = share)} % of ${(size / 1e6).toFixed(1)} MB` });
  }
  if (at !== size) throw new Error("The model was cut off while it was loaded; reload the page.");
  return content;
}

async function* parts(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function predict(picture, model, network, wanted) {
  const { planes, width, height } = await decoded(picture, model.channels);
  const [newWidth, newHeight] = workingSize(width, height, model.working);
  const numClasses = model.classes.length;
  if (numClasses * newWidth * newHeight > MOST_NUMBERS) {
    const most = Math.floor(((MOST_NUMBERS / numClasses) * width * height) / (newWidth * newHeight) / 1e6);
    throw new Error(`This picture has ${Math.ceil((width * height) / 1e6)} megapixels; a browser has room for ${most} with this model.`);
  }
  const small = planes.map((plane) => resize(plane, width, height, newWidth, newHeight));
  const { size, rows, columns } = cover(newHeight, newWidth, model, newWidth * newHeight > WHOLE_PIXELS ? TILE : 0);
  const logits = new Float32Array(numClasses * newWidth * newHeight);
  const kept = size.map((length) => length - 2 * model.margin);
  for (const row of rows) {
    for (const column of columns) {
      const x = cut(small, newWidth, newHeight, row.start - model.margin, column.start - model.margin, size);
      paste(logits, newWidth, newHeight, await network.run(x, ...size), kept, row, column);
      await new Promise((resolve) => setTimeout(resolve)); // lets a newer picture be heard of
      if (!wanted()) throw new Error("A newer picture overtook this one.");
    }
  }
  return read(logits, numClasses, newWidth, newHeight, width, height, model.temperature);
}

/** Returns the [width, height] at which the model looks at a picture: the same rule as in Python (WorkingSize in data/cache.py). */
function workingSize(width, height, { frame, scale }) {
  const factor = frame ? Math.sqrt((frame[0] * frame[1]) / (width * height)) : scale;
  return [width, height].map((length) => Math.max(1, toEven(length * factor)));
}

function toEven(value) {
  const whole = Math.round(value);
  return value % 1 === 0.5 && whole % 2 ? whole - 1 : whole;
}

/** Reads the pixels as they are in the file, without a colour profile's corrections: the model has learned from such. */
async function decoded(picture, channels) {
  const bitmap =
    picture instanceof ImageBitmap
      ? picture
      : await createImageBitmap(picture, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
          throw new Error("This browser cannot read this file as a picture; give a PNG, JPEG or WebP.");
        });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  const planes = Array.from({ length: BANDS }, () => new Uint8Array(width * height));
  for (let k = 0; k < width * height; k++) for (let band = 0; band < BANDS; band++) planes[band][k] = pixels[4 * k + band];
  if (channels === BANDS) return { planes, width, height };
  if (!planes[0].every((value, k) => value === planes[1][k] && value === planes[2][k])) throw new Error("This model takes grey pictures; this one has colours.");
  return { planes: planes.slice(0, 1), width, height };
}
