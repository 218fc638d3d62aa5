// The picture, the label map over it, and what is under the pointer or the cross.

import { paint, percent, resizeCanvas } from "./labels.js";

export function createStage(announce) {
  const [stage, frame, picture, colors, split, cross, tip] = ["stage", "frame", "picture", "colors", "split", "cross", "tip"].map((id) =>
    document.getElementById(id),
  );
  let prediction = null;
  let classes = [];
  let place = null; // of the cross, in pixels
  let pointed = null; // what the tip is at: how far across, how far down, on which canvas

  function shape(width, height) {
    stage.style.setProperty("--ratio", width / height);
    stage.classList.toggle("small", Math.max(width, height) < 400);
  }

  function read(x, y) {
    const k = y * prediction.width + x;
    const { name, color } = classes[prediction.ids[k]];
    return { name, color, sure: percent(prediction.confidence[k] / 255) };
  }

  /** Shows a label at a pixel: `canvas` is the one whose coordinates are meant. */
  function point(x, y, canvas) {
    const { name, color, sure } = read(x, y);
    pointed = [(x + 0.5) / prediction.width, (y + 0.5) / prediction.height, canvas];
    const [at, around] = [canvas.getBoundingClientRect(), frame.getBoundingClientRect()];
    const left = at.left - around.left + pointed[0] * at.width;
    const top = at.top - around.top + pointed[1] * at.height;
    tip.hidden = false;
    tip.classList.toggle("flip", left > around.width * 0.6);
    tip.classList.toggle("below", top < 56);
    tip.style.setProperty("--x", `${left}px`);
    tip.style.setProperty("--y", `${top}px`);
    tip.querySelector("i").style.background = color;
    tip.querySelector("span").textContent = `${name} · ${sure}`;
    cross.style.setProperty("--x", `${left}px`);
    cross.style.setProperty("--y", `${top}px`);
    return `${name}, ${sure}`;
  }

  function under(event) {
    const canvas = stage.dataset.view === "side" && event.clientX < colors.getBoundingClientRect().left ? picture : colors;
    const box = canvas.getBoundingClientRect();
    const [u, v] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (u < 0 || v < 0 || u >= 1 || v >= 1) return null;
    return pixel(u, v, canvas);
  }

  function pixel(u, v, canvas) {
    return [Math.floor(u * prediction.width), Math.floor(v * prediction.height), canvas];
  }

  function follow(event) {
    const found = prediction && under(event);
    cross.hidden = true;
    if (found) point(...found);
    else tip.hidden = true;
  }

  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("pointerleave", () => (tip.hidden = true));
  frame.addEventListener("blur", () => (tip.hidden = cross.hidden = true));
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move || !prediction || event.target !== frame) return;
    event.preventDefault();
    const { width, height } = prediction;
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 50));
    place ??= [width >> 1, height >> 1];
    place = [clamp(place[0] + step * move[0], width), clamp(place[1] + step * move[1], height)];
    cross.hidden = false;
    announce(point(...place, colors));
  });
  split.addEventListener("input", () => stage.style.setProperty("--split", `${split.value}%`));

  return {
    /** Shows a picture without a label map. `source` may be drawn on a canvas; null where the browser cannot. */
    show(source, width, height) {
      [prediction, place] = [null, null];
      tip.hidden = cross.hidden = true;
      for (const canvas of [picture, colors]) Object.assign(canvas, { width, height });
      if (source) this.draw(source, width, height);
      shape(width, height);
    },
    /** Shows the next of pictures that move; the label map on it stays until the next one. */
    draw(source, width, height) {
      resizeCanvas(picture, width, height);
      picture.getContext("2d").drawImage(source, 0, 0, width, height);
      shape(width, height);
    },
    /** Lays a label map over the picture; it may be smaller. */
    label(found, table, known) {
      if (found.width !== prediction?.width || found.height !== prediction?.height) [place, cross.hidden] = [null, true];
      [prediction, classes] = [found, known];
      paint(colors, found, table);
      if (!tip.hidden) point(...pixel(...pointed));
    },
    recolor(table) {
      if (prediction) paint(colors, prediction, table);
    },
    view(name) {
      stage.dataset.view = name;
    },
    opacity(share) {
      stage.style.setProperty("--opacity", share);
    },
    /** Draws picture and label map into one canvas. */
    merged(opacity) {
      const canvas = new OffscreenCanvas(picture.width, picture.height);
      const context = canvas.getContext("2d");
      context.drawImage(picture, 0, 0);
      context.globalAlpha = opacity;
      context.drawImage(colors, 0, 0, canvas.width, canvas.height);
      return canvas.convertToBlob({ type: "image/png" });
    },
  };
}

function clamp(value, length) {
  return Math.min(Math.max(value, 0), length - 1);
}
