// Strips below the text, all over the same tokens: log-ratio with the posterior band, coefficient, gain, methods.
const KStrips = (() => {
  const LEFT = 92;
  let charts = [], chosen = 0;

  function show(holder, tokens, onHover, onPick) {
    for (const chart of charts) chart.destroy();
    charts = [];
    holder.replaceChildren();
    const dropped = tokens.kept.includes(false);
    const band = tokens.deviation ? ", posterior ± 2 sd (band)" : "";
    const parts = [
      ["log-ratio: observed (dots), filtered (line)" + band, 130, ratio(tokens)],
      [dropped ? "coefficient (grey: clipped)" : "coefficient", 76, coefficient(tokens)],
      ...(tokens.gain ? [["gain", 60, gain(tokens)]] : []),
      ["coefficient under each method (grey: clipped)", 18 * tokens.rows.length + 4, methods(tokens)],
    ];
    for (const [name, height, part] of parts) add(holder, name, height, tokens.weight.length, part, onHover, onPick);
  }

  function add(holder, name, height, count, { series, data, bands, range, splits, values, draw, down }, onHover, onPick) {
    K.put(holder, "p", "unit", name);
    const place = K.put(holder, "div", "strip");
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", name);
    const u = new uPlot({
      width: Math.max(200, holder.clientWidth), height, legend: { show: false }, padding: [4, 10, 4, 0],
      cursor: { y: false, points: { show: false }, sync: { key: "strips", scales: ["x", null] }, drag: { dist: 6 } },
      scales: { x: { time: false, range: (u, low, high) => (low === 0 && high === count - 1 ? [-0.5, count - 0.5] : [low, high]) }, y: { range, dir: down ? -1 : 1 } },
      axes: [{ show: false }, KCharts.axis({ scale: "y", size: LEFT, space: 18, ...(splits ? { splits: () => splits } : {}), values: values || ((u, all) => all.map((value) => KCharts.tick(Number(value.toPrecision(3))))), grid: { show: !down, stroke: () => KCharts.css("rule"), width: 1 } })],
      series: [{}, ...series], bands: bands || [],
      hooks: { ready: [(u) => mark(u)], drawClear: draw?.below ? [draw.below] : [], draw: draw?.above ? [draw.above] : [] },
    }, [[...Array(count).keys()], ...data], place);
    const at = (event) => Math.min(Math.max(u.posToIdx(event.offsetX), 0), count - 1);
    u.over.addEventListener("mousemove", (event) => onHover(at(event)));
    u.over.addEventListener("click", (event) => { if (!u.select.width) onPick(at(event)); });
    charts.push(u);
  }

  KCharts.whenTheme(() => charts.forEach((u) => u.redraw(false)));

  const mark = (u) => u.setCursor({ left: u.valToPos(chosen, "x"), top: 1 }, false);
  function point(i) {
    chosen = i;
    charts.forEach(mark);
  }

  const ink = (name) => () => KCharts.css(name);
  const line = (name, more) => ({ stroke: ink(name), width: 1.8, points: { show: false }, ...more });
  const dots = (name, count) => ({ stroke: ink(name), paths: () => null, points: { show: true, size: count > 160 ? 4 : 6, fill: ink(name), stroke: ink(name), width: 0 } });
  const size = (values) => Math.max(0, ...values.map((value) => (K.known(value) ? Math.abs(value) : 0)));

  function ratio({ raw, weight, deviation }) {
    const seen = Math.max(size(raw || []), size(weight)) || 1e-3;
    const widths = deviation ? deviation.map((sd, i) => (K.known(sd) && K.known(weight[i]) ? Math.abs(weight[i]) + 2 * sd : 0)) : [];
    const ordered = [...widths].sort((a, b) => a - b);
    const most = Math.max(1.1 * seen, Math.min(2.5 * seen, 1.05 * (ordered[Math.floor(0.8 * ordered.length)] || 0)));
    const [low, high] = uPlot.rangeNum(-most, most, 0, true);
    const edge = (sign) => weight.map((w, i) => (K.known(w) && deviation && K.known(deviation[i]) ? w + sign * 2 * deviation[i] : null));
    const hidden = { stroke: "transparent", points: { show: false } };
    return {
      series: [hidden, hidden, line("c0"), dots("c1", weight.length)],
      data: [edge(1), edge(-1), weight, raw || weight.map(() => null)],
      bands: [{ series: [1, 2], fill: () => KCharts.css("c0") + "2b" }],
      range: [low, high],
    };
  }

  const box = (u, i) => {
    const [left, right] = [i - 0.5, i + 0.5].map((x) => u.valToPos(x, "x", true));
    return [left, Math.max(1, right - left - (right - left > 6 ? 2 : 0))];
  };
  const inside = (u, i) => i >= u.scales.x.min - 0.5 && i <= u.scales.x.max + 0.5;

  function coefficient({ coefficient: values, kept }) {
    const shown = values.filter((value, i) => kept[i] && K.known(value));
    let [low, high] = [Math.min(1, ...shown), Math.max(1, ...shown)];
    const pad = Math.max(0.15 * (high - low), 1e-3);
    const below = (u) => kept.forEach((keep, i) => {
      if (keep || !inside(u, i)) return;
      const [x, width] = box(u, i);
      KCharts.paint(u, "rule", 0, 1, (c) => c.fillRect(x, u.bbox.top, width, u.bbox.height));
    });
    const above = (u) => KCharts.paint(u, "c2", 2, 1, (c) => {
      const one = u.valToPos(1, "y", true);
      values.forEach((value, i) => {
        if (!kept[i] || !K.known(value) || !inside(u, i)) return;
        const x = u.valToPos(i, "x", true);
        c.moveTo(x, one);
        c.lineTo(x, u.valToPos(value, "y", true));
      });
      c.stroke();
    });
    return {
      series: [dots("c2", values.length)], data: [values.map((value, i) => (kept[i] ? value : null))],
      range: [low - pad, high + pad], draw: { below, above },
    };
  }

  function gain({ gain: values }) {
    const full = size(values) > 0.5 ? 1 : size(values) || 1e-9;
    return { series: [line("c4")], data: [values], range: [0, full * 1.04] };
  }

  function methods({ rows }) {
    const above = (u) => rows.forEach((row, m) => row.cells.forEach((kind, i) => {
      if (!inside(u, i)) return;
      const [x, width] = box(u, i);
      const [top, bottom] = [m - 0.42, m + 0.42].map((y) => u.valToPos(y, "y", true));
      KCharts.paint(u, kind === "dropped" ? "axis" : kind === "z" ? "panel" : kind, 0, 1, (c) => c.fillRect(x, Math.min(top, bottom), width, Math.abs(bottom - top)));
    }));
    return {
      series: [{ stroke: "transparent", points: { show: false } }], data: [rows[0].cells.map(() => null)],
      down: true, range: [-0.5, rows.length - 0.5], splits: rows.map((_, m) => m),
      values: (u, all) => all.map((m) => rows[m].name.slice(0, 13)), draw: { above },
    };
  }

  return { show, point };
})();
