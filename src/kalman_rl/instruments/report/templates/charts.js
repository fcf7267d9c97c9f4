// Charts: uPlot draws them. Here is what it is told, and around it the names with values and switches, and downloads.
const KCharts = (() => {
  const FONT = '12px -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif';
  const NICE = [...Array(31).keys()].flatMap((k) => [1, 2, 5].map((m) => Number(`${m}e${k - 15}`)));
  const UP = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const styles = getComputedStyle(document.documentElement);
  const css = (name) => styles.getPropertyValue("--" + name).trim();
  const redraws = [];

  function tick(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value), sign = value < 0 ? "−" : "";
    if (size === 0 || (size >= 1e-3 && size < 1e6)) return sign + String(Number(size.toPrecision(10)));
    const [digits, power] = size.toExponential(2).split("e");
    const mantissa = Number(digits);
    return sign + (mantissa === 1 ? "" : mantissa + "·") + "10" + [...String(Number(power))].map((c) => UP[c]).join("");
  }

  // The room that the labels of an axis take, at most half of the chart; longer ones are cut there.
  function room(u, labels, place, cycle) {
    const axis = u.axes[place];
    if (cycle > 1) return axis._size;
    u.ctx.font = axis.font[0];
    const widths = (labels || []).map((text) => u.ctx.measureText(text).width / devicePixelRatio);
    return Math.ceil(Math.min(Math.max(12, ...widths), u.width / 2)) + 12;
  }

  const axis = (more) => ({
    stroke: () => css("muted"), font: FONT, gap: 6, size: 28, incrs: NICE,
    grid: { stroke: () => css("rule"), width: 1 }, ticks: { show: false },
    border: { show: true, stroke: () => css("axis"), width: 1 },
    values: (u, splits) => splits.map(tick), ...more,
  });

  // Powers of ten, as many as have room.
  function decades(u, place, low, high) {
    const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
    const stride = Math.max(1, Math.ceil((last - first) / Math.max(1, Math.floor(u.height / 34))));
    return [...Array(Math.floor((last - first) / stride) + 1).keys()].map((k) => 10 ** (last - k * stride)).reverse();
  }

  const fitted = (spec, log) => (u, low, high) => {
    for (const value of [...(spec.include || []), ...(spec.reference ? [spec.reference[0]] : [])]) {
      if (!K.known(value) || (log && value <= 0)) continue;
      [low, high] = low === null ? [value, value] : [Math.min(low, value), Math.max(high, value)];
    }
    if (log) return low > 0 ? uPlot.rangeLog(low, high, 10, true) : [1e-3, 1];
    if (low === null) return [0, 1];
    const [floor, ceiling] = spec.limits;
    return uPlot.rangeNum(low, high, {
      min: { pad: 0.08, soft: 0, mode: 3, hard: floor ?? -Infinity },
      max: { pad: 0.08, soft: 0, mode: 3, hard: ceiling ?? Infinity },
    });
  };

  // The nearest place at which a series has a value: lines of one chart need not share their steps.
  function nearest(values, index) {
    for (let d = 0; d < values.length; d++) {
      if (K.known(values[index - d])) return index - d;
      if (K.known(values[index + d])) return index + d;
    }
    return null;
  }

  function paint(u, kind, width, alpha, draw) {
    const c = u.ctx;
    c.save();
    c.globalAlpha = alpha;
    c.strokeStyle = c.fillStyle = css(kind);
    c.lineWidth = width * devicePixelRatio;
    c.beginPath();
    draw(c, devicePixelRatio);
    c.restore();
  }

  function reference(u, spec, across) {
    if (!spec.reference) return;
    const { left, top, width, height } = u.bbox, at = u.valToPos(spec.reference[0], "y", true);
    paint(u, "muted", 1, 1, (c, ratio) => {
      c.setLineDash([2 * ratio, 3 * ratio]);
      if (across) { c.moveTo(at, top); c.lineTo(at, top + height); } else { c.moveTo(left, at); c.lineTo(left + width, at); }
      c.stroke();
      c.font = u.axes[0].font[0];
      c.textAlign = "right";
      const far = across && at < left + width / 2;
      if (far) c.textAlign = "left";
      c.fillText(spec.reference[1], across ? at + (far ? 4 : -4) * ratio : left + width - 4 * ratio, across ? top + 10 * ratio : at - 4 * ratio);
    });
  }

  // ---- what uPlot is told

  function lines(spec, log) {
    const tables = [], series = [{}], bands = [], owner = [null];
    const add = (line, xs, ys, look) => { tables.push([xs, ys]); series.push(look); owner.push(line); return series.length - 1; };
    const places = spec.lines.map((line, n) => {
      const ink = () => css("c" + line.colour);
      const hidden = { stroke: ink, paths: () => null, points: { show: false } };
      const [xs, ys] = line.points.length ? line.points : [[], []];
      for (const [bx, by] of line.behind || []) add(n, bx, by, { stroke: () => ink() + "55", width: 1, points: { show: false } });
      if (line.band) {
        const [bx, low, high] = line.band;
        const edges = [high, low].map((edge) => add(n, bx, edge, { stroke: "transparent", width: 0, points: { show: false } }));
        bands.push({ series: edges, fill: () => ink() + "2b" });
      }
      if (line.whiskers) {
        const [wx, low, high] = line.whiskers;
        add(n, wx, low, hidden);
        add(n, wx, high, hidden);
      }
      return add(n, xs, ys, {
        label: line.name, stroke: ink, width: 2, dash: line.dashed ? [5, 4] : [],
        points: { show: Boolean(line.dots), size: 7, fill: ink, stroke: () => css("paper"), width: 1 },
      });
    });
    const xs = spec.lines.flatMap((line) => line.points[0] || []);
    const whole = xs.every(Number.isInteger);
    return {
      data: tables.some(([x]) => x.length) ? uPlot.join(tables) : [[], ...tables.map(() => [])],
      places, owner,
      options: {
        series, bands,
        scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: fitted(spec, log), clamp: (u, value, low) => low } },
        axes: [
          axis({ incrs: whole ? NICE.filter((n) => n >= 1) : NICE, space: 46, grid: { show: false } }),
          axis({ scale: "y", size: room, space: 34, ...(log ? { splits: decades, filter: (u, splits) => splits } : {}) }),
        ],
        hooks: { draw: [(u) => { reference(u, spec, false); spec.lines.forEach((line, n) => whiskers(u, line, u.series[places[n]].show)); }] },
      },
    };
  }

  function whiskers(u, line, shown) {
    if (!line.whiskers || !shown) return;
    const [xs, lows, highs] = line.whiskers;
    paint(u, "c" + line.colour, 2, 0.5, (c) => {
      xs.forEach((x, i) => {
        const at = u.valToPos(x, "x", true);
        c.moveTo(at, u.valToPos(lows[i], "y", true));
        c.lineTo(at, u.valToPos(highs[i], "y", true));
      });
      c.stroke();
    });
  }

  function dots(spec) {
    const rows = spec.rows;
    const ends = rows.flatMap((row) => [row.mean, ...row.interval, ...row.values]).filter(K.known);
    const names = (u) => {
      u.ctx.font = u.axes[0].font[0];
      const most = (u.width / 2) * devicePixelRatio;
      return rows.map(({ name }) => {
        const letters = [...name];
        while (letters.length > 1 && u.ctx.measureText(letters.join("") + "…").width > most) letters.pop();
        return letters.length < [...name].length ? letters.join("") + "…" : name;
      });
    };
    const draw = (u) => {
      reference(u, spec, true);
      rows.forEach((row, i) => {
        const y = u.valToPos(i, "x", true), x = (value) => u.valToPos(value, "y", true);
        const ring = (c, value, size) => { c.moveTo(x(value) + size, y); c.arc(x(value), y, size, 0, 7); };
        if (row.interval.length) paint(u, "c" + row.colour, 2, 0.5, (c) => { c.moveTo(x(row.interval[0]), y); c.lineTo(x(row.interval[1]), y); c.stroke(); });
        paint(u, "c" + row.colour, 1.2, 0.75, (c, ratio) => { row.values.filter(K.known).forEach((value) => ring(c, value, 3 * ratio)); c.stroke(); });
        paint(u, "c" + row.colour, 1, 1, (c, ratio) => { ring(c, row.mean, 4.6 * ratio); c.fill(); });
      });
    };
    return {
      data: [rows.map((_, i) => i), rows.map((row) => row.mean)], places: [], owner: [null, null],
      options: {
        series: [{}, { stroke: "transparent", points: { show: false } }],
        scales: {
          x: { time: false, ori: 1, dir: -1, range: [-0.5, rows.length - 0.5] },
          y: { ori: 0, dir: 1, range: (u) => fitted(spec)(u, Math.min(...ends), Math.max(...ends)) },
        },
        axes: [
          axis({ side: 3, size: room, splits: () => rows.map((_, i) => i), values: names, grid: { show: false }, stroke: () => css("ink") }),
          axis({ scale: "y", side: 2, space: 46 }),
        ],
        hooks: { draw: [draw] },
      },
    };
  }

  function belief(spec) {
    const made = lines({ ...spec, limits: [null, null] }, false);
    const [xs] = spec.lines[0].points, [rewards, counts] = spec.seen;
    const pad = 0.06 * (spec.limits[1] - spec.limits[0]);
    made.options.axes = [{ show: false }, { show: false }];
    made.options.scales = { x: { time: false, range: spec.steps[1] > spec.steps[0] ? spec.steps : [spec.steps[0] - 1, spec.steps[0] + 1] }, y: { range: [spec.limits[0] - pad, spec.limits[1] + pad] } };
    made.options.padding = [0, 4, 0, 4];
    made.options.hooks = {
      draw: [(u) => paint(u, "c1", 1, 0.62, (c, ratio) => {
        xs.forEach((x, i) => {
          if (!K.known(rewards[i])) return;
          const [at, y] = [u.valToPos(x, "x", true), u.valToPos(rewards[i], "y", true)];
          c.moveTo(at, y);
          c.arc(at, y, ratio * Math.min(3.4, 0.9 + 0.55 * Math.sqrt(Math.max(counts[i], 0))), 0, 7);
        });
        c.fill();
      })],
    };
    return made;
  }

  const MAKERS = { lines, dots, belief };

  // ---- what stands around it

  const slug = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "chart";

  // A cell that a spreadsheet takes for nothing but text: a leading = + - @ would be a formula.
  function cell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  }

  function table(spec) {
    if (spec.kind === "dots") {
      const most = Math.max(0, ...spec.rows.map((row) => row.values.length));
      const seeds = [...Array(most).keys()].map((i) => "value " + (i + 1));
      return [["name", spec.x, "low", "high", ...seeds], ...spec.rows.map((row) => [row.name, row.mean, row.interval[0], row.interval[1], ...seeds.map((_, i) => row.values[i])])];
    }
    const heads = [spec.x], tables = [];
    const column = (name, xs, ys) => { heads.push(name); tables.push([xs, ys]); };
    for (const line of spec.lines) {
      if (!line.points.length) continue;
      column(line.name, ...line.points);
      for (const [xs, low, high] of [line.band, line.whiskers].filter(Boolean)) { column(line.name + ", low", xs, low); column(line.name + ", high", xs, high); }
      (line.behind || []).forEach(([xs, ys], i) => column(line.name + ", raw" + (i ? " " + (i + 1) : ""), xs, ys));
    }
    if (!tables.length) return [heads];
    const joined = uPlot.join(tables);
    return [heads, ...joined[0].map((_, i) => joined.map((values) => values[i]))];
  }

  function save(name, kind, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function button(parent, text, action) {
    const made = K.put(parent, "button", "tool", text);
    made.type = "button";
    made.addEventListener("click", action);
    return made;
  }

  const swatch = (parent, line) => {
    const svg = K.draw(parent, "svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    K.draw(svg, "path", { class: "s" + line.colour, d: "M1 5H25", ...(line.dashed ? { "stroke-dasharray": "5 4" } : {}) });
  };

  function show(holder) {
    const spec = JSON.parse(holder.querySelector("script").textContent);
    const title = holder.closest("figure")?.querySelector("figcaption b")?.textContent || spec.y || spec.x;
    holder.setAttribute("aria-label", [spec.y || title, (spec.lines || spec.rows).map((part) => part.name).join(", ")].filter(Boolean).join(": "));
    if (spec.y) K.put(holder, "p", "unit", spec.y);
    const place = K.put(holder, "div", "plot");
    const said = K.put(holder, "p", "said");
    const list = spec.kind === "lines" ? K.put(holder, "ul", "names") : null;
    const outputs = [], switches = [];
    let u = null, made = null;

    const number = (value) => (K.known(value) ? tick(Number(value.toPrecision(4))) : "–");
    function tell(index) {
      if (spec.kind === "dots") {
        const row = spec.rows[index];
        said.textContent = row ? row.name + ": " + number(row.mean) + (row.interval.length ? " (" + row.interval.map(number).join(" to ") + ")" : "") : spec.x;
      } else if (spec.kind === "belief") {
        const { points: [xs, means], band: [, low, high] } = spec.lines[0];
        const at = index === null ? null : nearest(means, index), inside = (value) => number(Math.min(Math.max(value, spec.limits[0]), spec.limits[1]));
        said.textContent = at === null ? "" : "step " + xs[at] + ": " + number(means[at]) + " (" + inside(low[at]) + " to " + inside(high[at]) + ")"
          + (K.known(spec.seen[0][at]) ? ", mean of " + spec.seen[1][at] + ": " + number(spec.seen[0][at]) : "");
      } else {
        made.places.forEach((s, n) => {
          const values = made.data[s], at = values.length ? nearest(values, index ?? values.length - 1) : null;
          outputs[n].textContent = at === null ? "–" : number(values[at]);
        });
        said.textContent = spec.x + (index === null ? "" : " " + tick(made.data[0][index]));
      }
    }

    function draw(log) {
      u?.destroy();
      made = MAKERS[spec.kind](spec, log);
      const still = spec.kind !== "lines";
      u = new uPlot({
        width: Math.max(120, place.clientWidth), height: spec.height, legend: { show: false }, padding: [8, 12, 0, 0],
        cursor: { drag: { x: !still, y: false }, y: false, points: { show: spec.kind !== "dots", size: 7 } },
        ...made.options,
        hooks: {
          ...made.options.hooks,
          setCursor: [() => tell(u?.cursor.idx ?? null)],
          setScale: [(chart, key) => { if (key === "x" && u) zoomed(); }],
        },
      }, made.data, place);
      switches.forEach((box, n) => { if (!box.checked) turn(n, false); });
      tell(null);
    }

    const turn = (n, on) => made.owner.forEach((line, s) => { if (line === n) u.setSeries(s, { show: on }); });
    if (list) {
      spec.lines.forEach((line, n) => {
        const label = K.put(K.put(list, "li"), "label");
        const box = K.put(label, "input");
        box.type = "checkbox";
        box.checked = true;
        switches.push(box);
        swatch(label, line);
        K.put(label, "span", "", line.name).title = line.name;
        outputs.push(K.put(label, "output"));
        box.addEventListener("change", () => turn(n, box.checked));
      });
    }

    let zoomed = () => {};
    if (spec.kind !== "belief") {
      const tools = K.put(holder, "p", "tools");
      if (list) {
        const label = K.put(tools, "label", "tool");
        const box = K.put(label, "input");
        box.type = "checkbox";
        box.checked = Boolean(spec.log);
        label.append(" log scale");
        box.addEventListener("change", () => draw(box.checked));
        const view = K.put(tools, "input");  // what is zoomed into, for a viewer that sets fields as they were
        view.type = "hidden";
        const whole = () => { const xs = made.data[0]; u.setScale("x", { min: xs[0], max: xs[xs.length - 1] }); };
        const back = button(tools, "whole range", whole);
        back.hidden = true;
        zoomed = () => {
          const xs = made.data[0], { min, max } = u.scales.x;
          const all = !(min > xs[0] || max < xs[xs.length - 1]);
          back.hidden = all;
          view.value = all ? "" : min + " " + max;
        };
        view.addEventListener("change", () => {
          const [min, max] = view.value.split(" ").map(Number);
          if (min < max) u.setScale("x", { min, max });
        });
      }
      button(tools, "CSV", () => save(slug(title) + ".csv", "text/csv", table(spec).map((row) => row.map(cell).join(",") + "\r\n").join("")));
      button(tools, "JSON", () => save(slug(title) + ".json", "application/json", JSON.stringify({ title, ...spec }, null, 1)));
    }

    draw(Boolean(spec.log));
    redraws.push(() => u.redraw(false));
    new ResizeObserver(() => {
      const width = Math.max(120, place.clientWidth);
      if (place.clientWidth && width !== u.width) u.setSize({ width, height: spec.height });
    }).observe(place);
  }

  for (const holder of document.querySelectorAll("[data-chart]")) show(holder);
  const again = () => redraws.forEach((redraw) => redraw());
  new MutationObserver(again).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);

  return { axis, css, paint, tick, whenTheme: (redraw) => redraws.push(redraw) };
})();
