// The tools: each turns pointer events into rows of the mask, or into a request to the server.

import { UNPAINTED } from "./mask.js";
import { findRegion } from "./server.js";
import { coverConnected, coverLine, coverPolygon } from "./shapes.js";

/** Minimum confidence, of 255, for accepting pixels of a region or a class: 90 %. */
const CERTAIN = 230;

// id, key, name, hint, drawing
export const TOOLS = [
  [
    "brush",
    "b",
    "Brush",
    "Drag to paint. Change the size with the wheel, [ and ].",
    "M14 4l6 6-9 9H5v-6zM12 6l6 6",
  ],
  ["erase", "e", "Eraser", "Drag to erase.", "M8 19h12M5 14l8-9 7 6-7 8H9z"],
  [
    "line",
    "l",
    "Line",
    "Drag from one end to the other; the size is the width of the line.",
    "M5 19L19 5",
  ],
  [
    "polygon",
    "p",
    "Polygon",
    "Click the corners; double-click or press Enter to close it, Esc to cancel.",
    "M5 9l8-5 7 7-4 9H7z",
  ],
  [
    "fill",
    "f",
    "Fill",
    "Click to paint the connected area of similar colour.",
    "M5 12l7-7 7 7-7 7zM12 5V2M20 16c1 2 2 3 1 4s-2 0-2-1z",
  ],
  [
    "smart",
    "s",
    "Smart fill",
    "Click to paint a patch of uniform colour and texture, or drag over several.",
    "M4 6l6-2 4 5 6-2v7l-5 6-6-3-5 2zM10 4l-1 13M14 9l1 11",
  ],
  [
    "object",
    "o",
    "Object",
    "Click inside an object. Shift-click adds a part, Alt-click removes one.",
    "M12 3v5M12 16v5M3 12h5M16 12h5M12 11v2",
  ],
  [
    "accept",
    "r",
    "Accept",
    "Click a region of the suggestion to accept it where the model is at least 90 % certain.",
    "M4 13l5 5L20 6",
  ],
  [
    "pick",
    "i",
    "Pick class",
    "Click a painted or suggested pixel to select its class.",
    "M14 4l6 6-3 1-8 8H5v-4l8-8z",
  ],
  [
    "pan",
    "h",
    "Pan",
    "Drag to move the image. With any other tool, hold Space and drag.",
    "M12 3v18M3 12h18M9 6l3-3 3 3M9 18l3 3 3-3M6 9l-3 3 3 3M18 9l3 3-3 3",
  ],
].map(([id, key, name, hint, drawing]) => ({ id, key, name, hint, drawing }));

/** Tools whose size the wheel changes. */
export const SIZED = new Set(["brush", "erase", "line"]);

/**
 * `work` provides what the tools act on: mask, image (a bitmap), suggestion, classId, radius,
 * tolerance, view; and pickClass(id), showPath(points | null), fail(error).
 */
