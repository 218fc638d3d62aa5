// The page: takes images and videos, asks the engine for label maps, and shows and saves them.

import { connect } from "./engine.js";
import { colorTables, countPixels } from "./labels.js";
import { createLegend, element, swatch } from "./legend.js";
import { describeObject, numberPixels } from "./objects.js";
import { createPlayer } from "./player.js";
import { palettePng } from "./png.js";
import { toGeojson } from "./polygons.js";
import { frames, openCamera, openVideo } from "./video.js";
import { createViewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const body = document.body;
const opacity = find("opacity");

const viewer = createViewer(announce, showObject);
const legend = createLegend(() => viewer.setColors(colors()));
const player = createPlayer();
let classes = [];
// The result on view: {name, prediction, counts}.
let current = null;
// The image file of `current`, and a promise of its objects once one was clicked.
let still = null;
let found = null;
// The image of `current` while a newer file is in progress. It comes back if that file fails.
let previousImage = null;
// Aborts the prediction in progress.
let controller = null;
// The open camera or video.
let source = null;

/** Tells screen readers. */
function announce(text) {
  find("status").textContent = text;
}

/** body.dataset.state: "empty", "busy" (no result yet), "live" (video plays) or "done". */
function setState(state) {
  body.dataset.state = state;
}

function showError(text) {
  find("error-text").textContent = text;
  find("error").hidden = !text;
}

const colors = () => colorTables(classes, legend.visible());

function openFile(file) {
  if (file.type.startsWith("video/")) openSource(() => openVideo(file), file.name);
  else predictFile(file);
}

/** Shows object and row at a pixel; the server finds the objects when they are first asked for. */
async function showObject(x, y) {
  const { objects } = await engine;
  if (!objects || !still) return;
  const [asked, line] = [still, find("object")];
  line.hidden = false;
  if (!found) line.textContent = "Finding the objects.";
  try {
    found ??= objects(asked).then((answer) => ({ ...answer, numbers: numberPixels(answer) }));
    const { numbers, width, objects: rows } = await found;
    if (asked !== still) return;
    const number = numbers[y * width + x];
    const row = rows[number - 1];
    viewer.outline(number, numbers, width);
    line.textContent = row ? describeObject(row) : `No object here, ${rows.length} in the image`;
    announce(line.textContent);
  } catch (error) {
    if (asked !== still) return;
    useStill(asked);
    showError(error.message);
  }
}

/** Sets the image file whose objects can be clicked; null for none. */
function useStill(file) {
  [still, found] = [file, null];
  find("object").hidden = true;
  viewer.outline(0);
}

/** Stops everything in progress. Returns the signal that stops what starts now. */
function begin() {
  closeSource();
  controller?.abort();
  controller = new AbortController();
  useStill(null);
  showError("");
  return controller.signal;
}

/** Shows an image and predicts its label map. A newer file replaces an older one. */
async function predictFile(file) {
  const signal = begin();
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (signal.aborted) return;
  keepImage();
  setState("busy");
  announce("Predicting.");
  if (bitmap) viewer.show(bitmap, bitmap.width, bitmap.height);
  try {
    const prediction = await (await engine).predict(file, signal);
    if (signal.aborted) return;
    // The browser cannot decode the file, a TIFF for example.
    if (!bitmap) viewer.show(null, prediction.width, prediction.height);
    showPrediction(file.name ?? "image", prediction);
    setState("done");
    useStill(file);
    const note = bitmap ? "" : " This browser cannot display the file, only its label map.";
    announce(summary() + note);
  } catch (error) {
    fail(error, file.name);
  }
}

/** Keeps the image on view until another one has a label map. */
function keepImage() {
  if (current) previousImage ??= viewer.copyImage();
}

/** Shows an error, and the last result if there is one. */
function fail(error, name) {
  if (error.name === "AbortError") return;
  closeSource();
  if (previousImage) {
    viewer.show(previousImage, previousImage.width, previousImage.height);
    viewer.setPrediction(current.prediction, colors(), classes);
    previousImage = null;
  }
  setState(current ? "done" : "empty");
  announce("");
  showError(name ? `${name}: ${error.message}` : error.message);
}

function showPrediction(name, prediction, moving) {
  const stem = name.replace(/\.[^.]*$/, "") || "image";
  current = { name: stem, prediction, counts: countPixels(prediction.ids, classes.length) };
  previousImage = null;
  viewer.setPrediction(prediction, colors(), classes);
  legend.fill(current.counts, moving);
}

/** Shows a camera or a video with its label maps. */
async function openSource(open, name) {
  const signal = begin();
  try {
    const opened = await open();
    if (signal.aborted) return opened.close();
    source = opened;
    if (source.isCamera) setCameraButton(true);
    await source.video.play();
    player.use(source);
    keepImage();
    setState("busy");
    viewer.show(source.video, source.video.videoWidth, source.video.videoHeight);
    await predictFrames(source, signal);
  } catch (error) {
    fail(error, name);
  }
}

/** Predicts fast while a video plays, and at full quality whenever it pauses. */
async function predictFrames({ name, video }, signal) {
  const { predict, predictFrame } = await engine;
  for await (const { frame, moving } of frames(video, signal)) {
    const prediction = await (moving ? predictFrame(frame) : predict(frame, signal));
    if (signal.aborted) return;
    viewer.drawFrame(frame, frame.width, frame.height);
    frame.close();
    showPrediction(name, prediction, moving && body.dataset.state === "live");
    setState(moving ? "live" : "done");
    if (moving) continue;
    announce(summary());
    // The camera is off, and this was its last frame.
    if (source?.video !== video) return;
  }
}

/** Returns the three largest classes with their shares. */
function summary() {
  const { counts, prediction } = current;
  const largest = classes
    .filter(({ id }) => counts[id])
    .sort((a, b) => counts[b.id] - counts[a.id])
    .slice(0, 3);
  const share = (id) => Math.round((100 * counts[id]) / prediction.ids.length);
  return `${largest.map(({ id, name }) => `${name} ${share(id)} %`).join(", ")}.`;
}

/** Starts or stops the camera. Its last frame stays and is predicted at full quality. */
function toggleCamera() {
  if (source?.isCamera) closeSource();
  else openSource(openCamera);
}

function setCameraButton(isOn) {
  find("camera").classList.toggle("on", isOn);
  find("camera").textContent = isOn ? "Stop camera" : "Camera";
}

function closeSource() {
  if (!source) return;
  source.close();
  source = null;
  setCameraButton(false);
  player.use(null);
}

/** Saves a file made from the prediction. A video pauses and is predicted at full quality first. */
async function save(make, suffix) {
  source?.video.pause();
  while (body.dataset.state === "live") await new Promise(requestAnimationFrame);
  if (body.dataset.state !== "done") return;
  const content = await make(current.prediction);
  const link = element("a", {
    href: URL.createObjectURL(content),
    download: current.name + suffix,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function askToken() {
  const dialog = find("token");
  dialog.oncancel = (event) => event.preventDefault();
  dialog.showModal();
  return new Promise((resolve) => {
    find("token-form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      resolve(find("token-value").value);
    };
  });
}

function toGeojsonFile(prediction) {
  const content = JSON.stringify(toGeojson(prediction, classes));
  return new Blob([content], { type: "application/geo+json" });
}

/** Takes files from the file dialog, by drop and by paste. */
function listenForFiles() {
  const input = find("file");
  for (const id of ["choose", "drop"]) find(id).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files.length) openFile(input.files[0]);
    input.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    body.classList.remove("dragging");
    if (event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    const image = files.find(({ type }) => type.startsWith("image/"));
    if (image) openFile(image);
  });
}

function listenForControls() {
  find("camera").addEventListener("click", toggleCamera);
  find("dismiss").addEventListener("click", () => showError(""));
  for (const radio of document.querySelectorAll("[name=view]")) {
    radio.addEventListener("change", () => viewer.setView(radio.value));
  }
  opacity.addEventListener("input", () => {
    viewer.setOpacity(opacity.value / 100);
    find("opacity-value").textContent = `${opacity.value} %`;
  });
  const overlayImage = () => viewer.overlayImage(opacity.value / 100);
  const mask = (prediction) => palettePng(prediction, classes);
  find("save-mask").addEventListener("click", () => save(mask, ".png"));
  find("save-overlay").addEventListener("click", () => save(overlayImage, "-overlay.png"));
  find("save-polygons").addEventListener("click", () => save(toGeojsonFile, ".geojson"));
}

function showModel(model) {
  classes = model.classes;
  legend.use(classes);
  document.title = `${model.name} - useg`;
  find("model").textContent = `${model.name}, ${classes.length} classes`;
  find("model-classes").replaceChildren(
    ...classes.map(({ name, color }) => {
      const item = document.createElement("li");
      item.append(swatch(color), name);
      return item;
    }),
  );
}

const showProgress = (text) => (find("model").textContent = text);
const engine = connect({ askToken, progress: showProgress });
// Files that arrive before the model is loaded wait for it.
listenForFiles();
listenForControls();
try {
  showModel((await engine).model());
  find("object-hint").hidden = !(await engine).objects;
  body.dataset.ready = "";
} catch (error) {
  showError(error.message);
}
