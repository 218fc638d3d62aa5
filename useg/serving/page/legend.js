// The classes in the picture with their shares; each can be hidden, or shown alone.

import { percent } from "./labels.js";

export function createLegend(onChange) {
  const [list, all, absent] = ["legend", "all", "absent"].map((id) => document.getElementById(id));
  let classes = [];
  let shown = new Set();
  const rows = new Map(); // class id -> its row

  function choose(ids) {
    shown = new Set(ids);
    for (const button of list.querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", shown.has(Number(button.value)));
    all.hidden = shown.size === classes.length;
    onChange(shown);
  }

  all.addEventListener("click", () => choose(classes.map(({ id }) => id)));
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const id = Number(button.value);
    if (button.classList.contains("only")) choose([id]);
    else choose(shown.has(id) ? [...shown].filter((other) => other !== id) : [...shown, id]);
  });

  return {
    shown: () => shown,
    /** Takes the classes of a model; all are shown. */
    use(known) {
      classes = known;
      shown = new Set(classes.map(({ id }) => id));
    },
    /** Lists the classes of a picture, the largest first; while pictures move, rows stay where they are, so that they can be clicked. */
    fill(counts, moving = false) {
      const total = counts.reduce((sum, count) => sum + count, 0);
      const present = classes.filter(({ id }) => counts[id]).sort((a, b) => counts[b.id] - counts[a.id]);
      if (!moving) rows.clear();
      for (const each of present) if (!rows.has(each.id)) rows.set(each.id, row(each, shown.has(each.id)));
      for (const [id, { update }] of rows) update(counts[id] / total);
      const items = [...rows.values()].map(({ item }) => item);
      if (!moving) list.replaceChildren(...items);
      else if (items.length > list.children.length) list.append(...items.slice(list.children.length));
      const missing = classes.filter(({ id }) => !rows.has(id));
      absent.hidden = !missing.length;
      absent.textContent = `Not in this picture: ${missing.map(({ name }) => name).join(", ")}.`;
      all.hidden = shown.size === classes.length;
    },
  };
}

/** Returns a class's row, and how to tell it the class's share. */
function row({ id, name, color }, pressed) {
  const item = document.createElement("li");
  const toggle = element("button", { type: "button", value: id, className: "toggle" });
  toggle.setAttribute("aria-pressed", pressed);
  const [share, bar] = [element("span", { className: "share" }), element("i", { className: "bar" })];
  toggle.append(swatch(color), element("span", { className: "name", textContent: name }), share, bar);
  item.append(toggle, element("button", { type: "button", value: id, className: "only", textContent: "only", ariaLabel: `Show only ${name}` }));
  const update = (part) => {
    share.textContent = percent(part);
    bar.style.setProperty("--share", part);
  };
  return { item, update };
}

/** Returns a patch of a class's colour. */
export function swatch(color) {
  const patch = element("i", { className: "swatch" });
  patch.style.background = color;
  return patch;
}

export function element(kind, properties) {
  return Object.assign(document.createElement(kind), properties);
}
