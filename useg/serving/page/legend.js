// The classes in the picture with their shares; each can be hidden, or shown alone.

import { percent } from "./labels.js";

export function createLegend(onChange) {
  const [list, all, absent] = ["legend", "all", "absent"].map((id) => document.getElementById(id));
  let classes = [];
  let shown = new Set();

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
    /** Lists the classes of a picture, the largest first. */
    fill(counts) {
      const total = counts.reduce((sum, count) => sum + count, 0);
      const present = classes.filter(({ id }) => counts[id]).sort((a, b) => counts[b.id] - counts[a.id]);
      list.replaceChildren(...present.map((each) => row(each, counts[each.id] / total, shown.has(each.id))));
      const missing = classes.filter(({ id }) => !counts[id]);
      absent.hidden = !missing.length;
      absent.textContent = `Not in this picture: ${missing.map(({ name }) => name).join(", ")}.`;
      all.hidden = shown.size === classes.length;
    },
  };
}

function row({ id, name, color }, share, pressed) {
  const item = document.createElement("li");
  const toggle = element("button", { type: "button", value: id, className: "toggle" });
  toggle.setAttribute("aria-pressed", pressed);
  const bar = element("i", { className: "bar" });
  bar.style.setProperty("--share", share);
  toggle.append(swatch(color), element("span", { className: "name", textContent: name }), element("span", { className: "share", textContent: percent(share) }), bar);
  const only = element("button", { type: "button", value: id, className: "only", textContent: "only", ariaLabel: `Show only ${name}` });
  item.append(toggle, only);
  return item;
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
