// The page: a picture or video comes in by drop, paste, file or camera; an engine predicts it; what is seen is drawn from the answer.

import { connect } from "./engine.js";
import { createFilm } from "./film.js";
import { colorTable, countPixels } from "./labels.js";
import { createLegend, element, swatch } from "./legend.js";
import { frames, openCamera, openFilm } from "./live.js";
import { palettePng } from "./png.js";
import { toGeojson } from "./polygons.js";
import { createStage } from "./stage.js";

const find = (id) => document.getElementById(id);
const [body, error, status, opacity] = [document.body, find("error"), find("status"), find("opacity")];

const stage = createStage(announce);
const legend = createLegend((shown) => stage.recolor(colorTable(classes, shown)));
let classes = [];
const film = createFilm();
let current = null; // {name, prediction, counts} on the stage
let waiting = null; // aborts the prediction on its way
let live = null; // the camera or video that is on

function announce(text) {
  status.textContent = text;
}

function complain(problem) {
  error.textContent = problem?.message ?? "";
  error.hidden = !problem;
}

function open(file) {
  return file.type.startsWith("video/") ? watch(() => openFilm(file)) : label(file);
}

/** Ends what is shown or on its way; returns the signal that ends what comes now. */
function begin() {
  endLive();
  waiting?.abort();
  waiting = new AbortController();
  complain(null);
  return waiting.signal;
}

/** Shows a picture and asks for its label map; a newer picture overtakes an older one. */
async function label(file) {
  const mine = begin();
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (mine.aborted) return;
  current = null;
  body.dataset.state = "busy";
  announce("Looking at the picture.");
  if (bitmap) stage.show(bitmap, bitmap.width, bitmap.height);
  try {
    const prediction = await (await ready).predict(file, mine);
    if (mine.aborted) return;
    if (!bitmap) stage.show(null, prediction.width, prediction.height); // a TIFF, say: the label map is shown alone
    show(file.name ?? "picture", prediction);
    body.dataset.state = "done";
    announce(`${summary()}${bitmap ? "" : " This browser cannot show the picture itself."}`);
  } catch (problem) {
    giveUp(problem);
  }
}

function giveUp(problem) {
  if (problem.name === "AbortError") return;
  endLive();
  body.dataset.state = current ? "done" : "empty";
  announce("");
  complain(problem);
}

function show(name, prediction, moving) {
  current = { name: name.replace(/\.[^.]*$/, "") || "picture", prediction, counts: countPixels(prediction.ids, classes.length) };
  stage.label(prediction, colorTable(classes, legend.shown()), classes);
  legend.fill(current.counts, moving);
}

/** Shows a camera or a video with its label maps. */
async function watch(opening) {
  const mine = begin();
  try {
    const source = await opening();
    if (mine.aborted) return source.close();
    live = source;
    if (source.isCamera) nameCamera("Hold the picture", true);
    else film.use(source.video);
    await source.video.play();
    current = null;
    body.dataset.state = "busy";
    stage.show(source.video, source.video.videoWidth, source.video.videoHeight);
    await follow(source, mine);
  } catch (problem) {
    giveUp(problem);
  }
}

/** Labels what moves in a hurry and, whenever it stands still, in full. */
async function follow(source, signal) {
  const engine = await ready;
  for await (const { frame, moving } of frames(source.video, signal)) {
    const prediction = await (moving ? engine.glance(frame) : engine.predict(frame, signal));
    if (signal.aborted) return;
    stage.draw(frame, frame.width, frame.height);
    frame.close();
    show(source.name, prediction, moving && body.dataset.state === "live");
    body.dataset.state = moving ? "live" : "done";
    if (moving) continue;
    announce(summary());
    if (live !== source) return; // a camera that is off
  }
}

function summary() {
  const total = current.prediction.ids.length;
  const largest = classes.filter(({ id }) => current.counts[id]).sort((a, b) => current.counts[b.id] - current.counts[a.id]);
  return `${largest.slice(0, 3).map(({ id, name }) => `${name} ${Math.round((100 * current.counts[id]) / total)} %`).join(", ")}.`;
}

function toggleCamera() {
  if (live?.isCamera) endLive(); // its last picture is labelled in full
  else watch(openCamera);
}

function nameCamera(text, isOn) {
  find("camera").setAttribute("aria-pressed", isOn);
  find("camera").textContent = text;
}

function endLive() {
  if (!live) return;
  live.close();
  live = null;
  nameCamera("Camera", false);
  film.use(null);
}

/** Saves what is made of a prediction in full: what moves is held for it. */
async function save(make, suffix) {
  if (live?.isCamera) endLive();
  live?.video.pause();
  while (body.dataset.state === "live") await new Promise(requestAnimationFrame);
  const link = element("a", { href: URL.createObjectURL(await make(current.prediction)), download: current.name + suffix });
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

function listen() {
  const file = find("file");
  for (const id of ["choose", "drop"]) find(id).addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files.length) open(file.files[0]);
    file.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => !event.relatedTarget && body.classList.remove("dragging"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    body.classList.remove("dragging");
    if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (pasted) open(pasted);
  });
  find("camera").addEventListener("click", toggleCamera);
  for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => stage.view(radio.value));
  opacity.addEventListener("input", () => {
    stage.opacity(opacity.value / 100);
    find("opacity-value").textContent = `${opacity.value} %`;
  });
  find("save-mask").addEventListener("click", () => save((prediction) => palettePng(prediction, classes), ".png"));
  find("save-overlay").addEventListener("click", () => save(() => stage.merged(opacity.value / 100), "-overlay.png"));
  find("save-polygons").addEventListener("click", () => save(polygons, ".geojson"));
}

function polygons(prediction) {
  return new Blob([JSON.stringify(toGeojson(prediction, classes))], { type: "application/geo+json" });
}

function introduce({ name, classes: known }) {
  classes = known;
  legend.use(classes);
  document.title = `${name} - useg`;
  find("model").textContent = `${name}, ${classes.length} classes`;
  find("preview").replaceChildren(
    ...classes.map((each) => {
      const item = document.createElement("li");
      item.append(swatch(each.color), each.name);
      return item;
    }),
  );
}

const ready = connect({ askToken, progress: (text) => (find("model").textContent = text) });
listen(); // what is dropped before the model is there waits for it
try {
  introduce((await ready).model());
  body.dataset.ready = "";
} catch (problem) {
  complain(problem);
}
