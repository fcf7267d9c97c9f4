// Strips below the text, all over the same tokens: log-ratio with the posterior band, coefficient, gain, methods.
const KStrips = (() => {
  const LEFT = 86, RIGHT = 10, TOP = 24;
  let place = null, cursors = [], count = 0;

  function show(holder, tokens, onHover, onPick) {
    holder.replaceChildren();
    cursors = [];
    count = tokens.weight.length;
    const width = Math.max(320, holder.clientWidth);
    const step = (width - LEFT - RIGHT) / count;
    place = (i) => LEFT + step * (i + 0.5);
    ratio(frame(holder, width, 150, title(width, tokens.deviation), "Observed log-ratio as dots, the posterior as a line with its band"), tokens);
    coefficient(frame(holder, width, 92, tokens.kept.includes(false) ? "coefficient (grey: clipped)" : "coefficient", "What each token's gradient is multiplied by"), tokens, step);
    if (tokens.gain) gain(frame(holder, width, 74, "gain", "The filter's gain"), tokens);
    methods(frame(holder, width, 18 * tokens.rows.length + TOP + 6, "coefficient under each method (grey: clipped)", "Coefficient under each method"), tokens, step);
    for (const cursor of cursors) cursor.parentNode.append(cursor);  // in front of what was drawn
    holder.onmousemove = (event) => { const i = index(holder, event); if (i !== null) onHover(i); };
    holder.onclick = (event) => { const i = index(holder, event); if (i !== null) onPick(i); };
  }

  function title(width, band) {
    if (width < 430) return "log-ratio, filtered" + (band ? ", posterior ± 2 sd" : "");
    return "log-ratio: observed (dots), filtered (line)" + (band ? ", posterior ± 2 sd (band)" : "");
  }

  function index(holder, event) {
    const box = holder.getBoundingClientRect();
    const width = Math.max(320, holder.clientWidth);
    const x = ((event.clientX - box.left) / box.width) * width;
    const i = Math.floor(((x - LEFT) / (width - LEFT - RIGHT)) * count);
    return i >= 0 && i < count ? i : null;
  }

  function point(i) {
    for (const cursor of cursors) {
      const x = place(i).toFixed(1);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  }

  function frame(holder, width, height, name, description) {
    const svg = K.draw(holder, "svg", { class: "strip-chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description });
    svg.style.setProperty("height", height + "px");
    if (name) K.draw(svg, "text", { class: "unit", x: 0, y: 13 }, name);
    cursors.push(K.draw(svg, "line", { class: "cursor", y1: TOP - 6, y2: height - 2, x1: -9, x2: -9 }));
    return { svg, width, height };
  }

  function level({ svg, width }, y, kind, label) {
    K.draw(svg, "path", { class: kind, d: `M${LEFT} ${y.toFixed(1)}H${width - RIGHT}` });
    if (label) K.draw(svg, "text", { class: "tick end", x: LEFT - 8, y: y + 4 }, label);
  }

  function path(values, y) {
    let d = "", pen = "M";
    values.forEach((value, i) => {
      if (!K.known(value)) { pen = "M"; return; }
      d += pen + place(i).toFixed(1) + " " + y(value).toFixed(1);
      pen = "L";
    });
    return d;
  }

  const size = (values) => Math.max(0, ...values.map((value) => (K.known(value) ? Math.abs(value) : 0)));

  function ratio(at, { raw, weight, deviation }) {
    const seen = Math.max(size(raw || []), size(weight)) || 1e-3;
    const widths = deviation ? deviation.map((sd, i) => (K.known(sd) && K.known(weight[i]) ? Math.abs(weight[i]) + 2 * sd : 0)) : [];
    const ordered = [...widths].sort((a, b) => a - b);
    const most = Math.max(1.1 * seen, Math.min(2.5 * seen, 1.05 * (ordered[Math.floor(0.8 * ordered.length)] || 0)));
    const [top, bottom] = [TOP, at.height - 8];
    const y = (value) => (top + bottom) / 2 - (Math.min(Math.max(value, -most), most) / most) * (bottom - top) / 2;
    level(at, y(0), "axis", "0");
    level(at, y(most / 2), "grid", K.short(most / 2, true));
    level(at, y(-most / 2), "grid", K.short(-most / 2, true));
    if (deviation) {
      const edge = (sign) => weight.map((w, i) => (K.known(w) && K.known(deviation[i]) ? w + sign * 2 * deviation[i] : null));
      const [up, low] = [edge(1), edge(-1)];
      const there = up.map((value, i) => (K.known(value) ? i : -1)).filter((i) => i >= 0);
      const go = there.map((i) => place(i).toFixed(1) + " " + y(up[i]).toFixed(1));
      const back = [...there].reverse().map((i) => place(i).toFixed(1) + " " + y(low[i]).toFixed(1));
      if (there.length) K.draw(at.svg, "path", { class: "band f0", d: "M" + [...go, ...back].join("L") + "Z" });
    }
    K.draw(at.svg, "path", { class: "line s0", d: path(weight, y) });
    if (!raw) return;
    if (raw.length > 500) { K.draw(at.svg, "path", { class: "behind s1", d: path(raw, y) }); return; }
    raw.forEach((value, i) => {
      if (K.known(value)) K.draw(at.svg, "circle", { class: "dot f1", cx: place(i).toFixed(1), cy: y(value).toFixed(1), r: raw.length > 160 ? 2 : 3 });
    });
  }

  function coefficient(at, { coefficient: values, kept }, step) {
    const inside = values.filter((value, i) => kept[i] && K.known(value));
    let [low, high] = [Math.min(1, ...inside), Math.max(1, ...inside)];
    const pad = Math.max(0.15 * (high - low), 1e-3);
    [low, high] = [low - pad, high + pad];
    const [top, bottom] = [TOP, at.height - 8];
    const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
    kept.forEach((keep, i) => {
      if (!keep) K.draw(at.svg, "rect", { class: "lost", x: (place(i) - step / 2).toFixed(1), y: top, width: Math.max(1, step - (step > 6 ? 2 : 0)).toFixed(1), height: bottom - top });
    });
    const label = (value) => value.toFixed(Math.min(6, Math.max(1, 1 - Math.floor(Math.log10(high - low)))));
    level(at, y(1), "axis", "1");
    if (y(1) - y(high - pad) > 14) level(at, y(high - pad), "grid", label(high - pad));
    if (y(low + pad) - y(1) > 14) level(at, y(low + pad), "grid", label(low + pad));
    values.forEach((value, i) => {
      if (!kept[i] || !K.known(value)) return;
      const x = place(i).toFixed(1);
      K.draw(at.svg, "path", { class: "stem s2", d: `M${x} ${y(1).toFixed(1)}V${y(value).toFixed(1)}` });
      if (values.length <= 500) K.draw(at.svg, "circle", { class: "dot f2", cx: x, cy: y(value).toFixed(1), r: values.length > 160 ? 1.6 : 2.6 });
    });
  }

  function gain(at, { gain: values }) {
    const [top, bottom] = [TOP, at.height - 8];
    const most = Math.max(size(values), 1e-9);
    const full = most > 0.5 ? 1 : most;
    const y = (value) => bottom - (value / full) * (bottom - top);
    level(at, y(0), "axis", "0");
    level(at, y(full), "grid", K.short(full));
    K.draw(at.svg, "path", { class: "line s4", d: path(values, y) });
  }

  function methods(at, { rows }, step) {
    rows.forEach((row, m) => {
      const y = TOP - 4 + 18 * m;
      K.draw(at.svg, "text", { class: row.here ? "name" : "tick", x: 0, y: y + 12 }, row.name.slice(0, 13));
      row.cells.forEach((kind, i) => {
        K.draw(at.svg, "rect", { class: "cell " + kind, x: (place(i) - step / 2).toFixed(2), y, width: Math.max(0.6, step - (step > 6 ? 1.5 : 0)).toFixed(2), height: 14 });
      });
    });
  }

  return { show, point };
})();
