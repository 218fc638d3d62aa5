// The image with its label map, and the class and confidence at the pointer or the crosshair.

import { paint, percent, resizeCanvas } from "./labels.js";
import { setSwatch } from "./legend.js";

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// An image with fewer pixels on its longest side is shown with square pixels.
const SMALL = 400;

/** `pick(x, y)` is called with the pixel of the label map that is clicked or has the crosshair. */
export function createViewer(announce, pick) {
  const find = (id) => document.getElementById(id);
  const [viewer, frame, image, colors] = ["viewer", "frame", "image", "colors"].map(find);
  const [divider, crosshair, tip, outline] = ["divider", "crosshair", "tip", "outline"].map(find);
  let prediction = null;
  let tables = null;
  let classes = [];
  // The crosshair's pixel [x, y].
  let position = null;
  // The tip's [share of the width, share of the height, canvas].
  let tipPosition = null;

  const isSideBySide = () => viewer.dataset.view === "side";

  function setAspectRatio(width, height) {
    viewer.style.setProperty("--ratio", width / height);
    viewer.classList.toggle("small", Math.max(width, height) < SMALL);
  }

  function drawImage(source, width, height) {
    resizeCanvas(image, width, height);
    image.getContext("2d").drawImage(source, 0, 0, width, height);
    setAspectRatio(width, height);
  }

  function paintLabels() {
    if (prediction) paint(colors, prediction, isSideBySide() ? tables.exact : tables.overlay);
  }

  /** Shows the tip at a pixel, placed on `canvas`, and returns its text. */
  function showTip(x, y, canvas) {
    const k = y * prediction.width + x;
    // An id that no class has: the image has no data there.
    const { name, color } = classes[prediction.ids[k]] ?? { name: "no data", color: "#ffffff" };
    const confidence = percent(prediction.confidence[k] / 255);
    tipPosition = [(x + 0.5) / prediction.width, (y + 0.5) / prediction.height, canvas];
    const [inner, outer] = [canvas.getBoundingClientRect(), frame.getBoundingClientRect()];
    const left = inner.left - outer.left + tipPosition[0] * inner.width;
    const top = inner.top - outer.top + tipPosition[1] * inner.height;
    tip.hidden = false;
    tip.classList.toggle("flip", left > outer.width * 0.6);
    tip.classList.toggle("below", top < 56);
    for (const mark of [tip, crosshair]) {
      mark.style.setProperty("--x", `${left}px`);
      mark.style.setProperty("--y", `${top}px`);
    }
    setSwatch(tip.querySelector("i"), color);
    tip.querySelector("span").textContent = `${name} · ${confidence}`;
    return `${name}, ${confidence}`;
  }

  /** Returns [x, y, canvas] of the pixel at a share of a canvas's width and height. */
  function pixelAt(u, v, canvas) {
    return [Math.floor(u * prediction.width), Math.floor(v * prediction.height), canvas];
  }

  function pixelUnderPointer(event) {
    const isOnImage = isSideBySide() && event.clientX < colors.getBoundingClientRect().left;
    const canvas = isOnImage ? image : colors;
    const box = canvas.getBoundingClientRect();
    const u = (event.clientX - box.left) / box.width;
    const v = (event.clientY - box.top) / box.height;
    if (u < 0 || v < 0 || u >= 1 || v >= 1) return null;
    return pixelAt(u, v, canvas);
  }

  function onPointer(event) {
    const pixel = prediction && pixelUnderPointer(event);
    crosshair.hidden = true;
    if (pixel) showTip(...pixel);
    else tip.hidden = true;
  }

  frame.addEventListener("pointermove", onPointer);
  frame.addEventListener("pointerdown", onPointer);
  frame.addEventListener("click", (event) => {
    const pixel = prediction && event.target !== divider && pixelUnderPointer(event);
    if (pixel) pick(pixel[0], pixel[1]);
  });
  frame.addEventListener("pointerleave", () => (tip.hidden = true));
  frame.addEventListener("blur", () => (tip.hidden = crosshair.hidden = true));
  frame.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && position && event.target === frame) pick(...position);
    const step = STEPS[event.key];
    if (!step || !prediction || event.target !== frame) return;
    event.preventDefault();
    const { width, height } = prediction;
    const size = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 50));
    position ??= [width >> 1, height >> 1];
    position = [
      clamp(position[0] + size * step[0], width),
      clamp(position[1] + size * step[1], height),
    ];
    crosshair.hidden = false;
    announce(showTip(...position, colors));
  });
  divider.addEventListener("input", () =>
    viewer.style.setProperty("--divider", `${divider.value}%`),
  );

  return {
    /**
     * Shows an image without a label map. `source` is anything that a canvas can draw, or null for
     * a file that the browser cannot decode.
     */
    show(source, width, height) {
      prediction = position = null;
      tip.hidden = crosshair.hidden = outline.hidden = true;
      for (const canvas of [image, colors]) Object.assign(canvas, { width, height });
      if (source) drawImage(source, width, height);
      setAspectRatio(width, height);
    },
    /** Shows the next frame of a video. The label map stays until the next setPrediction. */
    drawFrame: drawImage,
    /** Shows a label map over the image. It may be smaller than the image. */
    setPrediction(newPrediction, newTables, newClasses) {
      const { width, height } = newPrediction;
      if (width !== prediction?.width || height !== prediction?.height) {
        position = null;
        crosshair.hidden = true;
      }
      [prediction, tables, classes] = [newPrediction, newTables, newClasses];
      paintLabels();
      if (!tip.hidden) showTip(...pixelAt(...tipPosition));
    },
    /** Outlines the pixels that have this number of `numbers`, `width` to a row; 0 for none. */
    outline(number, numbers = [], width = 1) {
      outline.hidden = !number;
      if (!number) return;
      Object.assign(outline, { width, height: numbers.length / width });
      const context = outline.getContext("2d");
      context.fillStyle = "#fff";
      const has = (x, y) => x >= 0 && x < width && numbers[y * width + x] === number;
      numbers.forEach((own, k) => {
        if (own !== number) return;
        const [x, y] = [k % width, Math.floor(k / width)];
        const isInner = has(x - 1, y) && has(x + 1, y) && has(x, y - 1) && has(x, y + 1);
        if (!isInner) context.fillRect(x, y, 1, 1);
      });
    },
    setColors(newTables) {
      tables = newTables;
      paintLabels();
    },
    setView(name) {
      viewer.dataset.view = name;
      paintLabels();
    },
    setOpacity(share) {
      viewer.style.setProperty("--opacity", share);
    },
    /** Copies the image on view, so that it can be shown again. */
    copyImage() {
      const copy = new OffscreenCanvas(image.width, image.height);
      copy.getContext("2d").drawImage(image, 0, 0);
      return copy;
    },
    /** Draws the overlay into one image file, whatever the view. */
    overlayImage(opacity) {
      const layer = new OffscreenCanvas(1, 1);
      paint(layer, prediction, tables.overlay);
      const canvas = new OffscreenCanvas(image.width, image.height);
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(image, 0, 0);
      context.globalAlpha = opacity;
      context.drawImage(layer, 0, 0, canvas.width, canvas.height);
      return canvas.convertToBlob({ type: "image/png" });
    },
  };
}

function clamp(value, length) {
  return Math.min(Math.max(value, 0), length - 1);
}
