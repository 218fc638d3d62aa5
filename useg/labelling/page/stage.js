// The stage: the image and its mask at any zoom; a stroke redraws only what it changes.

import { isBlack, toRgb } from "./labels.js";
import { include, UNPAINTED } from "./mask.js";

const MAX_SCALE = 64;
// From this scale on, pixels are drawn as squares, without interpolation.
const SHARP_SCALE = 2;
const SUGGESTED_ALPHA = 120;
// The stripes of suggestions and of black classes, in screen pixels.
const STRIPE = 8;

export function createStage() {
  const find = (id) => document.getElementById(id);
  const [stage, imageCanvas, maskCanvas] = ["stage", "image", "mask"].map(find);
  const canvases = [imageCanvas, maskCanvas];
  const [imageContext, maskContext] = canvases.map((canvas) => canvas.getContext("2d"));
  const view = { scale: 1, left: 0, top: 0 };
  // The image at full size, half size, a quarter, ...
  let levels = [];
  let mask = null;
  let suggestion = null;
  let showsSuggestion = true;
  let colors = colorTables([]);
  // What to redraw: a part of the mask, and whether also the image.
  let dirty = null;
  let isImageDirty = false;
  let isScheduled = false;
  let onView = () => {};

  const ratio = () => window.devicePixelRatio || 1;

  function resize() {
    const [width, height] = [stage.clientWidth, stage.clientHeight].map((length) =>
      Math.max(1, Math.round(length * ratio())),
    );
    if (imageCanvas.width === width && imageCanvas.height === height) return;
    const isFitted = levels.length && view.scale === fitScale();
    for (const canvas of canvases) Object.assign(canvas, { width, height });
    if (isFitted) fit();
    else drawAll();
  }

  function fitScale() {
    const [width, height] = [levels[0].width, levels[0].height];
    return Math.min(imageCanvas.width / width, imageCanvas.height / height, MAX_SCALE);
  }

  function fit() {
    if (!levels.length) return;
    view.scale = fitScale();
    view.left = (imageCanvas.width - levels[0].width * view.scale) / 2;
    view.top = (imageCanvas.height - levels[0].height * view.scale) / 2;
    drawAll();
  }

  function schedule() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => {
      isScheduled = false;
      if (isImageDirty) drawImage();
      isImageDirty = false;
      const box = dirty;
      dirty = null;
      if (box) drawMask(box);
    });
  }

  function drawAll() {
    isImageDirty = true;
    if (levels.length) {
      drawPart({ left: 0, top: 0, right: levels[0].width, bottom: levels[0].height });
    }
    schedule();
    onView();
  }

  function drawPart(box) {
    dirty = include(dirty, box.left, box.top, box.right, box.bottom);
    schedule();
  }

  function drawImage() {
    imageContext.clearRect(0, 0, imageCanvas.width, imageCanvas.height);
    maskContext.clearRect(0, 0, maskCanvas.width, maskCanvas.height);
    if (!levels.length) return;
    const wanted = Math.max(0, Math.floor(Math.log2(1 / view.scale)));
    const level = levels[Math.min(wanted, levels.length - 1)];
    const shrunk = levels[0].width / level.width;
    // Draw only the visible part.
    const box = visible();
    const [x, y] = [box.left / shrunk, box.top / shrunk];
    const [width, height] = [(box.right - box.left) / shrunk, (box.bottom - box.top) / shrunk];
    if (width <= 0 || height <= 0) return;
    imageContext.imageSmoothingEnabled = view.scale < SHARP_SCALE;
    imageContext.drawImage(
      level,
      x,
      y,
      width,
      height,
      view.left + box.left * view.scale,
      view.top + box.top * view.scale,
      (box.right - box.left) * view.scale,
      (box.bottom - box.top) * view.scale,
    );
  }

  /** Returns the visible part of the image, in whole pixels. */
  function visible() {
    const [width, height] = [levels[0].width, levels[0].height];
    return {
      left: Math.max(0, Math.floor(-view.left / view.scale)),
      top: Math.max(0, Math.floor(-view.top / view.scale)),
      right: Math.min(width, Math.ceil((imageCanvas.width - view.left) / view.scale)),
      bottom: Math.min(height, Math.ceil((imageCanvas.height - view.top) / view.scale)),
    };
  }

  /** Draws the mask and the suggestion within a box of the image. */
  function drawMask(box) {
    if (!mask) return;
    const { width, height, ids } = mask;
    const onScreen = (start, length, limit, offset) => [
      Math.max(0, Math.floor(offset + start * view.scale) - 1),
      Math.min(limit, Math.ceil(offset + length * view.scale) + 1),
    ];
    const [left, right] = onScreen(box.left, box.right, maskCanvas.width, view.left);
    const [top, bottom] = onScreen(box.top, box.bottom, maskCanvas.height, view.top);
    if (left >= right || top >= bottom) return;
    const shown = showsSuggestion ? suggestion : null;
    const columns = new Int32Array(right - left);
    const suggestedColumns = new Int32Array(right - left);
    for (let x = left; x < right; x++) {
      const column = Math.floor((x + 0.5 - view.left) / view.scale);
      columns[x - left] = column < 0 || column >= width ? -1 : column;
      if (shown) suggestedColumns[x - left] = Math.floor(((column + 0.5) * shown.width) / width);
    }
    const image = maskContext.createImageData(right - left, bottom - top);
    const pixels = new Uint32Array(image.data.buffer);
    const above = new Uint8Array(right - left);
    for (let y = top, k = 0; y < bottom; y++) {
      const row = Math.floor((y + 0.5 - view.top) / view.scale);
      if (row < 0 || row >= height) {
        k += right - left;
        continue;
      }
      const start = row * width;
      const shownRow = shown ? Math.floor(((row + 0.5) * shown.height) / height) : 0;
      const suggestedStart = shown ? shownRow * shown.width : 0;
      let before = 0;
      for (let x = left; x < right; x++, k++) {
        const column = columns[x - left];
        if (column < 0) continue;
        const id = ids[start + column];
        const stripe = (x + y) % STRIPE < STRIPE / 2 ? 0 : 256;
        if (id !== UNPAINTED) {
          pixels[k] = colors.painted[stripe + id];
          above[x - left] = before = 0;
        } else if (shown) {
          const place = suggestedStart + suggestedColumns[x - left];
          const unsure = shown.unsure[place];
          // The edge of a region where the model is least certain.
          const isEdge = x > left && y > top && (unsure !== before || unsure !== above[x - left]);
          pixels[k] = isEdge ? 0xffffffff : colors.suggested[stripe + shown.ids[place]];
          above[x - left] = before = unsure;
        }
      }
    }
    maskContext.putImageData(image, left, top);
  }

  new ResizeObserver(resize).observe(stage);

  return {
    fit,
    drawPart,
    visible,
    onView: (listener) => (onView = listener),
    scaleInPercent: () => Math.round(100 * view.scale),
    /** Shows an image, given as a bitmap, and its mask. */
    async show(bitmap, newMask) {
      [levels, mask, suggestion] = [[bitmap], newMask, null];
      resize();
      fit();
      for (let last = bitmap; last.width > 2 * imageCanvas.width; ) {
        const [width, height] = [last.width >> 1, Math.max(1, last.height >> 1)];
        last = await createImageBitmap(last, {
          resizeWidth: width,
          resizeHeight: height,
          resizeQuality: "medium",
        });
        if (levels[0] !== bitmap) return;
        levels.push(last);
      }
      drawAll();
    },
    setSuggestion(newSuggestion) {
      suggestion = newSuggestion;
      drawAll();
    },
    setShowsSuggestion(value) {
      showsSuggestion = value;
      drawAll();
    },
    setClasses(classes) {
      colors = colorTables(classes);
      drawAll();
    },
    setOpacity: (share) => stage.style.setProperty("--opacity", share),
    /** Returns the image coordinates [x, y] of a pointer event; integers are pixel corners. */
    locate(event) {
      const box = stage.getBoundingClientRect();
      return [
        ((event.clientX - box.left) * ratio() - view.left) / view.scale,
        ((event.clientY - box.top) * ratio() - view.top) / view.scale,
      ];
    },
    /** Converts image coordinates to CSS pixels on the stage. */
    place: ([x, y]) => [
      (view.left + x * view.scale) / ratio(),
      (view.top + y * view.scale) / ratio(),
    ],
    /** Returns the number of CSS pixels per image pixel. */
    cssScale: () => view.scale / ratio(),
    /** Zooms by a factor; the point [x, y] of the stage, in CSS pixels, does not move. */
    zoom(factor, [x, y] = [stage.clientWidth / 2, stage.clientHeight / 2]) {
      if (!levels.length) return;
      const smallest = Math.min(fitScale() / 2, 1);
      const scale = Math.min(MAX_SCALE, Math.max(smallest, view.scale * factor));
      const [px, py] = [x * ratio(), y * ratio()];
      view.left = px - ((px - view.left) * scale) / view.scale;
      view.top = py - ((py - view.top) * scale) / view.scale;
      view.scale = scale;
      drawAll();
    },
    /** Pans the view by CSS pixels. */
    pan(dx, dy) {
      view.left += dx * ratio();
      view.top += dy * ratio();
      drawAll();
    },
  };
}

/**
 * Returns lookup tables from class id to canvas pixel, one per kind of stripe. Suggestions are
 * striped, and so are black classes, since black over an image would only darken it.
 */
function colorTables(classes) {
  const [painted, suggested] = [new Uint32Array(512), new Uint32Array(512)];
  const pixel = (rgb, alpha) => new Uint32Array(Uint8Array.from([...rgb, alpha]).buffer)[0];
  for (const { id, color } of classes) {
    const rgb = toRgb(color);
    const black = isBlack(color);
    painted[id] = pixel(rgb, 255);
    painted[256 + id] = black ? pixel([90, 90, 90], 255) : painted[id];
    suggested[id] = pixel(rgb, SUGGESTED_ALPHA);
    suggested[256 + id] = pixel(black ? [90, 90, 90] : rgb, SUGGESTED_ALPHA / 2);
  }
  return { painted, suggested };
}
