// Controls of an evaluation's page: the image viewer and the order of all images.

document.documentElement.classList.add("js");

// Canvas pixels (red, green, blue, alpha).
const WRONG = [255, 176, 0, 255];
const FALSE_POSITIVE = [226, 92, 190, 255];
const IGNORED = [126, 131, 140, 190];
const DARK_DIM = [20, 23, 29, 165];
const LIGHT_DIM = [240, 242, 246, 190];
// The alpha of a class's colour where it is predicted correctly, among the errors of that class.
const CORRECT_ALPHA = 150;
// The id of ignored pixels, and the value of the class filter that shows all classes.
const IGNORE = 255;
const ALL = -1;
// Brightest channel of a class colour that is too dark to stand out from DARK_DIM.
const DARKEST = 110;
// Brightest channel of a class colour that counts as black, as in Python's overlays.
const BLACKEST = 24;

const percent = (value) => (value === undefined ? "–" : (100 * value).toFixed(1));

function element(tag, text, parent) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function swatch(color, parent) {
  const made = element("i", "", parent);
  made.className = "swatch";
  made.style.background = `rgb(${color.slice(0, 3)})`;
}

/** Dims what is not of a class: light around a dark class, which would not stand out from dark. */
function dimFor(classes, focus) {
  return focus !== ALL && Math.max(...classes[focus].color) < DARKEST ? LIGHT_DIM : DARK_DIM;
}

/** Each painter returns the canvas pixel for a true class, a predicted class and the filter. */
function createPainters(classes) {
  const dim = (focus) => dimFor(classes, focus);
  const only = (id, focus) => {
    if (id === IGNORE) return IGNORED;
    return focus === ALL || id === focus ? classes[id].color : dim(focus);
  };
  const errors = (truth, predicted, focus) => {
    if (truth === IGNORE) return IGNORED;
    if (focus === ALL) return truth === predicted ? DARK_DIM : WRONG;
    if (truth === focus) return predicted === focus ? correctPixel(classes[focus].color) : WRONG;
    return predicted === focus ? FALSE_POSITIVE : dim(focus);
  };
  return {
    truth: (truth, predicted, focus) => only(truth, focus),
    prediction: (truth, predicted, focus) => only(predicted, focus),
    errors,
  };
}

function correctPixel(color) {
  return [...color, CORRECT_ALPHA];
}

/** A translucent layer leaves black classes out, because black only darkens the image. */
function isBlack([red, green, blue, alpha]) {
  return alpha === undefined && Math.max(red, green, blue) <= BLACKEST;
}

function toPixel([red, green, blue, alpha = 255]) {
  return new Uint32Array(Uint8Array.of(red, green, blue, alpha).buffer)[0];
}

/** Returns [color, text] of what the layer of errors shows. */
function errorKeys(classes, focus) {
  if (focus === ALL)
    return [
      [WRONG, "wrong"],
      [DARK_DIM, "correct"],
      [IGNORED, "ignored"],
    ];
  const { name, color } = classes[focus];
  return [
    [color, "correct"],
    [WRONG, "missed"],
    [FALSE_POSITIVE, `wrongly predicted as ${name}`],
    [dimFor(classes, focus), "elsewhere"],
  ];
}

/**
 * Returns a function from an image to its class ids. Some browsers change colours a little when a
 * canvas is read, so the nearest class colour counts.
 */
function createIdReader(classes) {
  const ids = new Map();

  function nearestId(red, green, blue) {
    const distance = (c) => (red - c[0]) ** 2 + (green - c[1]) ** 2 + (blue - c[2]) ** 2;
    let [best, least] = [IGNORE, distance(IGNORED)];
    classes.forEach(({ color }, k) => {
      const far = distance(color);
      if (far < least || (far === 0 && best === IGNORE)) [best, least] = [k, far];
    });
    return best;
  }

  return (image) => {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const result = new Uint8Array(pixels.length / 4);
    for (let k = 0, last = -1, id = 0; k < result.length; k++) {
      const [red, green, blue] = [pixels[4 * k], pixels[4 * k + 1], pixels[4 * k + 2]];
      const key = (red << 16) | (green << 8) | blue;
      if (key !== last) {
        if (!ids.has(key)) ids.set(key, nearestId(red, green, blue));
        id = ids.get(key);
        last = key;
      }
      result[k] = id;
    }
    return result;
  };
}

