document.documentElement.classList.add("js");
const [DIM, WRONG, IGNORED, INVENTED] = [[20, 23, 29, 165], [255, 176, 0, 255], [126, 131, 140, 190], [226, 92, 190, 255]];
const percent = value => value === undefined ? "–" : (100 * value).toFixed(1);
const element = (tag, text, into) => { const made = document.createElement(tag); if (text) made.textContent = text; if (into) into.append(made); return made; };
const swatch = (color, into) => { const made = element("i", "", into); made.className = "swatch"; made.style.background = `rgb(${color.slice(0, 3)})`; return made; };

const viewer = document.querySelector(".viewer");
if (viewer) {
  const classes = JSON.parse(viewer.dataset.classes).map(([name, ...color]) => ({ name, color }));
  const cases = [...document.querySelectorAll(".case")].map(article => ({
    name: article.dataset.name, reason: article.dataset.reason, iou: article.dataset.iou, ious: JSON.parse(article.dataset.ious), images: [...article.querySelectorAll("img")],
  }));
  const find = name => viewer.querySelector(name), stage = find(".stage"), base = find(".stage img"), canvas = find("canvas"), wipe = find(".stage input");
  const focus = find("select"), film = find(".film"), readout = find(".readout");
  const nearest = new Map();
  let shown, truth, prediction;

  // Some browsers blur what is read back from a picture a little: the nearest colour counts.
  const idOf = (r, g, b) => {
    const key = r << 16 | g << 8 | b;
    if (!nearest.has(key)) {
      let best = 255, least = (r - IGNORED[0]) ** 2 + (g - IGNORED[1]) ** 2 + (b - IGNORED[2]) ** 2;
      classes.forEach(({ color }, k) => { const far = (r - color[0]) ** 2 + (g - color[1]) ** 2 + (b - color[2]) ** 2; if (far < least || (far === 0 && best === 255)) [best, least] = [k, far]; });
      nearest.set(key, best);
    }
    return nearest.get(key);
  };
  const idsOf = image => {
    const sheet = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight }), brush = sheet.getContext("2d", { willReadFrequently: true });
    brush.drawImage(image, 0, 0);
    const pixels = brush.getImageData(0, 0, sheet.width, sheet.height).data, ids = new Uint8Array(pixels.length / 4);
    for (let k = 0, last = -1, id = 0; k < ids.length; k++) {
      const p = 4 * k, key = pixels[p] << 16 | pixels[p + 1] << 8 | pixels[p + 2];
      if (key !== last) { id = idOf(pixels[p], pixels[p + 1], pixels[p + 2]); last = key; }
      ids[k] = id;
    }
    return ids;
  };
  const painters = {
    truth: (t, p, f) => t === 255 ? IGNORED : f < 0 || t === f ? classes[t].color : DIM,
    prediction: (t, p, f) => p === 255 ? IGNORED : f < 0 || p === f ? classes[p].color : DIM,
    errors: (t, p, f) => t === 255 ? IGNORED : f < 0 ? (t === p ? DIM : WRONG) : t === f ? (p === f ? null : WRONG) : p === f ? INVENTED : DIM,
  };
  const keys = f => f < 0 ? [[WRONG, "wrong"], [DIM, "right"], [IGNORED, "not judged"]] : [[WRONG, "missed"], [INVENTED, `wrongly called ${classes[f].name}`], [DIM, "elsewhere"]];
  const explain = layer => {
    readout.replaceChildren();
    if (layer !== "errors") { readout.textContent = "Drag across the picture, or use the arrow keys. Point at a place to read its classes."; return; }
    const key = element("span", "", readout);
    key.className = "key";
    for (const [color, text] of keys(Number(focus.value))) { const entry = element("span", "", key); swatch(color, entry); entry.append(text); }
  };
  const paint = () => {
    const layer = find("[name=layer]:checked").value, f = Number(focus.value), painter = painters[layer], colors = new Map();
    const brush = canvas.getContext("2d"), sheet = brush.createImageData(canvas.width, canvas.height), words = new Uint32Array(sheet.data.buffer);
    for (let k = 0; k < words.length; k++) {
      const key = truth[k] << 8 | prediction[k];
      if (!colors.has(key)) { const color = painter(truth[k], prediction[k], f); colors.set(key, color ? ((color[3] ?? 255) << 24 | color[2] << 16 | color[1] << 8 | color[0]) >>> 0 : 0); }
      words[k] = colors.get(key);
    }
    brush.putImageData(sheet, 0, 0);
    stage.classList.toggle("mixed", find("[name=mixed]").checked);
    explain(layer);
  };
  const list = () => {
    const here = find(".here");
    here.replaceChildren();
    const present = Object.keys(shown.ious).sort((a, b) => shown.ious[a] - shown.ious[b]);
    for (const k of present) {
      const button = element("button", "", element("li", "", here));
      button.type = "button";
      swatch(classes[k].color, button);
      element("span", classes[k].name, button);
      element("span", percent(shown.ious[k]), button);
      button.setAttribute("aria-pressed", focus.value === k);
      button.onclick = () => { focus.value = focus.value === k ? "-1" : k; filter(); find(`.here li:nth-child(${present.indexOf(k) + 1}) button`)?.focus(); };
    }
  };
  const show = async number => {
    const chosen = shown = cases[number], [image, ...maps] = chosen.images;
    film.querySelectorAll("input")[number].checked = true;
    find(".panel h3").textContent = chosen.name;
    find(".panel p").textContent = `${chosen.reason ? chosen.reason + " · " : ""}mean IoU ${chosen.iou}`;
    list();
    await Promise.all(chosen.images.map(one => (one.loading = "eager", one.decode()).catch(() => {})));
    if (shown !== chosen) return;
    [truth, prediction] = maps.slice(0, 2).map(idsOf);
    base.src = image.src;
    base.alt = `${chosen.name}, with a layer to wipe over it`;
    Object.assign(canvas, { width: maps[0].naturalWidth, height: maps[0].naturalHeight });
    canvas.classList.toggle("small", maps[0].classList.contains("small"));
    stage.style.setProperty("--ratio", canvas.width / canvas.height);
    paint();
  };
  const filter = () => {
    const f = focus.value, labels = [...film.children], fits = cases.map(one => f === "-1" || f in one.ious);
    labels.forEach((label, k) => label.hidden = !fits[k]);
    const now = cases.indexOf(shown);
    if (fits[now]) { list(); paint(); } else show(fits.indexOf(true));
  };
  cases.forEach((one, k) => {
    const label = element("label", "", film), radio = element("input", "", label), image = element("img", "", label);
    Object.assign(radio, { type: "radio", name: "case", value: k });
    radio.setAttribute("aria-label", `${one.name}, mean IoU ${one.iou}`);
    Object.assign(image, { src: one.images[0].src, alt: "", decoding: "async" });
    element("b", one.iou, label);
    element("span", one.reason || one.name, label).title = one.name;
    radio.onchange = () => show(k);
  });
  wipe.oninput = () => stage.style.setProperty("--wipe", `${wipe.value}%`);
  stage.onpointermove = event => {
    if (!truth) return;
    const box = stage.getBoundingClientRect(), at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const k = at((event.clientY - box.top) / box.height, canvas.height) * canvas.width + at((event.clientX - box.left) / box.width, canvas.width);
    const name = id => id === 255 ? "not judged" : classes[id].name;
    readout.replaceChildren();
    element("b", name(truth[k]), readout);
    if (truth[k] === 255) return;
    readout.append(truth[k] === prediction[k] ? ", rightly" : ", called ");
    if (truth[k] !== prediction[k]) element("b", name(prediction[k]), readout);
  };
  stage.onpointerleave = () => explain(find("[name=layer]:checked").value);
  for (const control of viewer.querySelectorAll("[name=layer], [name=mixed]")) control.onchange = paint;
  focus.onchange = filter;
  show(Math.max(0, cases.findIndex(one => one.reason.startsWith("median"))));
}

const album = document.querySelector(".album"), order = document.querySelector(".order select");
if (album && order) {
  const items = [...album.children].map(item => ({ item, name: item.title, iou: Number(item.dataset.iou), ious: JSON.parse(item.dataset.ious) }));
  order.onchange = () => {
    const by = order.value, number = value => isNaN(value ?? NaN) ? Infinity : value;
    const value = by === "best" ? one => number(-one.iou) : by === "weakest" ? one => number(one.iou) : one => number(one.ious[by]);
    const sorted = by === "name" ? [...items].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true })) : [...items].sort((a, b) => value(a) - value(b));
    for (const { item, iou, ious } of sorted) {
      const own = by in ious ? ious[by] : iou;
      item.hidden = !["weakest", "best", "name"].includes(by) && !(by in ious);
      item.querySelector("b").textContent = percent(isNaN(own) ? undefined : own);
    }
    album.append(...sorted.map(one => one.item));
    document.querySelector(".order output").textContent = `${items.filter(one => !one.item.hidden).length.toLocaleString("en")} images`;
  };
}
