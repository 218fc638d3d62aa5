// The panels beside the stage: images, classes, the model's score, and the dialogs.

import { percent } from "./labels.js";
import { element, swatch } from "./legend.js";
import { TOOLS } from "./tools.js";

const find = (id) => document.getElementById(id);

/** Lists the images. Returns functions that show their states and their order. */
export function createImageList(images, onChoose) {
  const list = find("images");
  const items = images.map(({ name }, k) => {
    const item = element("li", {});
    const button = element("button", { type: "button", title: name });
    const image = element("img", { src: `images/${k}/thumbnail`, alt: "", loading: "lazy" });
    const title = element("span", { className: "name", textContent: name });
    const state = element("span", { className: "state" });
    button.append(image, title, state);
    button.addEventListener("click", () => onChoose(k));
    item.append(button);
    return { item, button, state };
  });
  let order = images.map((_, k) => k);
  // The open image keeps its rank, and so its position, while a person paints it.
  const ranks = [];
  let shown = -1;
  list.append(...items.map(({ item }) => item));
  return {
    order: () => order,
    update(states, priorities, byPriority) {
      items.forEach(({ button, state }, k) => {
        button.dataset.state = state.textContent = states[k];
        if (k !== shown || !(k in ranks)) ranks[k] = states[k] === "done" ? -2 : priorities[k];
      });
      const sorted = images.map((_, k) => k);
      if (byPriority) sorted.sort((a, b) => ranks[b] - ranks[a] || a - b);
      if (sorted.every((k, place) => k === order[place])) return;
      order = sorted;
      // Keep the focus on its button.
      const focused = document.activeElement;
      list.append(...order.map((k) => items[k].item));
      focused?.focus();
    },
    setCurrent(current) {
      shown = current;
      items.forEach(({ button }, k) => button.setAttribute("aria-current", k === current));
      items[current]?.item.scrollIntoView({ block: "nearest", inline: "nearest" });
    },
  };
}

/** Lists the classes; a click or a digit chooses one. */
export function createClasses() {
  const list = find("classes");
  let classes = [];
  let current = 0;
  let rows = [];
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose((current + step + classes.length) % classes.length);
    rows[current].focus();
  });

  function choose(id) {
    if (!classes[id]) return;
    current = id;
    rows.forEach((row, k) => {
      row.setAttribute("aria-checked", k === id);
      row.tabIndex = k === id ? 0 : -1;
    });
    rows[id]?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  return {
    current: () => current,
    choose,
    use(newClasses) {
      classes = newClasses;
      rows = classes.map(({ id, name, color }) => {
        const row = element("button", { type: "button", role: "radio" });
        row.append(swatch(color), element("span", { className: "name", textContent: name }));
        if (id < 9) row.append(element("kbd", { textContent: id + 1 }));
        row.addEventListener("click", () => choose(id));
        return row;
      });
      list.replaceChildren(...rows);
      choose(Math.min(current, classes.length - 1));
    },
  };
}

/** Asks for the names and colours of the classes. Resolves to a list, or to null if cancelled. */
export function askClasses(classes) {
  const [dialog, list, form] = ["classes-dialog", "class-rows", "classes-form"].map(find);
  find("classes-dialog-title").textContent = classes.length ? "Classes" : "Define the classes";

  function addRow(name, color) {
    const item = element("li", {});
    const label = `Class ${list.children.length + 1}`;
    const ariaLabel = `Colour of ${label}`;
    const picker = element("input", { type: "color", value: color, ariaLabel });
    const input = element("input", { type: "text", value: name, ariaLabel: label, maxLength: 200 });
    input.placeholder = ["background", "road", "car"][list.children.length] ?? "another class";
    item.append(picker, input);
    list.append(item);
    return input;
  }

  list.replaceChildren();
  for (const { name, color } of classes) addRow(name, color);
  while (list.children.length < 2) addRow("", nextColor(list.children.length));
  find("add-class").onclick = () => addRow("", nextColor(list.children.length)).focus();
  dialog.showModal();
  list.querySelector("input[type=text]").focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      const rows = [...list.children].map((item) => {
        const [color, name] = item.querySelectorAll("input");
        return { name: name.value.trim(), color: color.value };
      });
      dialog.close();
      // Existing classes keep their position and need a name; new rows without one are dropped.
      resolve(rows.filter(({ name }, k) => name || k < classes.length));
    };
    dialog.oncancel = (event) => {
      if (!classes.length) event.preventDefault();
      else resolve(null);
    };
  });
}