export function createTools(work) {
  // The corners of the polygon in progress.
  let corners = [];
  // The clicks on the object in progress: {inside, outside, mask}.
  let clicks = null;
  let last = null;
  let colors = null;

  const id = (tool) => (tool === "erase" ? UNPAINTED : work.classId());
  const pixel = ([x, y]) => [Math.floor(x), Math.floor(y)];
  const isInside = ([x, y]) =>
    x >= 0 && y >= 0 && x < work.mask().width && y < work.mask().height;

  function strokeTo(tool, point) {
    const mask = work.mask();
    const paint = (y, from, to) => mask.paint(y, from, to, id(tool));
    coverLine(last ?? point, point, work.radius(), paint);
    last = point;
    mask.flush();
  }

  function closePolygon() {
    const mask = work.mask();
    if (corners.length > 2) {
      coverPolygon(corners, (y, from, to) => mask.paint(y, from, to, work.classId()));
    }
    cancel();
    mask.endStroke();
  }

  function cancel() {
    corners = [];
    clicks = null;
    last = null;
    work.showPath(null);
  }

  /** Returns the pixel values of the image, which are read once. */
  function readColors() {
    const { width, height } = work.mask();
    if (colors?.image !== work.image()) {
      const canvas = new OffscreenCanvas(width, height);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(work.image(), 0, 0, width, height);
      colors = { image: work.image(), data: context.getImageData(0, 0, width, height).data };
    }
    return colors.data;
  }

  function fill(point) {
    const mask = work.mask();
    const data = readColors();
    const [x, y] = pixel(point);
    const start = 4 * (y * mask.width + x);
    const [red, green, blue] = data.subarray(start, start + 3);
    const most = work.tolerance();
    const isSimilar = (k) =>
      Math.abs(data[4 * k] - red) <= most &&
      Math.abs(data[4 * k + 1] - green) <= most &&
      Math.abs(data[4 * k + 2] - blue) <= most;
    const stays = mask.keepsPainted ? (k) => mask.ids[k] === UNPAINTED && isSimilar(k) : isSimilar;
    coverConnected(mask.width, mask.height, [x, y], stays, (row, from, to) =>
      mask.paint(row, from, to, work.classId()),
    );
    mask.endStroke();
  }

  async function paintRegion(wanted, end) {
    const mask = work.mask();
    const box = work.view();
    const view = [box.left, box.top, box.right - box.left, box.bottom - box.top];
    const isOnView = ([x, y]) => x >= box.left && y >= box.top && x < box.right && y < box.bottom;
    const inside = wanted.inside.filter(isOnView);
    const outside = (wanted.outside ?? []).filter(isOnView);
    if (!inside.length) return;
    const found = await findRegion(mask.k, { ...wanted, view, inside, outside }).catch(work.fail);
    if (!found || work.mask() !== mask) return;
    for (let row = 0; row < found.height; row++) {
      const line = found.inside.subarray(row * found.width, (row + 1) * found.width);
      for (let from = line.indexOf(1); from >= 0; ) {
        const zero = line.indexOf(0, from);
        const to = zero < 0 ? found.width : zero;
        mask.paint(found.y + row, found.x + from, found.x + to, work.classId());
        from = line.indexOf(1, to);
      }
    }
    if (end) mask.endStroke();
    else mask.flush();
  }

  /** Segments a new object, or corrects the last one, whose previous proposal is undone first. */
  async function clickObject(point, event) {
    const mask = work.mask();
    const isCorrection = clicks?.mask === mask && (event.shiftKey || event.altKey);
    if (isCorrection) mask.undo();
    else clicks = { mask, inside: [], outside: [] };
    (event.altKey ? clicks.outside : clicks.inside).push(pixel(point));
    const { inside, outside } = clicks;
    await paintRegion({ kind: "object", inside, outside }, true);
  }

  function acceptRegion(point) {
    const [mask, suggestion] = [work.mask(), work.suggestion()];
    if (!suggestion) return;
    const { width, height, ids } = suggestion;
    const [x, y] = pixel([(point[0] * width) / mask.width, (point[1] * height) / mask.height]);
    const wanted = ids[y * width + x];
    const region = new Uint8Array(width * height);
    coverConnected(width, height, [x, y], (k) => ids[k] === wanted, (row, from, to) =>
      region.fill(1, row * width + from, row * width + to),
    );
    acceptWhere(mask, suggestion, (k) => region[k] && isCertain(suggestion, k));
  }

  function pick(point) {
    const [mask, suggestion] = [work.mask(), work.suggestion()];
    const [x, y] = pixel(point);
    let found = mask.ids[y * mask.width + x];
    if (found === UNPAINTED && suggestion) {
      const column = Math.floor((point[0] * suggestion.width) / mask.width);
      const row = Math.floor((point[1] * suggestion.height) / mask.height);
      found = suggestion.ids[row * suggestion.width + column];
    }
    if (found !== UNPAINTED) work.pickClass(found);
  }

  return {
    cancel,
    closePolygon,
    /** Reverts a stroke that turns out to be a gesture. */
    abandon() {
      cancel();
      work.mask().cancelStroke();
    },
    press(tool, point, event) {
      if (tool === "polygon") {
        corners.push(point);
        work.showPath(corners);
        return;
      }
      last = null;
      if (tool === "brush" || tool === "erase") strokeTo(tool, point);
      else if (tool === "line") last = point;
      else if (!isInside(point)) return;
      else if (tool === "fill") fill(point);
      else if (tool === "smart") paintRegion({ kind: "superpixel", inside: [pixel(point)] }, false);
      else if (tool === "object") clickObject(point, event);
      else if (tool === "accept") acceptRegion(point);
      else if (tool === "pick") pick(point);
    },
    move(tool, point, isDown) {
      if (tool === "polygon" && corners.length) work.showPath([...corners, point]);
      if (!isDown) return;
      if (tool === "brush" || tool === "erase") strokeTo(tool, point);
      else if (tool === "line" && last) work.showPath([last, point]);
      else if (tool === "smart" && isInside(point)) {
        paintRegion({ kind: "superpixel", inside: [pixel(point)] }, false);
      }
    },
    release(tool, point) {
      const mask = work.mask();
      if (tool === "line" && last) {
        coverLine(last, point, work.radius(), (y, from, to) =>
          mask.paint(y, from, to, work.classId()),
        );
        work.showPath(null);
      }
      last = null;
      if (tool !== "polygon" && tool !== "object") mask.endStroke();
    },
  };
}

/**
 * Whether the model is certain enough of a pixel to accept it with its region or class. The other
 * pixels are mostly at borders, where a model is often wrong and would learn its own mistakes.
 */
export function isCertain(suggestion, place) {
  return suggestion.confidence[place] >= CERTAIN;
}

/** Paints unpainted pixels with the suggested class where `isWanted(index in the suggestion)`. */
export function acceptWhere(mask, suggestion, isWanted) {
  const { width, height } = mask;
  for (let y = 0; y < height; y++) {
    const start = Math.floor(((y + 0.5) * suggestion.height) / height) * suggestion.width;
    for (let x = 0; x < width; x++) {
      if (mask.ids[y * width + x] !== UNPAINTED) continue;
      const place = start + Math.floor(((x + 0.5) * suggestion.width) / width);
      if (isWanted(place)) mask.paintRest(y * width + x, suggestion.ids[place]);
    }
  }
  mask.endStroke();
}
