// The labelling page: opens images, connects pointer and keys to the tools, and polls the model.

import { Mask } from "./mask.js";
import {
  askClasses,
  createClasses,
  createImageList,
  createToolbar,
  fillHelp,
  showModel,
  showTraining,
} from "./panels.js";
import * as server from "./server.js";
import { createStage } from "./stage.js";
import { acceptWhere, createTools, isCertain, SIZED, TOOLS } from "./tools.js";

const POLL_MILLISECONDS = 1200;
// Total pixels of the masks that are kept in memory, with their undo history.
const MAX_KEPT_PIXELS = 120e6;
const WHEEL_STEP = 1.15;

const find = (id) => document.getElementById(id);
const body = document.body;
const frame = find("stage");

const stage = createStage();
const toolbar = createToolbar(setTool);
const classList = createClasses();
let folder = await server.readFolder().catch((error) => (showError(error.message), null));
let imageList = null;
let state = null;
let mayEdit = false;
// How often this browser has joined; answers to requests from before the last time are ignored.
let joins = 0;
let tool = "brush";
// The open image: its index, bitmap, mask and suggestion.
let current = -1;
let bitmap = null;
let mask = null;
let suggestion = null;
const masks = new Map();
// Images that were open before, most recent last.
const visited = [];
// The crosshair for the keyboard, in image pixels.
let crosshair = null;

const tools = createTools({
  mask: () => mask,
  image: () => bitmap,
  suggestion: () => suggestion,
  classId: () => classList.current(),
  radius: () => Number(find("size").value) / 2,
  tolerance: () => Number(find("tolerance").value),
  view: () => stage.visible(),
  pickClass: (id) => classList.choose(id),
  showPath,
  fail: (error) => showError(error.message),
});

function showError(text) {
  find("error-text").textContent = text;
  find("error").hidden = !text;
}

function announce(text) {
  find("status").textContent = text;
}

/* Images */

async function open(k) {
  if (k === current || !folder.images[k]) return;
  tools.cancel();
  if (current >= 0) visited.push(current);
  current = k;
  body.dataset.state = "busy";
  body.dataset.suggestion = "";
  imageList.setCurrent(k);
  const { name, width, height, finding } = folder.images[k];
  find("image-name").textContent = name;
  find("finding").textContent = finding;
  find("finding").hidden = !finding;
  try {
    const [file, read] = await Promise.all([server.readImage(k), server.readMask(k)]);
    const opened = await createImageBitmap(file);
    if (current !== k) return;
    const known = masks.get(k);
    if (known && (!known.isSaved || known.revision === read.revision)) mask = known;
    else mask = new Mask(k, width, height, read, stage.drawPart, onSaved);
    keepMask(k, mask);
    mask.keepsPainted = find("keep").checked;
    [bitmap, suggestion] = [opened, null];
    crosshair = [width / 2, height / 2];
    stage.show(bitmap, mask);
    showSaved();
    body.dataset.state = "ready";
    announce(`${name} is open.`);
    await fetchSuggestion();
  } catch (error) {
    if (current === k) showError(error.message);
  }
}

/** Drops the least recently used masks, with their undo history, when there are too many. */
function keepMask(k, newest) {
  masks.delete(k);
  masks.set(k, newest);
  let pixels = 0;
  for (const [other, kept] of [...masks].reverse()) {
    pixels += kept.ids.length;
    if (pixels > MAX_KEPT_PIXELS && other !== k && kept.isSaved) masks.delete(other);
  }
}

async function fetchSuggestion() {
  const [k, round] = [current, state?.round];
  if (round === null || round === undefined) return;
  const found = await server.readSuggestion(k).catch((error) => (showError(error.message), null));
  if (!found || current !== k) return;
  suggestion = found;
  stage.setSuggestion(suggestion);
  body.dataset.suggestion = suggestion.round;
  if (folder.prefill && state.states[k] === "empty" && mayEdit) acceptAll();
}

function onSaved(saved, answer) {
  showSaved();
  if (answer instanceof Error) {
    if (answer.status === 409) reload(saved.k, answer.message);
    else if (answer.status === 423) askToTakeOver();
    else if (answer.status) showError(answer.message);
  } else if (answer) {
    setState(saved.k, answer.state);
  }
}

/** Loads the mask again, because another program has changed it. */
function reload(k, message) {
  masks.delete(k);
  showError(message);
  if (current !== k) return;
  current = -1;
  open(k);
}

function showSaved() {
  const all = [...masks.values()].every(({ isSaved }) => isSaved);
  find("saved").textContent = !mayEdit ? "View only" : all ? "Saved" : "Saving…";
  body.dataset.saved = all;
}

function setState(k, value) {
  if (!state) return;
  state.states[k] = value;
  showStates();
}

