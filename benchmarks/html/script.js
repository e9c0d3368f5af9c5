"use strict";
// Sorting: a click on a heading; numbers by their value, empty cells last in both directions.
function value(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.textContent || null;
}
function sortable(table) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a, head.cellIndex), y = value(b, head.cellIndex);
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order;
    });
    body.append(...rows);
  });
}
for (const table of document.querySelectorAll("#figures, #compared")) sortable(table);

// Filter: rows that contain every word, and on request those alone that are marked.
const filter = document.getElementById("filter"), marked = document.getElementById("losses");
function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of document.getElementById("figures").tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word)) || (marked.checked && !row.className);
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} rows`;
}
filter.addEventListener("input", show);
marked.addEventListener("change", show);
show();

// Another run: of each contestant the times faster than stock, then and now.
function compared(other) {
  const then = new Map();
  for (const each of other) for (const c of each.contestants) then.set(`${each.name} ${each.threads} ${c.name}`, c);
  const rows = [];
  for (const each of JSON.parse(document.getElementById("data").textContent).cases) {
    for (const c of each.contestants) {
      const before = then.get(`${each.name} ${each.threads} ${c.name}`);
      if (!before || !before.ratio || !c.ratio || c.name === "torch_eager") continue;
      const worse = c.high !== null && before.low !== null && c.high < before.low;
      const better = c.low !== null && before.high !== null && c.low > before.high;
      rows.push({ cells: [each.name, each.threads, c.name, before.ratio, c.ratio, c.ratio / before.ratio], worse, better });
    }
  }
  return rows.sort((a, b) => a.cells[5] - b.cells[5]);
}
function draw(rows, place) {
  const table = document.createElement("table");
  table.id = "chosen-figures";
  const head = table.createTHead().insertRow();
  for (const name of ["case", "threads", "contestant", "x stock then", "now", "change"]) {
    const cell = document.createElement("th"), button = document.createElement("button");
    button.textContent = name;
    cell.append(button);
    head.append(cell);
  }
  const body = table.createTBody();
  for (const row of rows) {
    const made = body.insertRow();
    made.className = row.worse ? "lost" : row.better ? "won" : "";
    for (const cell of row.cells) {
      const place = made.insertCell();
      place.textContent = typeof cell === "number" ? String(Number(cell.toPrecision(3))) : cell;
      if (typeof cell === "number") { place.className = "number"; place.dataset.value = cell; }
    }
  }
  sortable(table);
  place.replaceChildren(rows.length ? table : "No case is in both runs.");
}
document.getElementById("other").addEventListener("change", async (event) => {
  const place = document.getElementById("chosen");
  try {
    const read = await Promise.all([...event.target.files].map(async (file) => JSON.parse(await file.text())));
    const cases = read.flatMap((each) => each.cases ?? []).map((each) => ({
      ...each,
      contestants: each.contestants.map((c) => ({ ...c, low: c.ratio_low, high: c.ratio_high })),
    }));
    draw(compared(cases), place);
  } catch (error) {
    place.textContent = `These are not results of benchmarks: ${error.message}`;
  }
});
