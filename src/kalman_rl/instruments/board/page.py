"""The frame around the report: it listens for changes and swaps the page, keeping place and open sections."""

from __future__ import annotations

import html

from kalman_rl.instruments.policy import policy

STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; display: flex; flex-direction: column; height: 100vh; font: 14px/1.4 system-ui, sans-serif; }
header { padding: 4px 12px; border-bottom: 1px solid #8888; display: flex; flex-wrap: wrap; }
header { gap: 4px 14px; align-items: center; }
p { margin: 0; overflow-wrap: anywhere; min-width: 0; }
progress { flex: 1 1 120px; max-width: 300px; height: 8px; accent-color: #0072b2; }
main { flex: 1; position: relative; }
main p { padding: 40px 12px; }
iframe { position: absolute; inset: 0; width: 100%; height: 100%; border: 0; }
iframe[data-next] { visibility: hidden; }
"""

SCRIPT = """
"use strict";
const root = location.pathname.replace(/[^/]*$/, "");
const main = document.querySelector("main"), line = document.querySelector("header p");
const bar = document.querySelector("progress");
let frame = document.querySelector("iframe"), loading = false, again = false;
function came() { delete frame.dataset.next; main.querySelector("p")?.remove(); }
if (frame.contentDocument?.readyState === "complete" && frame.contentDocument.URL !== "about:blank") came();
else frame.addEventListener("load", came);

function say(text) { line.textContent = text; }

function place(page) {
  const open = [...page.querySelectorAll("details")].map(part => part.open);
  const fields = [...page.querySelectorAll("input, select")].map(field => [field.checked, field.value]);
  const view = page.defaultView;
  return { open, fields, x: view.scrollX, y: view.scrollY, focus: page.activeElement && page.activeElement.id };
}

function restore(page, was) {
  const parts = [...page.querySelectorAll("details")];
  if (parts.length === was.open.length) parts.forEach((part, i) => { part.open = was.open[i]; });
  const fields = [...page.querySelectorAll("input, select")];
  if (fields.length === was.fields.length) fields.forEach((field, i) => {
    const [checked, value] = was.fields[i];
    if (field.checked !== checked || field.value !== value) {
      field.checked = checked;
      field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
      field.dispatchEvent(new Event("change", { bubbles: true }));
    }
  });
  page.defaultView.scrollTo(was.x, was.y);
  const focus = was.focus && page.getElementById(was.focus);
  if (focus) focus.focus({ preventScroll: true });
}

function renew() {
  if (loading) { again = true; return; }
  loading = true;
  const next = document.createElement("iframe");
  next.title = frame.title;
  next.dataset.next = "";
  next.src = root + "page?" + Date.now();
  next.addEventListener("load", () => {
    try { restore(next.contentDocument, place(frame.contentDocument)); } catch { /* a page that did not load */ }
    frame.remove();
    frame = next;
    came();
    loading = false;
    if (again) { again = false; renew(); }
  });
  main.append(next);
}

let shown = main.dataset.version;
const events = new EventSource(root + "events");
events.addEventListener("changed", event => {
  const news = JSON.parse(event.data);
  say(news.text);
  bar.value = news.share;
  if (news.version !== shown) { shown = news.version; renew(); }
});
events.addEventListener("gone", event => { say(JSON.parse(event.data).text); events.close(); });
events.onerror = () => {
  if (events.readyState !== EventSource.CLOSED) say("The board does not answer; trying again.");
};
"""


WAITING = "The report is being made. Training goes first, so this takes a while on a busy machine."
POLICY = policy([SCRIPT], STYLE, "connect-src 'self'", "frame-src 'self'", "frame-ancestors 'none'")
"""Content security policy of the frame; the report inside has its own."""
PAGE_POLICY = "frame-ancestors 'self'"
"""What the server adds to the report's own policy."""


def shell(name: str, version: str, text: str = "", share: float = 0.0) -> str:
    """The frame of a run: how far it is at once, and its report as soon as that is made."""
    title = html.escape(f"Board: {name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><header><p role="status">{html.escape(text) or title}</p>'
        f'<progress max="1" value="{share:.4f}" aria-label="Part of the run that is done"></progress></header>'
        f'<main data-version="{html.escape(version)}"><p>{WAITING}</p>'
        f'<iframe title="Report" src="page" data-next></iframe></main><script>{SCRIPT}</script></body></html>'
    )


def notice(text: str) -> str:
    """A page with one sentence."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Board</title>'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"></head>'
        f"<body><p>{html.escape(text)}</p></body></html>"
    )