function showStates() {
  imageList.update(state.states, state.priorities, isByPriority());
  const done = state.states.filter((each) => each === "done").length;
  find("images-title").textContent = `Images: ${done} of ${state.states.length} done`;
  find("done").textContent = state.states[current] === "done" ? "Reopen" : "Done";
}

const isByPriority = () => find("order").value === "priority";

/** Opens the most useful image without strokes; in order of names, the next image. */
function openNext() {
  const order = imageList.order();
  const place = order.indexOf(current);
  const following = [...order.slice(place + 1), ...order.slice(0, place)];
  const untouched = isByPriority() && following.find((k) => state.states[k] === "empty");
  open(Number.isInteger(untouched) ? untouched : (following[0] ?? current));
}

/** Opens the previously open image, because the order of the list may have changed. */
function openPrevious() {
  const order = imageList.order();
  const before = isByPriority() ? visited.pop() : undefined;
  open(before ?? order.at(order.indexOf(current) - 1));
  if (before !== undefined) visited.pop();
}

/** Marks this image as done, and opens the next one that is not. */
async function toggleDone() {
  if (!mayEdit) return askToTakeOver();
  const k = current;
  const isDone = state.states[k] !== "done";
  try {
    while (!mask.isSaved) await new Promise((resolve) => setTimeout(resolve, 30));
    const answer = await server.setDone(k, isDone);
    setState(k, answer.state);
    if (!isDone) return;
    const next = imageList.order().find((other) => state.states[other] !== "done");
    if (next === undefined) announce("All images are done.");
    else open(next);
  } catch (error) {
    showError(error.message);
  }
}

/* The model */

function acceptAll() {
  if (!suggestion || !canEdit()) return;
  acceptWhere(mask, suggestion, () => true);
}

function acceptClass() {
  if (!suggestion || !canEdit()) return;
  const id = classList.current();
  acceptWhere(
    mask,
    suggestion,
    (place) => suggestion.ids[place] === id && isCertain(suggestion, place),
  );
}

