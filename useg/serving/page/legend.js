// The list of classes with their shares. The user can hide a class or show it alone.

import { isBlack, percent } from "./labels.js";

export function createLegend(onChange) {
  const [list, showAll, absent] = ["legend", "show-all", "absent"].map((id) =>
    document.getElementById(id),
  );
  let classes = [];
  let visible = new Set();
  // class id -> {item, update}
  const rows = new Map();

  function setVisible(ids) {
    visible = new Set(ids);
    for (const button of list.querySelectorAll("[aria-pressed]")) {
      button.setAttribute("aria-pressed", visible.has(Number(button.value)));
    }
    showAll.hidden = visible.size === classes.length;
    onChange(visible);
  }

  showAll.addEventListener("click", () => setVisible(classes.map(({ id }) => id)));
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const id = Number(button.value);
    if (button.classList.contains("only")) setVisible([id]);
    else if (visible.has(id)) setVisible([...visible].filter((other) => other !== id));
    else setVisible([...visible, id]);
  });

  return {
    visible: () => visible,
    /** Takes the classes of a model. All are visible. */
    use(modelClasses) {
      classes = modelClasses;
      visible = new Set(classes.map(({ id }) => id));
    },
    /**
     * Lists the classes of an image, largest first. In live video (`moving`) a row keeps its place,
     * so that the user can click it.
     */
    fill(counts, moving = false) {
      const total = counts.reduce((sum, count) => sum + count, 0);
      const present = classes
        .filter(({ id }) => counts[id])
        .sort((a, b) => counts[b.id] - counts[a.id]);
      if (!moving) rows.clear();
      for (const each of present) {
        if (!rows.has(each.id)) rows.set(each.id, createRow(each, visible.has(each.id)));
      }
      for (const [id, { update }] of rows) update(counts[id] / total);
      const items = [...rows.values()].map(({ item }) => item);
      const numListed = list.children.length;
      if (!moving) list.replaceChildren(...items);
      else if (items.length > numListed) list.append(...items.slice(numListed));
      const missing = classes.filter(({ id }) => !rows.has(id));
      absent.hidden = !missing.length;
      absent.textContent = `Not in this image: ${missing.map(({ name }) => name).join(", ")}.`;
      showAll.hidden = visible.size === classes.length;
    },
  };
}

/** Returns the list item of a class, and a function that updates its share. */
function createRow({ id, name, color }, isVisible) {
  const item = document.createElement("li");
  const toggle = element("button", { type: "button", value: id, className: "toggle" });
  toggle.setAttribute("aria-pressed", isVisible);
  const share = element("span", { className: "share" });
  const bar = element("i", { className: "bar" });
  const label = element("span", { className: "name", textContent: name });
  toggle.append(swatch(color), label, share, bar);
  const only = element("button", {
    type: "button",
    value: id,
    className: "only",
    textContent: "only",
    ariaLabel: `Show only ${name}`,
  });
  item.append(toggle, only);
  const update = (value) => {
    share.textContent = percent(value);
    bar.style.setProperty("--share", value);
  };
  return { item, update };
}

/** Returns a small square of a class's colour. */
export function swatch(color) {
  const square = element("i", { className: "swatch" });
  setSwatch(square, color);
  return square;
}

/** Colours a swatch. A black one is half empty, because the overlay does not paint black. */
export function setSwatch(square, color) {
  square.style.backgroundColor = color;
  square.classList.toggle("black", isBlack(color));
}

export function element(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}
