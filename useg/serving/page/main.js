// The page: a picture comes in by drop, paste, file or camera; an engine predicts it; what is seen is drawn from the answer.

import { startCamera } from "./camera.js";
import { connect } from "./engine.js";
import { colorTable, countPixels } from "./labels.js";
import { createLegend, element, swatch } from "./legend.js";
import { palettePng } from "./png.js";
import { toGeojson } from "./polygons.js";
import { createStage } from "./stage.js";

const find = (id) => document.getElementById(id);
const [body, error, status, opacity] = [document.body, find("error"), find("status"), find("opacity")];

const stage = createStage(announce);
const legend = createLegend((shown) => stage.recolor(colorTable(classes, shown)));
let classes = [];
let current = null; // {name, prediction} on the stage
let waiting = null; // aborts the prediction on its way
let stopCamera = null;

function announce(text) {
  status.textContent = text;
}

function complain(problem) {
  error.textContent = problem?.message ?? "";
  error.hidden = !problem;
}

/** Shows a picture and asks for its label map; a newer picture overtakes an older one. */
async function open(file) {
  endCamera();
  waiting?.abort();
  const mine = (waiting = new AbortController());
  complain(null);
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (mine.signal.aborted) return;
  current = null;
  body.dataset.state = "busy";
  announce("Looking at the picture.");
  if (bitmap) stage.show(bitmap, bitmap.width, bitmap.height);
  try {
    const prediction = await (await ready).predict(file, mine.signal);
    if (mine.signal.aborted) return;
    if (!bitmap) stage.show(null, prediction.width, prediction.height); // a TIFF, say: the label map is shown alone
    show(file.name ?? "picture", prediction);
    announce(`${summary()}${bitmap ? "" : " This browser cannot show the picture itself."}`);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    body.dataset.state = "empty";
    announce("");
    complain(problem);
  }
}

function show(name, prediction) {
  current = { name: name.replace(/\.[^.]*$/, "") || "picture", prediction };
  stage.label(prediction, colorTable(classes, legend.shown()), classes);
  current.counts = countPixels(prediction.ids, classes.length);
  legend.fill(current.counts);
  body.dataset.state = "done";
}

function summary() {
  const total = current.prediction.ids.length;
  const largest = classes.filter(({ id }) => current.counts[id]).sort((a, b) => current.counts[b.id] - current.counts[a.id]);
  return `${largest.slice(0, 3).map(({ id, name }) => `${name} ${Math.round((100 * current.counts[id]) / total)} %`).join(", ")}.`;
}

async function toggleCamera() {
  if (stopCamera) return endCamera();
  complain(null);
  waiting?.abort();
  try {
    stopCamera = await startCamera(async (frame) => {
      const prediction = await (await ready).predict(frame).catch(complain);
      if (prediction && stopCamera) {
        stage.show(frame, frame.width, frame.height);
        show("camera", prediction);
      }
      frame.close();
    });
    find("camera").setAttribute("aria-pressed", "true");
    find("camera").textContent = "Hold the picture";
  } catch (problem) {
    complain(problem);
  }
}

function endCamera() {
  if (!stopCamera) return;
  stopCamera();
  stopCamera = null;
  find("camera").setAttribute("aria-pressed", "false");
  find("camera").textContent = "Camera";
}

function save(content, suffix) {
  const link = element("a", { href: URL.createObjectURL(content), download: current.name + suffix });
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
  find("save-mask").addEventListener("click", async () => save(await palettePng(current.prediction, classes), ".png"));
  find("save-overlay").addEventListener("click", async () => save(await stage.merged(opacity.value / 100), "-overlay.png"));
  find("save-polygons").addEventListener("click", () => {
    const text = JSON.stringify(toGeojson(current.prediction, classes));
    save(new Blob([text], { type: "application/geo+json" }), ".geojson");
  });
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
