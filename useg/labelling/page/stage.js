// The stage: the picture and its mask at any zoom; a stroke redraws only what it changes.

import { isBlack, toRgb } from "./labels.js";
import { include, UNPAINTED } from "./mask.js";

const MAX_SCALE = 64;
// Pictures are shown with square pixels from this scale on.
const SHARP_SCALE = 2;
const SUGGESTED_ALPHA = 120;
// The stripes of suggestions and of black classes, in screen pixels.
const STRIPE = 8;

export function createStage() {
  const find = (id) => document.getElementById(id);
  const [stage, picture, paint] = ["stage", "picture", "paint"].map(find);
  const [pictureContext, paintContext] = [picture, paint].map((canvas) => canvas.getContext("2d"));
  const view = { scale: 1, left: 0, top: 0 };
  // The picture at full size, half, a quarter, ...
  let levels = [];
  let mask = null;
  let suggestion = null;
  let showsSuggestion = true;
  let colors = colorTables([]);
  // What must be drawn: the part of the mask, and whether the picture, too.
  let dirty = null;
  let isPictureDirty = false;
  let isScheduled = false;
  let onView = () => {};

  const ratio = () => window.devicePixelRatio || 1;

  function resize() {
    const [width, height] = [stage.clientWidth, stage.clientHeight].map((length) =>
      Math.max(1, Math.round(length * ratio())),
    );
    if (picture.width === width && picture.height === height) return;
    const isFitted = levels.length && view.scale === fitScale();
    for (const canvas of [picture, paint]) Object.assign(canvas, { width, height });
    if (isFitted) fit();
    else drawAll();
  }

  function fitScale() {
    const [width, height] = [levels[0].width, levels[0].height];
    return Math.min(picture.width / width, picture.height / height, MAX_SCALE);
  }

  function fit() {
    if (!levels.length) return;
    view.scale = fitScale();
    view.left = (picture.width - levels[0].width * view.scale) / 2;
    view.top = (picture.height - levels[0].height * view.scale) / 2;
    drawAll();
  }

  function schedule() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => {
      isScheduled = false;
      if (isPictureDirty) drawPicture();
      isPictureDirty = false;
      const box = dirty;
      dirty = null;
      if (box) drawMask(box);
    });
  }

  function drawAll() {
    isPictureDirty = true;
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

  function drawPicture() {
    pictureContext.clearRect(0, 0, picture.width, picture.height);
    paintContext.clearRect(0, 0, paint.width, paint.height);
    if (!levels.length) return;
    const wanted = Math.max(0, Math.floor(Math.log2(1 / view.scale)));
    const level = levels[Math.min(wanted, levels.length - 1)];
    const shrunk = levels[0].width / level.width;
    // Only the part on view.
    const box = visible();
    const [x, y] = [box.left / shrunk, box.top / shrunk];
    const [width, height] = [(box.right - box.left) / shrunk, (box.bottom - box.top) / shrunk];
    if (width <= 0 || height <= 0) return;
    pictureContext.imageSmoothingEnabled = view.scale < SHARP_SCALE;
    pictureContext.drawImage(
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

  /** Returns the part of the picture that is on the screen, in whole pixels. */
  function visible() {
    const [width, height] = [levels[0].width, levels[0].height];
    return {
      left: Math.max(0, Math.floor(-view.left / view.scale)),
      top: Math.max(0, Math.floor(-view.top / view.scale)),
      right: Math.min(width, Math.ceil((picture.width - view.left) / view.scale)),
      bottom: Math.min(height, Math.ceil((picture.height - view.top) / view.scale)),
    };
  }

  /** Draws the mask and the suggestion in a box of the picture. */
  function drawMask(box) {
    if (!mask) return;
    const { width, height, ids } = mask;
    const onScreen = (start, length, limit, offset) => [
      Math.max(0, Math.floor(offset + start * view.scale) - 1),
      Math.min(limit, Math.ceil(offset + length * view.scale) + 1),
    ];
    const [left, right] = onScreen(box.left, box.right, paint.width, view.left);
    const [top, bottom] = onScreen(box.top, box.bottom, paint.height, view.top);
    if (left >= right || top >= bottom) return;
    const shown = showsSuggestion ? suggestion : null;
    const columns = new Int32Array(right - left);
    const suggestedColumns = new Int32Array(right - left);
    for (let x = left; x < right; x++) {
      const column = Math.floor((x + 0.5 - view.left) / view.scale);
      columns[x - left] = column < 0 || column >= width ? -1 : column;
      if (shown) suggestedColumns[x - left] = Math.floor(((column + 0.5) * shown.width) / width);
    }
    const image = paintContext.createImageData(right - left, bottom - top);
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
          // The edge of a region of which the model is least sure.
          const isEdge = x > left && y > top && (unsure !== before || unsure !== above[x - left]);
          pixels[k] = isEdge ? 0xffffffff : colors.suggested[stripe + shown.ids[place]];
          above[x - left] = before = unsure;
        }
      }
    }
    paintContext.putImageData(image, left, top);
  }

  new ResizeObserver(resize).observe(stage);

  return {
    fit,
    drawPart,
    visible,
    onView: (listener) => (onView = listener),
    scaleInPercent: () => Math.round(100 * view.scale),
    /** Shows a picture, as a bitmap, and its mask. */
    async show(bitmap, newMask) {
      [levels, mask, suggestion] = [[bitmap], newMask, null];
      resize();
      fit();
      for (let last = bitmap; last.width > 2 * picture.width; ) {
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
    /** Returns the place [x, y] of a pointer event in the picture; whole numbers are corners. */
    locate(event) {
      const box = stage.getBoundingClientRect();
      return [
        ((event.clientX - box.left) * ratio() - view.left) / view.scale,
        ((event.clientY - box.top) * ratio() - view.top) / view.scale,
      ];
    },
    /** Returns where a place in the picture is on the stage, in CSS pixels. */
    place: ([x, y]) => [
      (view.left + x * view.scale) / ratio(),
      (view.top + y * view.scale) / ratio(),
    ],
    /** Returns CSS pixels for each pixel of the picture. */
    cssScale: () => view.scale / ratio(),
    /** Zooms by a factor; the point of the stage [x, y], in CSS pixels, stays in place. */
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
    /** Moves the view by CSS pixels. */
    pan(dx, dy) {
      view.left += dx * ratio();
      view.top += dy * ratio();
      drawAll();
    },
  };
}

/**
 * Returns look-up tables from class id to canvas pixel, twice: for the two kinds of stripes. Black
 * classes are striped, since black over a picture only darkens it; so are suggestions.
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