function readCases() {
  return [...document.querySelectorAll(".case")].map((article) => ({
    name: article.dataset.name,
    reason: article.dataset.reason,
    iou: article.dataset.iou,
    ious: JSON.parse(article.dataset.ious),
    images: [...article.querySelectorAll("img")],
  }));
}

/** Shows one case at a time, with a layer over the image that a divider cuts off. */
function startViewer(viewer) {
  const classes = JSON.parse(viewer.dataset.classes).map(([name, ...color]) => ({ name, color }));
  const cases = readCases();
  const find = (selector) => viewer.querySelector(selector);
  const [stage, image, canvas] = [".stage", ".stage img", "canvas"].map(find);
  const [divider, filter, strip] = [".stage input", "select", ".filmstrip"].map(find);
  const readout = find(".readout");
  const painters = createPainters(classes);
  const readIds = createIdReader(classes);
  let current, truth, prediction;

  const layer = () => find("[name=layer]:checked").value;
  const focus = () => Number(filter.value);

  /** Explains the layer below the image. */
  function explain() {
    readout.replaceChildren();
    if (layer() !== "errors") {
      readout.textContent =
        "Drag the divider, or use the arrow keys. Point at a pixel to see its classes.";
      return;
    }
    const key = element("span", "", readout);
    key.className = "key";
    for (const [color, text] of errorKeys(classes, focus())) {
      const entry = element("span", "", key);
      swatch(color, entry);
      entry.append(text);
    }
  }

  /** Paints the layer, unless its label maps are still being decoded: show() paints it then. */
  function paint() {
    if (!truth) return;
    const painter = painters[layer()];
    const context = canvas.getContext("2d");
    const data = context.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(data.data.buffer);
    const colors = new Map();
    const isTranslucent = find("[name=mixed]").checked;
    for (let k = 0; k < truth.length; k++) {
      const key = (truth[k] << 8) | prediction[k];
      if (!colors.has(key)) {
        const color = painter(truth[k], prediction[k], focus());
        colors.set(key, isTranslucent && isBlack(color) ? 0 : toPixel(color));
      }
      pixels[k] = colors.get(key);
    }
    context.putImageData(data, 0, 0);
    stage.classList.toggle("mixed", isTranslucent);
    explain();
  }

  /** Lists the classes of the case, lowest IoU first. Each is a button that filters by it. */
  function listClasses() {
    const list = find(".class-list");
    list.replaceChildren();
    const present = Object.keys(current.ious).sort((a, b) => current.ious[a] - current.ious[b]);
    for (const id of present) {
      const button = element("button", "", element("li", "", list));
      button.type = "button";
      swatch(classes[id].color, button);
      element("span", classes[id].name, button);
      element("span", percent(current.ious[id]), button);
      button.setAttribute("aria-pressed", filter.value === id);
      button.onclick = () => {
        filter.value = filter.value === id ? String(ALL) : id;
        applyFilter();
        find(`.class-list li:nth-child(${present.indexOf(id) + 1}) button`)?.focus();
      };
    }
  }

  async function show(index) {
    const chosen = (current = cases[index]);
    const [photo, ...maps] = chosen.images;
    truth = prediction = undefined;
    stage.setAttribute("aria-busy", "true");
    strip.querySelectorAll("input")[index].checked = true;
    find(".panel h3").textContent = chosen.name;
    const reason = chosen.reason ? `${chosen.reason} · ` : "";
    find(".panel p").textContent = `${reason}mean IoU ${chosen.iou}`;
    listClasses();
    await Promise.all(
      chosen.images.map((each) => {
        each.loading = "eager";
        return each.decode().catch(() => {});
      }),
    );
    if (current !== chosen) return;
    [truth, prediction] = maps.slice(0, 2).map(readIds);
    image.src = photo.src;
    image.alt = `${chosen.name} with a layer over it`;
    Object.assign(canvas, { width: maps[0].naturalWidth, height: maps[0].naturalHeight });
    canvas.classList.toggle("small", maps[0].classList.contains("small"));
    stage.style.setProperty("--ratio", canvas.width / canvas.height);
    paint();
    stage.setAttribute("aria-busy", "false");
  }

  /** Hides the cases without the chosen class. */
  function applyFilter() {
    const hasClass = cases.map(({ ious }) => focus() === ALL || filter.value in ious);
    [...strip.children].forEach((label, k) => (label.hidden = !hasClass[k]));
    if (hasClass[cases.indexOf(current)]) {
      listClasses();
      paint();
    } else show(hasClass.indexOf(true));
  }

  function addToStrip({ name, reason, iou, images }, index) {
    const label = element("label", "", strip);
    const radio = element("input", "", label);
    Object.assign(radio, { type: "radio", name: "case", value: index });
    radio.setAttribute("aria-label", `${name}, mean IoU ${iou}`);
    radio.onchange = () => show(index);
    const thumbnail = element("img", "", label);
    Object.assign(thumbnail, { src: images[0].src, alt: "", decoding: "async" });
    element("b", iou, label);
    element("span", reason || name, label).title = name;
  }

  /** Says the true and the predicted class of the pixel under the pointer. */
  function readPixel(event) {
    if (!truth) return;
    const box = stage.getBoundingClientRect();
    const index = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const x = index((event.clientX - box.left) / box.width, canvas.width);
    const y = index((event.clientY - box.top) / box.height, canvas.height);
    const k = y * canvas.width + x;
    const name = (id) => (id === IGNORE ? "ignored" : classes[id].name);
    readout.replaceChildren();
    element("b", name(truth[k]), readout);
    if (truth[k] === IGNORE) return;
    readout.append(truth[k] === prediction[k] ? ", correct" : ", predicted as ");
    if (truth[k] !== prediction[k]) element("b", name(prediction[k]), readout);
  }

  cases.forEach(addToStrip);
  divider.oninput = () => stage.style.setProperty("--divider", `${divider.value}%`);
  stage.onpointermove = readPixel;
  stage.onpointerleave = explain;
  for (const control of viewer.querySelectorAll("[name=layer], [name=mixed]")) {
    control.onchange = paint;
  }
  filter.onchange = applyFilter;
  show(
    Math.max(
      0,
      cases.findIndex(({ reason }) => reason.startsWith("median")),
    ),
  );
}

