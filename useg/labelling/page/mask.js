// The mask of an image in the browser: paints rows, undoes strokes, and saves changes.

import { paintMask } from "./server.js";

export const UNPAINTED = 255;
// Undo stores changed cells of this size, so that a long stroke needs little memory.
const CELL = 128;
const RETRY_MILLISECONDS = 1000;

export class Mask {
  /** Calls `onChange(box)` after each change of pixels, and `onSaved(mask, answer | error | null)`
   *  when saving starts, after each response, and when everything is saved. */
  constructor(k, width, height, { ids, revision }, onChange, onSaved) {
    Object.assign(this, { k, width, height, ids, revision, onChange, onSaved });
    // The mask after the last stroke.
    this.before = ids.slice();
    this.cells = new Set();
    this.undoable = [];
    this.undone = [];
    this.unsaved = null;
    this.isSaving = false;
    this.keepsPainted = false;
  }

  /** Paints columns from..to-1 of a row; parts outside the image are ignored. */
  paint(y, from, to, id) {
    if (y < 0 || y >= this.height) return;
    from = Math.max(0, from);
    to = Math.min(this.width, to);
    if (from >= to) return;
    const [start, end] = [y * this.width + from, y * this.width + to];
    if (this.keepsPainted && id !== UNPAINTED) {
      for (let k = start; k < end; k++) if (this.ids[k] === UNPAINTED) this.ids[k] = id;
    } else {
      this.ids.fill(id, start, end);
    }
    this.#note(y, from, to);
  }

  /** Paints one pixel if it is unpainted. */
  paintRest(index, id) {
    if (this.ids[index] !== UNPAINTED || id === UNPAINTED) return;
    this.ids[index] = id;
    const y = Math.floor(index / this.width);
    this.#note(y, index - y * this.width, index - y * this.width + 1);
  }

  #note(y, from, to) {
    const row = Math.floor(y / CELL) * 65536;
    const last = Math.floor((to - 1) / CELL);
    for (let column = Math.floor(from / CELL); column <= last; column++) {
      this.cells.add(row + column);
    }
    this.box = include(this.box, from, y, to, y + 1);
  }

  /** Shows and saves the pixels painted since the last call. */
  flush() {
    if (!this.box) return;
    const box = this.box;
    this.box = null;
    this.unsaved = include(this.unsaved, box.left, box.top, box.right, box.bottom);
    this.onChange(box);
    this.#save();
  }

  /** Ends a stroke: it becomes one step of undo. */
  endStroke() {
    this.flush();
    const changes = [];
    for (const cell of this.cells) {
      const box = this.#cellBox(cell);
      const [old, now] = [encode(this.before, this.width, box), encode(this.ids, this.width, box)];
      copy(this.ids, this.before, this.width, box);
      if (!equal(old, now)) changes.push({ box, old, now });
    }
    this.cells.clear();
    if (!changes.length) return;
    this.undoable.push(changes);
    this.undone = [];
  }

  /** Reverts the pixels painted since the last stroke. */
  cancelStroke() {
    for (const cell of this.cells) {
      const box = this.#cellBox(cell);
      copy(this.before, this.ids, this.width, box);
      this.box = include(this.box, box.left, box.top, box.right, box.bottom);
    }
    this.cells.clear();
    this.flush();
  }

  undo() {
    this.#apply(this.undoable, this.undone, "old");
  }

  redo() {
    this.#apply(this.undone, this.undoable, "now");
  }

  #apply(from, to, which) {
    this.endStroke();
    const changes = from.pop();
    if (!changes) return;
    for (const change of changes) {
      decode(change[which], this.ids, this.width, change.box);
      copy(this.ids, this.before, this.width, change.box);
      const { left, top, right, bottom } = change.box;
      this.box = include(this.box, left, top, right, bottom);
    }
    to.push(changes);
    this.flush();
  }

  #cellBox(cell) {
    const [row, column] = [Math.floor(cell / 65536), cell % 65536];
    const [left, top] = [column * CELL, row * CELL];
    const right = Math.min(this.width, left + CELL);
    return { left, top, right, bottom: Math.min(this.height, top + CELL) };
  }

  /** Sends one request at a time; pixels painted meanwhile go into the next one. */
  async #save() {
    if (this.isSaving) return;
    this.isSaving = true;
    this.onSaved(this, null);
    while (this.unsaved) {
      const box = this.unsaved;
      this.unsaved = null;
      const [width, height] = [box.right - box.left, box.bottom - box.top];
      const body = new Uint8Array(width * height);
      for (let y = 0; y < height; y++) {
        const start = (box.top + y) * this.width + box.left;
        body.set(this.ids.subarray(start, start + width), y * width);
      }
      const place = { x: box.left, y: box.top, width, height };
      try {
        const answer = await paintMask(this.k, place, body, this.revision);
        this.revision = answer.revision;
        this.onSaved(this, answer);
      } catch (error) {
        this.unsaved = include(this.unsaved, box.left, box.top, box.right, box.bottom);
        this.onSaved(this, error);
        if (error.status) break;
        await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
      }
    }
    this.isSaving = false;
    this.onSaved(this, null);
  }

  /** Saves refused changes again, after this browser has taken over. */
  retry() {
    this.#save();
  }

  get isSaved() {
    return !this.unsaved && !this.isSaving && !this.box;
  }
}

export function include(box, left, top, right, bottom) {
  if (!box) return { left, top, right, bottom };
  return {
    left: Math.min(box.left, left),
    top: Math.min(box.top, top),
    right: Math.max(box.right, right),
    bottom: Math.max(box.bottom, bottom),
  };
}

function copy(from, to, width, { left, top, right, bottom }) {
  for (let y = top; y < bottom; y++) {
    to.set(from.subarray(y * width + left, y * width + right), y * width + left);
  }
}

/** Returns the runs of equal ids in a box: id, length, id, length, ... */
function encode(ids, width, { left, top, right, bottom }) {
  const runs = [];
  let [last, length] = [-1, 0];
  for (let y = top; y < bottom; y++) {
    for (let k = y * width + left; k < y * width + right; k++) {
      if (ids[k] === last) {
        length++;
        continue;
      }
      if (length) runs.push(last, length);
      [last, length] = [ids[k], 1];
    }
  }
  runs.push(last, length);
  return Uint16Array.from(runs);
}

function decode(runs, ids, width, { left, top, right, bottom }) {
  let [run, length] = [0, runs[1]];
  for (let y = top; y < bottom; y++) {
    for (let k = y * width + left; k < y * width + right; k++) {
      while (!length) {
        run += 2;
        length = runs[run + 1];
      }
      ids[k] = runs[run];
      length--;
    }
  }
}

function equal(one, other) {
  return one.length === other.length && one.every((value, k) => value === other[k]);
}
