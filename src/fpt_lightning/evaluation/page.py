"""A page that stands alone, as reports and audits are: its style, sections and tables; no network, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fpt_lightning.files import write_text


def write_page(path: Path, title: str, basis: str, sections: Iterable[str], style: str = "") -> None:
    """Write a page, whole or not at all.

    Args:
        path: of the HTML file.
        title: of the page.
        basis: what it is about, in a sentence.
        sections: HTML; pictures are ``data:`` URLs.
        style: CSS of its own, behind that of all pages.
    """
    page = _PAGE.format(
        title=escape(title),
        basis=escape(basis),
        style=_STYLE + style,
        main="\n".join(sections),
    )
    write_text(path, page)


def section(title: str, content: str, explanation: str = "") -> str:
    """A part of the page; its content is HTML, the rest text."""
    explained = f'<p class="explanation">{escape(explanation)}</p>' if explanation else ""
    return f"<section><h2>{escape(title)}</h2>{explained}{content}</section>"


def panel(title: str, value: str, svg: str) -> str:
    """A figure with its title and what it comes to."""
    shown = f"<span>{escape(value)}</span>" if value else ""
    return f"<figure><figcaption><b>{escape(title)}</b>{shown}</figcaption>{svg}</figure>"


def note_box(notes: Sequence[str]) -> str:
    """Notes on a part of the report."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><ul>{items}</ul></div>' if notes else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table in a box that scrolls by itself; cells are HTML, the first of a row is its name."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if heads else ""
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def capital(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--surface:#f6f7f8;--ink:#16191d;--muted:#5b6470;--line:#d9dde2;
--accent:#0b62a4;--accent-rgb:11,98,164;--second:#b84e00;--warn:#fdf6e7;--warn-line:#e3b341;
--shade:rgba(0,0,0,.22);--under:var(--page)}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--surface:#1d2125;--ink:#e7eaed;--muted:#9aa4af;
--line:#353c44;--accent:#62b0ee;--accent-rgb:60,140,205;--second:#f0954a;--warn:#2b2517;--warn-line:#a3801f;
--shade:rgba(255,255,255,.24)}}
@media print{:root{color-scheme:light;--page:#fff;--surface:#f6f7f8;--ink:#16191d;--muted:#5b6470;--line:#d9dde2;
--accent:#0b62a4;--accent-rgb:11,98,164;--second:#b84e00;--warn:#fdf6e7;--warn-line:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%;-webkit-print-color-adjust:exact;
print-color-adjust:exact}
header,main,footer{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
header p{margin:0;color:var(--muted)}
section{margin-top:36px}
h2{font-size:18px;line-height:1.3;margin:0 0 4px}
.explanation{margin:0 0 14px;color:var(--muted);font-size:14px;max-width:100ch}
small{display:block;font-size:12px;line-height:1.35;color:var(--muted);white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(var(--columns),1fr);gap:1px;margin:0;
border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:14px 16px}
.tiles dt{color:var(--muted);font-size:13px}
.tiles dd{margin:2px 0 0}
.tiles b{display:block;font-size:26px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tiles small{font-size:13px;font-variant-numeric:tabular-nums}
.notes{background:var(--warn);border-left:3px solid var(--warn-line);border-radius:0 6px 6px 0;padding:12px 18px}
.notes h2{font-size:15px}
.notes ul{margin:0;padding-left:18px;overflow-wrap:anywhere}
.prose{margin:0;max-width:100ch;overflow-wrap:anywhere}
ul.prose{margin-top:10px;padding-left:18px}
.scroll{overflow-x:auto;max-width:100%;background:
linear-gradient(90deg,var(--under) 40%,transparent) 0 0/40px 100% no-repeat local,
linear-gradient(270deg,var(--under) 40%,transparent) 100% 0/40px 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) 0 0/16px 100% no-repeat scroll,
linear-gradient(270deg,var(--shade),transparent) 100% 0/16px 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums lining-nums}
table.narrow{width:auto;min-width:min(420px,100%)}
td{white-space:nowrap}
th,td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
thead th{font-weight:500;font-size:13px;line-height:1.3;color:var(--muted);vertical-align:bottom;
border-bottom-color:var(--muted)}
thead th:not(:first-child){min-width:5em}
th:first-child{text-align:left;padding-left:0}
tbody th{font-weight:500;min-width:11em;max-width:20em;overflow-wrap:anywhere}
.narrow tbody th{padding-right:32px}
.text td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.confusion{width:auto}
.confusion th:not(:first-child){max-width:9em;min-width:5.2em;overflow-wrap:anywhere;text-align:center}
.confusion td{text-align:center;border:0;vertical-align:middle}
.confusion tbody th{vertical-align:middle;border:0;padding-right:14px}
.confusion .cell{border:2px solid var(--page);border-radius:6px;
background:rgba(var(--accent-rgb),calc(.05 + .55*var(--share)))}
.confusion .cell small{color:inherit}
.panels{display:flex;flex-wrap:wrap;gap:20px 24px}
figure{margin:0;flex:0 1 236px;min-width:0;display:flex;flex-direction:column}
figure svg{margin-top:auto}
.wide figure{flex-basis:480px}
.gallery img{display:block;width:100%;height:190px;object-fit:contain;background:#000;border-radius:6px 6px 0 0}
.gallery figcaption{padding:6px 8px;border:1px solid var(--line);border-top:0;border-radius:0 0 6px 6px;flex:1}
.row{display:grid;grid-template-columns:236px 236px 1fr;gap:0 24px}
.row .explanation{min-height:3em}
figcaption{font-size:13px;line-height:1.35;margin-bottom:2px;overflow-wrap:anywhere}
figcaption b{font-weight:600;display:block}
figcaption span{color:var(--muted);display:block;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg *{stroke-linejoin:round;stroke-linecap:butt}
details{--under:var(--surface);border:1px solid var(--line);border-radius:6px;background:var(--surface)}
summary{cursor:pointer;padding:8px 14px;color:var(--accent)}
pre{margin:0;padding:4px 14px 14px;overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details h3{font-size:14px;margin:10px 14px 0}
details .scroll{padding:0 14px 10px}
div.notes{margin:14px 0}
.rest{margin-top:3px;font-size:13px}
footer{margin-top:48px;padding-top:16px;padding-bottom:40px;color:var(--muted);font-size:13px}
footer p{margin:0;border-top:1px solid var(--line);padding-top:14px}
@media (max-width:640px){header,main,footer{padding-left:16px;padding-right:16px}header{padding-top:24px}
h1{font-size:23px}.tiles{grid-template-columns:1fr 1fr}.tiles b{font-size:22px}.tiles div{padding:11px 12px}
.tiles div:last-child:nth-child(odd){grid-column:1/-1}
table{font-size:13px}th,td{padding:7px 6px}tbody th{min-width:7.5em}.narrow tbody th{padding-right:6px}
.panels{gap:18px 14px}figure{flex:0 1 calc(50% - 7px)}.wide figure,.row section:not(:last-child) figure{flex:1 1 100%}
.row{grid-template-columns:1fr 1fr;gap:0 14px}.row .explanation{min-height:4.5em}
.row section:last-child{grid-column:1/-1}.row section:last-child .explanation{min-height:0}}
@media print{body{font-size:11px}header{padding-top:0}figure,tr,.tiles,.notes{break-inside:avoid}
h2,.explanation{break-after:avoid}
figure{flex-basis:165px}.wide figure{flex-basis:300px}.scroll{overflow:visible;background:none}
details::details-content{content-visibility:visible;block-size:auto}summary{display:none}pre{white-space:pre-wrap;
overflow-wrap:anywhere}}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{basis}</p></header>
<main>
{main}
</main>
<footer><p>Made by fpt-lightning. Research software, not a medical device: not for diagnosis or treatment.</p></footer>
</body>
</html>
"""