/** Sorts all images by name or by IoU, of all classes or of one. */
function startAlbum(album, order) {
  const items = [...album.children].map((item) => ({
    item,
    name: item.title,
    iou: Number(item.dataset.iou),
    ious: JSON.parse(item.dataset.ious),
  }));
  const byName = (a, b) => a.name.localeCompare(b.name, "en", { numeric: true });
  const last = (value) => (isNaN(value ?? NaN) ? Infinity : value);

  order.onchange = () => {
    const key = order.value;
    const isClass = !["weakest", "best", "name"].includes(key);
    const value = ({ iou, ious }) => last(key === "best" ? -iou : isClass ? ious[key] : iou);
    const sorted = [...items].sort(key === "name" ? byName : (a, b) => value(a) - value(b));
    for (const { item, iou, ious } of sorted) {
      const shown = key in ious ? ious[key] : iou;
      item.hidden = isClass && !(key in ious);
      item.querySelector("b").textContent = percent(isNaN(shown) ? undefined : shown);
    }
    album.append(...sorted.map(({ item }) => item));
    const numShown = items.filter(({ item }) => !item.hidden).length;
    document.querySelector(".order output").textContent = `${numShown.toLocaleString("en")} images`;
  };
}

const viewer = document.querySelector(".viewer");
if (viewer) startViewer(viewer);
const [album, order] = [".album", ".order select"].map((each) => document.querySelector(each));
if (album && order) startAlbum(album, order);
