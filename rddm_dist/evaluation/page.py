"""The frame of our HTML pages: style sheet, viewer and shell. Nothing in a page is loaded from anywhere."""

from __future__ import annotations

from html import escape

from rddm_dist.evaluation.page_script import SCRIPT

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--text:#1b2430;--muted:#5d6b7c;--line:#e0e5ec;--accent:#2563eb;--second:#c2570c;
--soft:#eaf0fd;--good:#0f8a5f;--bad:#c2410c;--shadow:0 1px 2px rgba(20,30,50,.06),0 4px 14px rgba(20,30,50,.05)}
@media screen{:root{color-scheme:light dark}}
@media screen and (prefers-color-scheme:dark){:root{--bg:#10141b;--card:#181e27;--text:#e5eaf1;--muted:#93a1b3;
--line:#2a3341;--accent:#7aa7ff;--second:#f0a35e;--soft:#1e2a40;--good:#45c796;--bad:#fb923c;
--shadow:0 1px 2px rgba(0,0,0,.4)}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:56px}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:40px 0 12px}
a{color:var(--accent)}:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.lead,.note{color:var(--muted);margin:0}.note{font-size:13px;margin:8px 0}
.lead{overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:2;display:flex;gap:4px;overflow-x:auto;margin:18px -24px 0;padding:9px 20px;
background:color-mix(in srgb,var(--bg) 92%,transparent);backdrop-filter:blur(6px);border-bottom:1px solid var(--line);
scrollbar-width:none}
nav a{padding:4px 10px;border-radius:7px;font-size:13.5px;color:var(--muted);text-decoration:none;white-space:nowrap}
nav a:hover,nav a:focus-visible{background:var(--soft);color:var(--accent);outline:none}
.warning{margin:18px 0 0;padding:11px 16px;border:1px solid var(--bad);border-left-width:5px;border-radius:9px;
background:var(--card)}.warning b{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:14px;margin-top:22px}
.tile,.card,.chart,.scroll,details,.grid-of-images article{background:var(--card);border:1px solid var(--line);
border-radius:12px;box-shadow:var(--shadow)}
.tile{padding:15px 14px}.tile b{display:block;font-size:26px;line-height:1.2;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;margin:3px 0 2px}
.tile b small{font-size:14px;font-weight:600;color:var(--muted);letter-spacing:0;white-space:nowrap}
.tile span{color:var(--muted);font-size:13px}
.tile span:first-child{display:block;font-size:12.5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.tile.good b{color:var(--good)}.tile.bad b{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(500px,100%),1fr));gap:16px}
.card{padding:14px 16px 16px;min-width:0}
.card header{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:baseline;margin-bottom:10px}
.card header b{font-size:14.5px;overflow-wrap:anywhere}.card header span{color:var(--muted);font-size:13px}
.card header .badge{margin-left:auto;font-weight:600;font-variant-numeric:tabular-nums}
.card header .good{color:var(--good)}.card header .bad{color:var(--bad)}
.sides{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:10px}
.sides.n1{grid-template-columns:minmax(0,1fr)}.sides.n2,.sides.n4{grid-template-columns:repeat(2,minmax(0,1fr))}
figure{margin:0;min-width:0}
figure button{all:unset;display:block;width:100%;cursor:zoom-in;border-radius:7px}
figure button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
figure img{display:block;width:100%;height:auto;max-height:420px;object-fit:contain;border-radius:7px}
.sides figcaption{font-size:12.5px;line-height:1.4;color:var(--muted);padding-top:5px;overflow-wrap:anywhere}
.sides figcaption b{display:block;color:var(--text);font-weight:600}
.grid-of-images{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(150px,44%),1fr));gap:12px}
.grid-of-images article{padding:7px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:8px 14px;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;
white-space:nowrap}td small{color:var(--muted)}
tr:last-child td{border-bottom:0}th{font-size:12.5px;color:var(--muted);font-weight:600;background:var(--card)}
th button,td button{all:unset;cursor:pointer}th button:hover,th button:focus-visible{color:var(--accent)}
th button:focus-visible,td button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
td button{color:var(--accent);text-align:left}
th[aria-sort=ascending] button::after{content:" \\2191";content:" \\2191"/""}
th[aria-sort=descending] button::after{content:" \\2193";content:" \\2193"/""}
th.text,td.text{text-align:left}td.text{overflow-wrap:anywhere;white-space:normal;min-width:9em}td.wide{min-width:18em}
.dense{font-size:13.5px}.dense th,.dense td{padding:6px 10px}.dense th{white-space:normal;vertical-align:bottom}
.dense td.text{min-width:19em}tfoot td{font-weight:600;border-top:2px solid var(--line)}
.table-bar{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-bottom:10px;font-size:13px}
.table-bar .count{margin-left:auto;color:var(--muted);font-variant-numeric:tabular-nums}
input[type=search]{font:inherit;color:var(--text);background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:4px 11px;width:min(260px,100%)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:16px}
.chart{margin:0;padding:14px 16px 12px}.chart figcaption{font-weight:600;font-size:14px;margin-bottom:6px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--muted);font-size:12.5px;font-variant-numeric:tabular-nums}
svg .label{font-size:13px}svg .grid{stroke:var(--line)}svg .axis,svg .tick{stroke:var(--muted);stroke-opacity:.6}
polyline{fill:none;stroke-linejoin:round;stroke-width:2.2}polyline.main{stroke:var(--accent)}
polyline.second{stroke:var(--second)}circle.main{fill:var(--accent)}circle.second{fill:var(--second)}
polyline.faint{stroke:var(--accent);stroke-opacity:.32;stroke-width:1.3}
polyline.reference{stroke:var(--muted);stroke-dasharray:6 5;stroke-width:1.6}
.interval{stroke-width:7;stroke-opacity:.28}.interval.main{stroke:var(--accent)}.interval.second{stroke:var(--second)}
.bin.main{fill:var(--accent);fill-opacity:.72}.bin.reference{fill:var(--muted);fill-opacity:.45}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:12.5px;color:var(--muted);padding-left:10%}
.key{display:inline-block;width:18px;border-top:3px solid var(--accent);margin-right:7px;vertical-align:middle}
.key.box{width:12px;height:12px;border:0;border-radius:3px;background:var(--accent);opacity:.8}
.key.box.reference{background:var(--muted);opacity:.5}.key.faint{opacity:.35}.key.second{border-color:var(--second)}
.key.reference:not(.box){border-top:2px dashed var(--muted)}
dl{display:grid;grid-template-columns:minmax(110px,max-content) minmax(0,1fr);gap:5px 18px;margin:0;font-size:14px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.facts{columns:2 420px;column-gap:16px}.facts .card{break-inside:avoid;margin-bottom:16px}
.facts h3{margin:0 0 9px;font-size:14px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}dd code{font-size:12px}
pre{margin:0;padding:13px 16px;overflow-x:auto;background:var(--soft);border-radius:9px;white-space:pre-wrap;
overflow-wrap:anywhere}
.command{position:relative}.command pre{padding-right:90px}.command button{position:absolute;top:8px;right:8px}
details{padding:12px 16px;margin-top:14px}summary{cursor:pointer;font-weight:600;font-size:14px}
details pre{margin-top:12px}
.plain{font:inherit;font-size:13px;color:var(--text);background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:3px 11px;cursor:pointer}.plain:hover:not(:disabled){border-color:var(--accent)}
.plain:disabled{opacity:.45;cursor:default}.plain[aria-pressed=true]{background:var(--accent);color:var(--bg);
border-color:var(--accent)}
dialog{border:1px solid var(--line);border-radius:14px;padding:16px;background:var(--card);color:var(--text);
width:min(1100px,96vw);max-height:96vh}dialog::backdrop{background:rgba(8,12,18,.72)}
.bar{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin-bottom:10px}.bar b{margin-right:auto;
overflow-wrap:anywhere}
.choose{display:flex;flex-wrap:wrap;justify-content:space-between;gap:8px 24px;margin-bottom:12px}
.choose div{display:flex;flex-wrap:wrap;gap:6px;align-items:center}.choose span{color:var(--muted);font-size:13px}
.stage{position:relative;display:block;margin:0 auto;overflow:hidden;border-radius:8px;line-height:0;user-select:none;
touch-action:pan-y;cursor:ew-resize}
.stage img{width:100%;height:auto;image-rendering:pixelated}
.stage img+img{position:absolute;inset:0;height:100%;clip-path:inset(0 0 0 var(--at,50%))}
.stage::after{content:"";position:absolute;top:0;bottom:0;left:var(--at,50%);width:2px;margin-left:-1px;background:#fff;
box-shadow:0 0 4px rgba(0,0,0,.8)}
.stage span{position:absolute;bottom:8px;z-index:1;
background:rgba(10,14,20,.72);color:#fff;font-size:12.5px;line-height:1;
padding:5px 9px;border-radius:6px}.stage .left{left:8px}.stage .right{right:8px}
dialog.single .choose,dialog.single .stage img+img,dialog.single .stage span,dialog.single input,
dialog.single .stage::after{display:none}dialog.single .stage{cursor:default}
dialog input{display:block;width:100%;margin:12px 0 0;accent-color:var(--accent)}
dialog .note{margin:8px 0 0}
@media (max-width:640px){main{padding:22px 14px 40px}nav{margin:14px -14px 0;padding:8px 10px}.sides{gap:6px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:10px}.tile{padding:12px 13px}
.tile b{font-size:22px}.card{padding:12px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:7px}
svg text,svg .label{font-size:19px}.dense td.text{min-width:11em}
dialog{padding:11px}.bar b{flex-basis:100%}.choose .plain{padding:2px 6px;font-size:12px}.choose div{gap:4px}
.wide-only{display:none}.table-bar .count{margin-left:0}input[type=search]{width:100%}}
@media print{body{background:#fff}main{max-width:none;padding:0}nav,.command button,.table-bar,dialog{display:none}
.tile,.card,.chart,.scroll{box-shadow:none;break-inside:avoid}.scroll{overflow:visible;break-inside:auto}
h2{break-after:avoid}.cards{grid-template-columns:repeat(2,minmax(0,1fr))}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

VIEWER = """<dialog aria-label="Compare two images"><div class="bar"><b></b>
<button class="plain" data-turn="-1">previous</button><button class="plain" data-turn="1">next</button>
<button class="plain" data-close>close</button></div>
<div class="choose"><div data-half="0" role="group" aria-label="left image"><span>left</span></div>
<div data-half="1" role="group" aria-label="right image"><span>right</span></div></div>
<div class="stage"><img alt="" draggable="false"><img alt="" draggable="false"><span class="left"></span>
<span class="right"></span></div>
<input type="range" min="0" max="100" step="1" value="50" aria-label="Border between the two images">
<p class="note wide-only">Arrows move the border, 1 to 5 choose the right image (with Shift the left one), N and P turn
to the next and the previous case, Esc closes.</p></dialog>"""

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