async function poll() {
  try {
    const [before, joinsBefore] = [state, joins];
    state = await server.readState();
    if (mayEdit && !state.editor && joins === joinsBefore) {
      mayEdit = false;
      askToTakeOver();
    }
    showModel(state);
    showTraining(state.training);
    showStates();
    showSaved();
    const isNew = before?.round !== state.round;
    if (isNew && current >= 0 && body.dataset.state === "ready") await fetchSuggestion();
    body.dataset.round = state.round ?? "";
  } catch (error) {
    showError(error.message);
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

/* Who edits */

function canEdit() {
  if (!mayEdit) askToTakeOver();
  return mayEdit && mask !== null;
}

function askToTakeOver() {
  mayEdit = false;
  showSaved();
  if (!find("editor-dialog").open) find("editor-dialog").showModal();
}

async function takeOver() {
  find("editor-dialog").close();
  const before = body.dataset.state;
  body.dataset.state = "busy";
  try {
    mayEdit = await server.join(true);
    joins += 1;
    const unsaved = [...masks.values()].filter(({ isSaved }) => !isSaved);
    for (const each of unsaved) each.retry();
    // Discard masks that the other browser may have changed meanwhile.
    for (const [k, each] of masks) if (each.isSaved) masks.delete(k);
    const k = current;
    if (!unsaved.length && k >= 0) {
      current = -1;
      open(k);
    } else body.dataset.state = before;
    showSaved();
  } catch (error) {
    body.dataset.state = before;
    showError(error.message);
  }
}

async function editClasses() {
  if (!mayEdit && folder.classes.length) return askToTakeOver();
  let wanted = folder.classes;
  for (;;) {
    wanted = await askClasses(wanted);
    if (!wanted) return;
    try {
      folder = { ...folder, ...(await server.saveClasses(wanted)) };
      break;
    } catch (error) {
      showError(error.message);
    }
  }
  showError("");
  useClasses();
}

function useClasses() {
  classList.use(folder.classes);
  stage.setClasses(folder.classes);
}

/* Tools, pointer and keys */

function setTool(id) {
  tools.cancel();
  tool = id;
  toolbar.setCurrent(id);
  const { hint } = TOOLS.find((each) => each.id === id);
  find("hint").textContent = hint;
  find("size-row").hidden = !SIZED.has(id);
  find("tolerance-row").hidden = id !== "fill";
  frame.classList.toggle("panning", id === "pan");
  find("cursor").hidden = true;
}

function setSize(value) {
  find("size").value = Math.max(1, Math.round(value));
  find("size-value").textContent = `${find("size").value} px`;
  showCursor();
}

function showPath(points) {
  const written = (point) => stage.place(point).map((at) => at.toFixed(1)).join(",");
  const shown = (points ?? []).map(written);
  find("path").setAttribute("points", shown.join(" "));
}

let pointerAt = null;

/** Shows the size of the brush at the pointer. */
function showCursor() {
  const cursor = find("cursor");
  cursor.hidden = !pointerAt || !SIZED.has(tool);
  if (cursor.hidden) return;
  const diameter = Math.max(3, Number(find("size").value) * stage.cssScale());
  cursor.style.width = cursor.style.height = `${diameter}px`;
  const [x, y] = pointerAt.map((at) => at - diameter / 2);
  cursor.style.transform = `translate(${x}px, ${y}px)`;
}

function onStage(event) {
  const box = frame.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

// Pressed pointers: id -> position on the stage. Two of them zoom and pan.
const pointers = new Map();
let isPainting = false;
let isSpaceDown = false;

function onPointerDown(event) {
  if (event.target.closest("#zoom") || !mask) return;
  frame.focus({ focusVisible: false });
  frame.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, onStage(event));
  if (pointers.size === 2 && isPainting) {
    isPainting = false;
    tools.abandon();
  }
  const isPan = tool === "pan" || isSpaceDown || event.button === 1 || pointers.size > 1;
  if (isPan || event.button > 1 || !canEdit()) return;
  isPainting = true;
  tools.press(tool, stage.locate(event), event);
}

function onPointerMove(event) {
  pointerAt = event.pointerType === "touch" ? null : onStage(event);
  showCursor();
  if (!mask) return;
  if (pointers.has(event.pointerId) && !isPainting) return pinch(event);
  const events = isPainting ? (event.getCoalescedEvents?.() ?? []) : [];
  for (const each of events.length ? events : [event]) {
    tools.move(tool, stage.locate(each), isPainting);
  }
}

/** Pans the view with one pointer; zooms and pans it with two. */
function pinch(event) {
  const [before, now] = [pointers.get(event.pointerId), onStage(event)];
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
  pointers.set(event.pointerId, now);
  const share = pointers.size > 1 ? 0.5 : 1;
  stage.pan(share * (now[0] - before[0]), share * (now[1] - before[1]));
  if (!other) return;
  const distance = ([x, y]) => Math.max(10, Math.hypot(x - other[0], y - other[1]));
  const middle = [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2];
  stage.zoom(distance(now) / distance(before), middle);
}

function onPointerUp(event) {
  pointers.delete(event.pointerId);
  if (!isPainting) return;
  isPainting = false;
  if (event.type === "pointercancel") tools.abandon();
  else tools.release(tool, stage.locate(event));
}

function onWheel(event) {
  event.preventDefault();
  const factor = WHEEL_STEP ** (-event.deltaY / 100);
  if (SIZED.has(tool) && !event.ctrlKey && !event.metaKey) {
    const [size, wanted] = [Number(find("size").value), Number(find("size").value) * factor];
    setSize(Math.abs(wanted - size) < 1 ? size - Math.sign(event.deltaY) : wanted);
  } else {
    stage.zoom(factor, onStage(event));
  }
}

/** Moves the crosshair, and pans the view to keep it visible. */
function moveCrosshair(dx, dy, event) {
  const by = event.shiftKey ? 1 : Math.max(1, Math.round(Number(find("size").value) / 2));
  crosshair = [
    Math.min(mask.width - 0.5, Math.max(0.5, crosshair[0] + dx * by)),
    Math.min(mask.height - 0.5, Math.max(0.5, crosshair[1] + dy * by)),
  ];
  const [x, y] = stage.place(crosshair);
  const outside = (at, length) => Math.max(20 - at, 0) + Math.min(length - 20 - at, 0);
  const [panX, panY] = [outside(x, frame.clientWidth), outside(y, frame.clientHeight)];
  if (panX || panY) stage.pan(panX, panY);
  showCrosshair();
}

function showCrosshair() {
  if (!crosshair) return;
  const [x, y] = stage.place(crosshair);
  find("crosshair").setAttribute("transform", `translate(${x} ${y})`);
}

/** Uses the tool at the crosshair. */
function useAtCrosshair(event) {
  if (!canEdit()) return;
  tools.press(tool, crosshair, event);
  tools.release(tool, crosshair);
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const KEYS = {
  "[": () => setSize(Number(find("size").value) / 1.2 - 0.5),
  "]": () => setSize(Number(find("size").value) * 1.2 + 0.5),
  "+": () => stage.zoom(1.5),
  "=": () => stage.zoom(1.5),
  "-": () => stage.zoom(1 / 1.5),
  0: () => stage.fit(),
  a: acceptAll,
  d: toggleDone,
  j: openNext,
  k: openPrevious,
  v: () => find("show-suggestion").click(),
  "?": () => find("help-dialog").showModal(),
  Escape: () => tools.cancel(),
  ...Object.fromEntries(TOOLS.map(({ id, key }) => [key, () => setTool(id)])),
};

function onKeyDown(event) {
  const target = event.target;
  if (target.matches("input:not([type=range], [type=checkbox]), select") || !mask) return;
  if (document.querySelector("dialog[open]")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") edit(event.shiftKey ? "redo" : "undo", event);
    else if (key === "y") edit("redo", event);
    return;
  }
  if (event.altKey) return;
  if (target === frame && MOVES[key]) {
    event.preventDefault();
    return moveCrosshair(...MOVES[key], event);
  }
  if (key === "Enter" && target === frame) {
    const isEnd = event.shiftKey || find("path").getAttribute("points");
    if (tool === "polygon" && isEnd) tools.closePolygon();
    else useAtCrosshair(event);
    return;
  }
  if (key === " " && (target === frame || target === body)) {
    event.preventDefault();
    isSpaceDown = true;
    frame.classList.add("panning");
    return;
  }
  if (/^[1-9]$/.test(key)) classList.choose(Number(key) - 1);
  else KEYS[key]?.();
}

function edit(what, event) {
  event?.preventDefault();
  if (!canEdit()) return;
  tools.cancel();
  mask[what]();
}

function listen() {
  frame.addEventListener("pointerdown", onPointerDown);
  frame.addEventListener("pointermove", onPointerMove);
  for (const type of ["pointerup", "pointercancel"]) frame.addEventListener(type, onPointerUp);
  frame.addEventListener("pointerleave", () => {
    pointerAt = null;
    showCursor();
  });
  frame.addEventListener("dblclick", () => {
    if (tool === "polygon" && canEdit()) tools.closePolygon();
  });
  frame.addEventListener("wheel", onWheel, { passive: false });
  frame.addEventListener("contextmenu", (event) => event.preventDefault());
  document.addEventListener("keydown", onKeyDown);
  document.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    isSpaceDown = false;
    frame.classList.toggle("panning", tool === "pan");
  });
  stage.onView(() => {
    find("fit").textContent = `${stage.scaleInPercent()} %`;
    showCursor();
    showCrosshair();
  });
  const clicks = {
    undo: () => edit("undo"),
    redo: () => edit("redo"),
    previous: openPrevious,
    next: openNext,
    done: toggleDone,
    dismiss: () => showError(""),
    fit: () => stage.fit(),
    "zoom-in": () => stage.zoom(1.5),
    "zoom-out": () => stage.zoom(1 / 1.5),
    "edit-classes": editClasses,
    "accept-all": acceptAll,
    "accept-class": acceptClass,
    "round-now": () => ask(server.trainRound),
    "take-over": takeOver,
    "view-only": () => find("editor-dialog").close(),
    help: () => find("help-dialog").showModal(),
    train: () =>
      ask(() =>
        state?.training?.running
          ? server.stopTraining()
          : server.train(Number(find("minutes").value) || 10),
      ),
  };
  for (const [id, action] of Object.entries(clicks)) find(id).addEventListener("click", action);
  find("size").addEventListener("input", () => setSize(Number(find("size").value)));
  find("tolerance").addEventListener("input", showTolerance);
  find("opacity").addEventListener("input", showOpacity);
  find("order").addEventListener("change", showStates);
  find("keep").addEventListener("change", () => mask && (mask.keepsPainted = find("keep").checked));
  find("show-suggestion").addEventListener("change", () =>
    stage.setShowsSuggestion(find("show-suggestion").checked),
  );
}

const ask = (question) => question().catch((error) => showError(error.message));

function showTolerance() {
  find("tolerance-value").textContent = find("tolerance").value;
}

function showOpacity() {
  find("opacity-value").textContent = `${find("opacity").value} %`;
  stage.setOpacity(find("opacity").value / 100);
}

async function start() {
  document.title = `${folder.name} - useg label`;
  find("root").textContent = folder.root;
  imageList = createImageList(folder.images, open);
  fillHelp();
  listen();
  setTool("brush");
  setSize(12);
  showTolerance();
  showOpacity();
  if (folder.notes.length) showError(folder.notes.join(" "));
  mayEdit = await server.join();
  if (!mayEdit) askToTakeOver();
  state = await server.readState();
  showModel(state);
  showStates();
  useClasses();
  // Continue with an image that has strokes but is not done.
  const isIn = (wanted) => imageList.order().find((k) => state.states[k] === wanted);
  await open(isIn("scribbled") ?? isIn("empty") ?? 0);
  body.dataset.ready = "";
  if (!folder.classes.length) await editClasses();
  poll();
}

if (folder) start().catch((error) => showError(error.message));