/** Returns a colour that differs clearly from the previous ones: hues are a golden angle apart. */
function nextColor(k) {
  const hue = ((0.402 + k * 0.618034) % 1) * 6;
  const channel = (n) => {
    const x = (n + hue) % 6;
    return Math.round(255 * (0.9 - 0.75 * Math.max(0, Math.min(x, 4 - x, 1))));
  };
  return `#${[5, 3, 1].map((n) => channel(n).toString(16).padStart(2, "0")).join("")}`;
}

/** Shows the tools. */
export function createToolbar(onChoose) {
  const bar = find("tools");
  const buttons = TOOLS.map(({ id, key, name, hint, drawing }) => {
    const button = element("button", { type: "button", title: `${hint} (${key.toUpperCase()})` });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", drawing);
    svg.append(path);
    button.append(svg, name);
    button.dataset.tool = id;
    button.addEventListener("click", () => onChoose(id));
    return button;
  });
  bar.replaceChildren(...buttons);
  return {
    setCurrent(tool) {
      for (const button of buttons) {
        button.setAttribute("aria-pressed", button.dataset.tool === tool);
      }
    },
  };
}

/** Shows what the model is doing, and its score. */
export function showModel(state) {
  const { phase, step, steps, round, error, waits_for: waitsFor, curve } = state;
  const isTraining = phase === "training";
  const done = round ? `Suggestions are from round ${round}.` : "";
  const texts = {
    training: steps ? `Training round: step ${step} of ${steps}.` : "Starting a round.",
    ranking: "Ranking the images.",
  };
  find("round").textContent = error || texts[phase] || waitsFor || done || "The model is ready.";
  find("round-progress").hidden = !isTraining;
  find("round-progress").value = steps ? step / steps : 0;
  find("round-now").hidden = isTraining || !waitsFor.includes("waits for");
  const hasModel = round !== null;
  for (const id of ["accept-all", "accept-class"]) find(id).disabled = !hasModel;
  const known = curve.filter((value) => value !== null);
  find("score").hidden = !known.length;
  if (!known.length) return;
  const [latest, count] = [percent(known.at(-1)), known.length];
  const what = count === 1 ? "one image" : `the last ${Math.min(10, count)} images`;
  find("score-text").textContent =
    `Mean IoU ${latest} on ${what}, before the model was trained on them.`;
  const x = (k) => (known.length > 1 ? (240 * k) / (known.length - 1) : 0);
  const points = known.map((value, k) => `${x(k).toFixed(1)},${(70 - 68 * value).toFixed(1)}`);
  if (points.length === 1) points.push(points[0].replace(/^0\.0/, "240"));
  find("curve-line").setAttribute("points", points.join(" "));
}

/** Shows the progress of the final training. */
export function showTraining(training) {
  find("training").hidden = !training;
  find("train").textContent = training?.running ? "Stop training" : "Train final model";
  if (!training) return;
  find("training-progress").value = training.share;
  find("training-line").textContent = training.line;
  find("report").hidden = !training.report;
}

/** Lists the shortcuts in the help dialog. */
export function fillHelp() {
  const rows = [
    ...TOOLS.map(({ key, name, hint }) => [key.toUpperCase(), `${name}. ${hint}`]),
    ["1 to 9", "Choose a class"],
    ["[ and ], wheel", "Change the brush size"],
    ["Ctrl and wheel, + and -", "Zoom; 0 fits the whole image"],
    ["Space and drag", "Pan"],
    ["Ctrl+Z, Ctrl+Y", "Undo and redo"],
    ["A", "Accept the whole suggestion"],
    ["V", "Hide or show the suggestion"],
    ["D", "Mark the image as done and open the next one"],
    ["J and K", "Next and previous image"],
    ["Arrow keys", "Move the crosshair; Enter applies the tool there"],
    ["Two fingers", "Zoom and pan"],
  ];
  find("keys").replaceChildren(
    ...rows.flatMap(([key, text]) => {
      const term = element("dt", {});
      term.append(element("kbd", { textContent: key }));
      return [term, element("dd", { textContent: text })];
    }),
  );
}
