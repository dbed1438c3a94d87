"""The script of our HTML pages: sortable tables, the table of images, copy buttons and the slider viewer."""

from __future__ import annotations

# A page without one of these parts leaves its block out. Numbers that JSON lacks come as "inf", "-inf" and "nan".
SCRIPT = """
"use strict";
{ // Tables whose rows stand in the page
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = head.classList.contains("text") ? (a, b) => value(a).localeCompare(value(b))
      : (a, b) => { const x = Number(value(a)), y = Number(value(b)); return x < y ? -1 : x > y ? 1 : 0; };
    const rows = [...table.tBodies[0].rows].sort((a, b) => down ? compare(b, a) : compare(a, b));
    table.tBodies[0].append(...rows);
  }));
}
}
{ // Copy buttons
for (const button of document.querySelectorAll(".command button"))
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling;
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 2000);
    } else { // a page that came over plain http
      getSelection().selectAllChildren(text);
      button.textContent = "selected: press Ctrl+C";
    }
  });
}
const cards = [...document.querySelectorAll("[data-case]")];
let openCase = () => {};
{ // The slider viewer
const viewer = document.querySelector("dialog");
const stage = viewer.querySelector(".stage"), range = viewer.querySelector("input");
const images = [...stage.querySelectorAll("img")], labels = [...stage.querySelectorAll("span")];
const halves = [...viewer.querySelectorAll("[data-half]")];
let current = 0, pair = ["input", "restored"];
const find = side => cards[current].querySelector(`img[data-side="${side}"]`);
const sides = () => [...cards[current].querySelectorAll("img")].map(image => image.dataset.side);
const at = value => { range.value = value; stage.style.setProperty("--at", value + "%"); };
const fit = () => {
  const image = images[0];
  if (!image.naturalWidth) return;
  const room = viewer.clientWidth - 32, taken = viewer.scrollHeight - stage.offsetHeight;
  const height = Math.max(160, innerHeight * .96 - taken - 4);
  stage.style.width = Math.min(room, height * image.naturalWidth / image.naturalHeight) + "px";
};
const show = () => {
  const all = sides();
  viewer.classList.toggle("single", all.length < 2);
  if (!all.includes(pair[0])) pair[0] = all[0];
  if (!all.includes(pair[1])) pair[1] = all.find(side => side !== pair[0]) ?? all[0];
  viewer.querySelector("b").textContent = cards[current].dataset.name;
  pair.forEach((side, i) => { images[i].src = find(side).src; images[i].alt = labels[i].textContent = side; });
  halves.forEach((half, i) => half.replaceChildren(half.firstElementChild, ...all.map(side => {
    const button = document.createElement("button");
    button.className = "plain"; button.textContent = side; button.setAttribute("aria-pressed", side === pair[i]);
    button.addEventListener("click", () => choose(i, side, true));
    return button;
  })));
  fit();
};
const choose = (half, side, focus) => {
  if (pair[1 - half] === side) pair[1 - half] = pair[half]; // the two halves change places
  pair[half] = side;
  show();
  if (focus) halves[half].querySelector("[aria-pressed=true]").focus();
};
openCase = (index, side) => {
  current = index;
  pair = side === "target" ? ["restored", "target"]
    : side === "mean" || side === "spread" ? ["restored", side] : ["input", "restored"];
  viewer.showModal(); at(50); show(); range.focus();
};
const turn = by => { current = (current + by + cards.length) % cards.length; show(); };
cards.forEach((card, index) => card.querySelectorAll("figure button").forEach(button =>
  button.addEventListener("click", () => openCase(index, button.firstElementChild.dataset.side))));
viewer.querySelectorAll("[data-turn]").forEach(button =>
  button.addEventListener("click", () => turn(Number(button.dataset.turn))));
viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); }); // beside it
viewer.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const digit = /^Digit([1-9])$/.exec(event.code), side = digit && sides()[digit[1] - 1];
  if (side) choose(event.shiftKey ? 0 : 1, side, false);
  else if (event.key === "n" || event.key === "N") turn(1);
  else if (event.key === "p" || event.key === "P") turn(-1);
  else if (event.target !== range && event.key === "ArrowLeft") at(Math.max(0, Number(range.value) - 1));
  else if (event.target !== range && event.key === "ArrowRight") at(Math.min(100, Number(range.value) + 1));
  else return;
  event.preventDefault();
});
images[0].addEventListener("load", fit);
addEventListener("resize", () => { if (viewer.open) fit(); });
range.addEventListener("input", () => at(range.value));
const drag = event => {
  if (event.type === "pointerdown") stage.setPointerCapture(event.pointerId);
  else if (!event.buttons) return;
  const box = stage.getBoundingClientRect();
  at(Math.max(0, Math.min(100, (event.clientX - box.left) / box.width * 100)));
};
stage.addEventListener("pointerdown", drag); stage.addEventListener("pointermove", drag);
}
const table = document.getElementById("image-table");
if (table) { // The table of images: its rows are data, and a page of them is in the document at a time
const PAGE = 50;
const { digits, rows } = JSON.parse(document.getElementById("image-rows").textContent);
const bar = document.querySelector(".table-bar"), search = bar.querySelector("input");
const heads = [...table.tHead.rows[0].cells], turns = [...bar.querySelectorAll("[data-page]")];
const caseOf = new Map(cards.map((card, index) => [card.dataset.case, index]));
const special = { inf: Infinity, "-inf": -Infinity, nan: NaN };
const number = value => value === null ? NaN : typeof value === "string" ? special[value] : value;
const name = row => row[1] || row[0];
// Column 0 is the name, 1 the size, then the scores
const value = (row, column) => column === 0 ? name(row) : column === 1 ? row[2] * row[3] : number(row[column + 2]);
const text = (row, index) => {
  const score = number(row[index + 4]);
  return row[index + 4] === null ? "-" : Number.isFinite(score) ? score.toFixed(digits[index])
    : Number.isNaN(score) ? "nan" : score > 0 ? "inf" : "-inf";
};
const names = new Intl.Collator(undefined, { numeric: true });
let shown = rows, page = 0;
const cell = (row, content, kind) => {
  const made = row.insertCell();
  made.append(content);
  if (kind) made.className = kind;
};
const draw = () => {
  const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1), from = page * PAGE;
  const body = document.createElement("tbody");
  for (const row of shown.slice(from, from + PAGE)) {
    const line = body.insertRow(), index = caseOf.get(row[0]);
    let label = name(row);
    if (index !== undefined) {
      label = document.createElement("button");
      label.textContent = name(row); label.title = "look at it";
      label.addEventListener("click", () => openCase(index, "restored"));
    }
    cell(line, label, "text");
    cell(line, row[2] + "\\u00d7" + row[3]);
    digits.forEach((_, index) => cell(line, text(row, index)));
  }
  table.tBodies[0].replaceWith(body);
  const count = n => n.toLocaleString("en");
  bar.querySelector(".count").textContent = shown.length === 0 ? "no image has such a name"
    : `${count(from + 1)} to ${count(Math.min(from + PAGE, shown.length))} of ${count(shown.length)}`;
  turns[0].disabled = page === 0; turns[1].disabled = page === last;
  turns.forEach(button => { button.hidden = last === 0; });
};
const sort = (column, down) => {
  const compare = column === 0 ? names.compare : (x, y) => x < y ? -1 : x > y ? 1 : 0;
  const lacks = row => column > 0 && Number.isNaN(value(row, column));
  const has = rows.filter(row => !lacks(row));
  has.sort((a, b) => (down ? -1 : 1) * compare(value(a, column), value(b, column)));
  rows.splice(0, rows.length, ...has, ...rows.filter(lacks)); // what has no number stays last either way
};
const filter = () => {
  const wanted = search.value.trim().toLowerCase();
  shown = wanted ? rows.filter(row => name(row).toLowerCase().includes(wanted)) : rows;
  page = 0;
  draw();
};
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  sort(column, down);
  filter();
}));
search.addEventListener("input", filter);
turns.forEach(button => button.addEventListener("click", () => { page += Number(button.dataset.page); draw(); }));
draw();
}
"""
