"use strict";
// Shared by the scripts of the page: texts from data reach the page through textContent only.
const K = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  function put(parent, tag, kind, text) {
    const node = document.createElement(tag);
    if (kind) node.className = kind;
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function draw(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  const known = (value) => typeof value === "number" && Number.isFinite(value);

  function short(value, signed) {
    if (!known(value)) return "–";
    const size = Math.abs(value);
    let text = size !== 0 && (size < 1e-3 || size >= 1e4) ? size.toExponential(1) : String(Number(size.toPrecision(3)));
    text = text.replace("e-", "e−").replace("e+", "e");
    return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + text;
  }

  function percent(logp) {
    if (!known(logp)) return "–";
    const share = 100 * Math.exp(Math.min(logp, 0));
    return share >= 99.95 ? "100%" : share >= 0.1 ? share.toFixed(1) + "%" : share.toExponential(1).replace("e-", "e−") + "%";
  }

  // One member of a row or list takes the tab stop; arrow keys move it.
  function roving(container, onMove, vertical) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
    container.addEventListener("keydown", (event) => {
      const items = [...container.querySelectorAll("[data-item]")];
      const here = items.indexOf(event.target.closest("[data-item]"));
      if (here < 0) return;
      let next = null;
      if (event.key === "Home") next = 0;
      else if (event.key === "End") next = items.length - 1;
      else if (!vertical && (event.key === "ArrowDown" || event.key === "ArrowUp")) next = line(items, here, steps[event.key]);
      else if (event.key in steps) next = here + steps[event.key];
      if (next === null || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      onMove(Math.min(Math.max(next, 0), items.length - 1));
    });
  }

  // The item nearest below or above in a text that wraps.
  function line(items, here, direction) {
    const box = items[here].getBoundingClientRect();
    let best = here, least = Infinity;
    for (let i = here + direction; i >= 0 && i < items.length; i += direction) {
      const other = items[i].getBoundingClientRect();
      const down = Math.abs(other.top - box.top);
      if (down < box.height / 2) continue;
      const cost = down * 1000 + Math.abs(other.left - box.left);
      if (cost < least) { least = cost; best = i; } else if (down * 1000 > least) break;
    }
    return best;
  }

  return { byId, put, draw, known, short, percent, roving };
})();

// Light, dark, or what the system prefers.
(() => {
  const button = K.byId("theme");
  const names = ["auto", "light", "dark"];
  let now = "auto";
  try { now = localStorage.getItem("kalman-rl-theme") || "auto"; } catch { /* storage may be refused */ }
  const show = () => {
    if (!names.includes(now)) now = "auto";
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = "Theme: " + now;
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    now = names[(names.indexOf(now) + 1) % names.length];
    try { localStorage.setItem("kalman-rl-theme", now); } catch { /* it will not be remembered */ }
    show();
  });
  show();
})();

// Tables whose headings carry data-sort can be ordered by them.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  for (const heading of table.querySelectorAll("th[data-sort]")) {
    const column = heading.cellIndex;
    const button = K.put(null, "button", "sort", heading.textContent);
    button.type = "button";
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") !== "descending";
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => Number(row.cells[column].dataset.value ?? NaN);
      const order = (a, b) => ((Number.isNaN(value(a)) - Number.isNaN(value(b))) || (down ? value(b) - value(a) : value(a) - value(b)));
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(order));
    });
  }
}
