"""The frame of our HTML pages: style sheet, script and shell. Nothing in a page is loaded from anywhere."""

from __future__ import annotations

from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b2430;--muted:#5d6b7c;--line:#e0e5ec;--accent:#2563eb;
--soft:#eaf0fd;--good:#0f8a5f;--bad:#c2410c;--shadow:0 1px 2px rgba(20,30,50,.06),0 4px 14px rgba(20,30,50,.05)}
@media (prefers-color-scheme:dark){:root{--bg:#10141b;--card:#181e27;--text:#e5eaf1;--muted:#93a1b3;--line:#2a3341;
--accent:#7aa7ff;--soft:#1e2a40;--good:#45c796;--bad:#fb923c;--shadow:0 1px 2px rgba(0,0,0,.4)}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:18px;margin:40px 0 12px}
.lead,.note{color:var(--muted);margin:0}.note{font-size:13px;margin:8px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:14px;margin-top:26px}
.tile,.card,.chart,.scroll,details{background:var(--card);border:1px solid var(--line);border-radius:12px;
box-shadow:var(--shadow)}
.tile{padding:15px 17px}.tile b{display:block;font-size:26px;line-height:1.2;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;margin:3px 0 2px}.tile b small{font-size:15px;font-weight:600;color:var(--muted)}
.tile span{color:var(--muted);font-size:13px}.tile.good b{color:var(--good)}.tile.bad b{color:var(--bad)}
.cards{display:grid;gap:16px}
.card{padding:14px 16px 16px}
.card header{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;margin-bottom:10px}
.card header b{font-size:15px;overflow-wrap:anywhere}.card header span{color:var(--muted);font-size:13px}
.triple{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:10px}
.triple figure{margin:0}.triple button{all:unset;display:block;width:100%;cursor:zoom-in;border-radius:7px}
.triple button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.triple img{display:block;width:100%;height:auto;max-height:460px;object-fit:contain;border-radius:7px}
.triple figcaption{font-size:13px;color:var(--muted);padding-top:5px}
.triple figcaption b{color:var(--text);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:8px 14px;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;
white-space:nowrap}
tr:last-child td{border-bottom:0}th{font-size:12.5px;color:var(--muted);font-weight:600;background:var(--card)}
th button{all:unset;cursor:pointer}th button:hover,th button:focus-visible{color:var(--accent)}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
th.text,td.text{text-align:left}td.text{overflow-wrap:anywhere;white-space:normal;min-width:9em}
tfoot td{font-weight:600;border-top:2px solid var(--line)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:16px}
.chart{margin:0;padding:14px 16px 12px}.chart figcaption{font-weight:600;font-size:14px;margin-bottom:6px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--muted);font-size:12.5px;font-variant-numeric:tabular-nums}
svg .label{font-size:13px}svg .grid{stroke:var(--line)}svg .axis,svg .tick{stroke:var(--muted);stroke-opacity:.6}
polyline{fill:none;stroke-linejoin:round;stroke-width:2.2}polyline.main{stroke:var(--accent)}
circle.main{fill:var(--accent)}polyline.faint{stroke:var(--accent);stroke-opacity:.32;stroke-width:1.3}
polyline.reference{stroke:var(--muted);stroke-dasharray:6 5;stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:12.5px;color:var(--muted);padding-left:10%}
.key{display:inline-block;width:18px;border-top:3px solid var(--accent);margin-right:7px;vertical-align:middle}
.key.faint{opacity:.35}.key.reference{border-top:2px dashed var(--muted)}
dl{display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:5px 18px;margin:0;font-size:14px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:16px}
.facts h3{margin:0 0 9px;font-size:14px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:0;padding:13px 16px;overflow-x:auto;background:var(--soft);border-radius:9px;white-space:pre-wrap;
overflow-wrap:anywhere}
.command{position:relative}.command button{position:absolute;top:8px;right:8px}
details{padding:12px 16px;margin-top:14px}summary{cursor:pointer;font-weight:600;font-size:14px}
details pre{margin-top:12px}
.plain{font:inherit;font-size:13px;color:var(--text);background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:3px 11px;cursor:pointer}.plain[aria-pressed=true]{background:var(--accent);color:var(--bg);
border-color:var(--accent)}
dialog{border:1px solid var(--line);border-radius:14px;padding:16px;background:var(--card);color:var(--text);
width:min(1100px,96vw);max-height:96vh}dialog::backdrop{background:rgba(8,12,18,.72)}
.bar{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-bottom:12px}.bar b{margin-right:auto}
.stage{position:relative;display:block;margin:0 auto;overflow:hidden;border-radius:8px;line-height:0;user-select:none;
touch-action:none;cursor:ew-resize}
.stage img{width:100%;height:auto;image-rendering:pixelated}
.stage img+img{position:absolute;inset:0;clip-path:inset(0 0 0 var(--at,50%))}
.stage::after{content:"";position:absolute;top:0;bottom:0;left:var(--at,50%);width:2px;margin-left:-1px;background:#fff;
box-shadow:0 0 4px rgba(0,0,0,.8)}
.stage span{position:absolute;bottom:8px;z-index:1;
background:rgba(10,14,20,.72);color:#fff;font-size:12.5px;line-height:1;
padding:5px 9px;border-radius:6px}.stage .left{left:8px}.stage .right{right:8px}
dialog input{width:100%;margin:12px 0 0;accent-color:var(--accent)}
@media (max-width:640px){main{padding:22px 14px 40px}.triple{gap:6px}}
@media print{body{background:#fff}.command button{display:none}}
"""

SCRIPT = """
"use strict";
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
for (const button of document.querySelectorAll(".command button"))
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
  });
const viewer = document.querySelector("dialog");
if (viewer) {
  const cards = [...document.querySelectorAll(".card[data-name]")];
  const stage = viewer.querySelector(".stage"), range = viewer.querySelector("input");
  const images = [...stage.querySelectorAll("img")], labels = [...stage.querySelectorAll("span")];
  const pairs = [...viewer.querySelectorAll("[data-pair]")];
  let current = 0, pair = "input restored";
  const at = value => { range.value = value; stage.style.setProperty("--at", value + "%"); };
  const show = () => {
    viewer.querySelector("b").textContent = cards[current].dataset.name;
    pair.split(" ").forEach((side, i) => {
      const image = cards[current].querySelector(`img[data-side=${side}]`);
      images[i].src = image.src; images[i].alt = labels[i].textContent = side;
      const fit = Math.min(1060, innerWidth * 0.9, (innerHeight - 190) * image.naturalWidth / image.naturalHeight);
      stage.style.width = fit + "px";
    });
    pairs.forEach(button => button.setAttribute("aria-pressed", button.dataset.pair === pair));
  };
  const open = (index, side) => {
    current = index; pair = side === "target" ? "restored target" : "input restored";
    at(50); show(); viewer.showModal();
  };
  cards.forEach((card, index) => card.querySelectorAll(".triple button").forEach(button =>
    button.addEventListener("click", () => open(index, button.firstElementChild.dataset.side))));
  pairs.forEach(button => button.addEventListener("click", () => { pair = button.dataset.pair; show(); }));
  const turn = by => { current = (current + by + cards.length) % cards.length; show(); };
  viewer.querySelector("[data-turn='-1']").addEventListener("click", () => turn(-1));
  viewer.querySelector("[data-turn='1']").addEventListener("click", () => turn(1));
  viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
  range.addEventListener("input", () => at(range.value));
  const drag = event => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = stage.getBoundingClientRect();
    at(Math.max(0, Math.min(100, (event.clientX - box.left) / box.width * 100)));
  };
  stage.addEventListener("pointerdown", drag); stage.addEventListener("pointermove", drag);
}
"""

VIEWER = """<dialog aria-label="Compare two images"><div class="bar"><b></b>
<button class="plain" data-pair="input restored">input | restored</button>
<button class="plain" data-pair="restored target">restored | target</button>
<button class="plain" data-pair="input target">input | target</button>
<button class="plain" data-turn="-1">previous</button><button class="plain" data-turn="1">next</button>
<button class="plain" data-close>close</button></div>
<div class="stage"><img alt="" draggable="false"><img alt="" draggable="false"><span class="left"></span>
<span class="right"></span></div>
<input type="range" min="0" max="100" step="0.1" value="50" aria-label="Border between the two images"></dialog>"""

# The page may show what is inside it and nothing else: a browser refuses any request.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render_page(title: str, lead: str, body: str) -> str:
    """A whole page. `title` and `lead` are text, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}\n</main>{VIEWER}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )
