// Controls of every page: sortable tables, copy buttons, enlarged images, hints at hidden columns.

/** Sorts the rows of a table by a column. Rows without a value come last. */
function sortTable(button) {
  const head = button.parentElement;
  const isAscending = head.getAttribute("aria-sort") !== "ascending";
  const body = head.closest("table").tBodies[0];
  const value = (row) => {
    const text = row.cells[head.cellIndex].dataset.value;
    return isNaN(text) ? text : Number(text);
  };
  const isMissing = (x) => x === "nan" || x === "";
  const compare = (x, y) => (x < y ? -1 : x > y ? 1 : 0) * (isAscending ? 1 : -1);
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    return isMissing(x) - isMissing(y) || compare(x, y);
  });
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
  body.append(...rows);
}

/** Copies the code before a button, or selects it if the browser does not allow copying. */
async function copyCode(button) {
  const code = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

/** Fades the edge of a table behind which there are more columns, and says so above the table. */
function hintAtHiddenColumns(area) {
  const hint = document.createElement("p");
  hint.className = "scroll-hint";
  hint.textContent = "Scroll sideways for more columns \u2192";
  area.before(hint);
  const update = () => {
    const hidden = area.scrollWidth - area.clientWidth;
    hint.hidden = hidden <= 1;
    area.classList.toggle("more", hidden - area.scrollLeft > 1);
  };
  area.addEventListener("scroll", update, { passive: true });
  new ResizeObserver(update).observe(area);
}

for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => sortTable(button);
}
for (const button of document.querySelectorAll(".copy")) button.onclick = () => copyCode(button);
for (const button of document.querySelectorAll(".zoom")) {
  button.onclick = () => button.parentElement.classList.toggle("large");
}
for (const area of document.querySelectorAll(".scroll")) hintAtHiddenColumns(area);
