// The token inspector: one completion as text, its strips, one token in numbers, the tokens changed most.
(() => {
  const root = K.byId("inspector");
  const source = K.byId("inspector-data");
  if (!root || !source) return;
  const data = JSON.parse(source.textContent);
  const MODES = ["raw", "filtered", "difference", "coefficient"];
  const MARKS = { "\n": "↵\n", "\t": "⇥", "\r": "␍" };
  const MAX_LISTED = 20;
  const state = { completion: 0, token: 0, mode: "raw", method: 0, order: "changed", rank: "change" };

  const current = () => data.completions[state.completion];
  const methods = (completion) => data.runs[completion.run].methods.slice(0, completion.by.length);
  const weight = (completion, i, m = state.method) => completion.by[Math.min(m, completion.by.length - 1)][0][i];
  const coefficient = (completion, i, m = state.method) => completion.by[Math.min(m, completion.by.length - 1)][1][i];
  const mark = (completion, i, m = state.method) => completion.by[Math.min(m, completion.by.length - 1)][2][i];
  const kept = (completion, i, m) => mark(completion, i, m) === "1";
  const raw = (completion, i) => (completion.raw ? completion.raw[i] : null);

  function value(completion, i, mode = state.mode, m = state.method) {
    if (mode === "raw") return raw(completion, i);
    if (mode === "filtered") return weight(completion, i, m);
    if (mode === "difference") {
      const [w, r] = [weight(completion, i, m), raw(completion, i)];
      return K.known(w) && K.known(r) ? w - r : null;
    }
    const c = coefficient(completion, i, m);
    return kept(completion, i, m) && c > 0 ? Math.log(c) : null;
  }

  const changes = (completion) => completion.token.map((_, i) => Math.abs(value(completion, i, "difference", 0) ?? 0));
  const largest = (completion) => Math.max(0, ...(completion.raw || []).map((r) => Math.abs(r ?? 0)));
  const dropped = (completion) => [...completion.by[0][2]].filter((m) => m !== "1").length / completion.token.length;
  const facts = data.completions.map((c) => {
    const all = changes(c);
    return { changed: all.reduce((a, b) => a + b, 0) / all.length, largest: largest(c), clipped: dropped(c) };
  });
  const ORDERS = {
    changed: ["most changed by the filter", (i) => facts[i].changed, (i) => "mean change " + K.short(facts[i].changed)],
    largest: ["largest log-ratio", (i) => facts[i].largest, (i) => "largest " + K.short(facts[i].largest)],
    clipped: ["most tokens clipped", (i) => facts[i].clipped, (i) => Math.round(100 * facts[i].clipped) + "% clipped"],
    reward: ["highest reward", (i) => data.completions[i].reward ?? -Infinity, (i) => "reward " + K.short(data.completions[i].reward)],
    step: ["latest step", (i) => data.completions[i].step, (i) => "reward " + K.short(data.completions[i].reward)],
  };

  const scales = data.completions.map((c) => largest(c) || 1);
  const scale = () => (state.mode === "coefficient" ? 0.2 : scales[state.completion]);
  function shade(v, full = scale()) {
    if (!K.known(v) || v === 0) return "z";
    const level = Math.min(5, Math.round(5 * Math.sqrt(Math.min(1, Math.abs(v) / full))));
    return level === 0 ? "z" : (v > 0 ? "p" : "n") + level;
  }

  // ---- the list of completions

  function fillList() {
    const list = K.byId("completions");
    list.replaceChildren();
    const [, key, said] = ORDERS[state.order];
    const order = data.completions.map((_, i) => i).sort((a, b) => key(b) - key(a) || a - b);
    for (const i of order) {
      const c = data.completions[i];
      const item = K.put(list, "li", "pick");
      item.dataset.item = i;
      item.setAttribute("role", "option");
      const name = data.runs.length > 1 ? data.runs[c.run].run + ", " : "";
      K.put(item, "span", "excerpt", c.token.slice(0, 40).join("").replace(/\s+/g, " ").slice(0, 60) || "∅");
      K.put(item, "span", "muted", name + "step " + c.step);
      K.put(item, "span", "muted", said(i));
      item.addEventListener("click", () => open(i, 0));
    }
    markList();
  }

  function markList() {
    for (const item of K.byId("completions").children) {
      const chosen = Number(item.dataset.item) === state.completion;
      item.setAttribute("aria-selected", chosen);
      item.tabIndex = chosen ? 0 : -1;
    }
  }

  // ---- the completion as text

  function showText() {
    const c = current();
    K.byId("prompt").textContent = c.prompt;
    K.byId("expected").textContent = c.answer;
    K.byId("expected").hidden = !c.answer;
    const told = ["step " + c.step, "completion " + c.sequence];
    if (data.runs.length > 1) told.unshift(data.runs[c.run].run);
    if (K.known(c.reward)) told.push("reward " + K.short(c.reward));
    if (K.known(c.advantage)) told.push("advantage " + K.short(c.advantage, true));
    if (c.cut) told.push(c.cut + " more tokens not shown");
    K.byId("earned").textContent = told.join(" · ");
    const text = K.byId("tokens");
    text.replaceChildren();
    c.token.forEach((token, i) => {
      const shown = token === "" ? "∅" : token.replace(/[\n\t\r]/g, (char) => MARKS[char]);
      const node = K.put(text, "span", "", shown);
      node.dataset.item = i;
      node.setAttribute("role", "option");
      node.addEventListener("mouseenter", () => peek(i));
      node.addEventListener("focus", () => pick(i));
      node.addEventListener("click", () => pick(i));
    });
    paint();
  }

  function paint() {
    const c = current();
    [...K.byId("tokens").children].forEach((node, i) => {
      const lost = state.mode === "coefficient" && !kept(c, i);
      node.className = "tok " + (lost ? "dropped" : shade(value(c, i)));
      node.tabIndex = i === state.token ? 0 : -1;
      node.setAttribute("aria-selected", i === state.token);
      node.setAttribute("aria-label", (c.token[i] || "empty token") + ", " + spoken(c, i));
    });
    const [low, high] = [K.byId("scale-low"), K.byId("scale-high")];
    if (state.mode === "coefficient") {
      [low.textContent, high.textContent] = ["counts less, ×" + K.short(Math.exp(-0.2)), "×" + K.short(Math.exp(0.2)) + ", counts more"];
    } else {
      const size = K.short(scale());
      const words = state.mode === "difference" ? ["lowered by ", "raised by "] : ["less likely, −", "likelier, +"];
      [low.textContent, high.textContent] = [words[0] + size, words[1] + size];
    }
    K.byId("scale-clipped").hidden = state.mode !== "coefficient";
  }

  const spoken = (c, i) => "log-ratio " + K.short(raw(c, i)) + ", filtered " + K.short(weight(c, i)) + ", " + fate(c, i);

  // ---- one token in numbers

  function fate(c, i, m = state.method) {
    const at = mark(c, i, m);
    const rule = methods(c)[Math.min(m, methods(c).length - 1)];
    if (at === "1") return c.advantage === 0 ? "kept, but the advantage is 0" : "kept";
    if (!K.known(weight(c, i, m))) return "dropped, as recorded";
    const w = Math.exp(weight(c, i, m));
    if (K.known(rule.dual) && c.advantage < 0 && w > rule.dual) return "clipped: weight " + K.short(w) + " above the dual bound " + K.short(rule.dual);
    if (K.known(rule.high) && at === "h") return "clipped: advantage > 0 and weight " + w.toPrecision(5) + " above " + (1 + rule.high).toPrecision(5);
    if (K.known(rule.low) && at === "l") return "clipped: advantage < 0 and weight " + w.toPrecision(5) + " below " + (1 - rule.low).toPrecision(5);
    return "dropped by " + (rule.trust || "the trust region");
  }

  function showToken(i) {
    const c = current();
    const panel = K.byId("token");
    panel.replaceChildren();
    K.put(panel, "p", "big", JSON.stringify(c.token[i]).slice(1, -1) || "∅");
    K.put(panel, "p", "muted", "token " + (i + 1) + " of " + c.token.length + (c.id ? ", id " + c.id[i] : ""));
    const rows = [
      ["probability", K.percent(c.old?.[i]) + " → " + K.percent(c.now?.[i])],
      ["log-ratio", K.short(raw(c, i), true)],
      ["log-weight", K.short(weight(c, i), true)],
      ["changed by", K.short(value(c, i, "difference"), true)],
    ];
    if (state.method === 0 && c.gain) rows.push(["gain", K.short(c.gain[i])]);
    if (state.method === 0 && c.innovation) rows.push(["innovation", K.short(c.innovation[i], true)]);
    if (state.method === 0 && c.deviation) rows.push(["posterior ± 2 sd", "± " + K.short(2 * c.deviation[i])]);
    rows.push(["coefficient", K.short(coefficient(c, i))]);
    const list = K.put(panel, "dl");
    for (const [name, text] of rows) {
      const pair = K.put(list, "div");
      K.put(pair, "dt", "", name);
      K.put(pair, "dd", "", text);
    }
    K.put(panel, "p", kept(c, i) ? "fate" : "fate lost", fate(c, i));
    const table = K.put(panel, "table");
    const head = K.put(K.put(table, "thead"), "tr");
    for (const name of ["method", "log-weight", "coef."]) K.put(head, "th", name === "method" ? "" : "num", name);
    const body = K.put(table, "tbody");
    methods(c).forEach((method, m) => {
      const row = K.put(body, "tr", m === state.method ? "here" : "");
      K.put(row, "td", "", method.name + (method.recorded ? "*" : ""));
      K.put(row, "td", "num", K.short(weight(c, i, m), true));
      K.put(row, "td", "num", kept(c, i, m) ? K.short(coefficient(c, i, m)) : "clipped");
    });
    K.put(panel, "p", "muted", "* as recorded; the others recomputed as kalman-rl replay does.");
  }

  // ---- the tokens changed most

  function fillChanged() {
    const body = K.byId("changed").tBodies[0];
    const every = [];
    data.completions.forEach((c, n) => c.token.forEach((_, i) => every.push([n, i])));
    const keys = {
      change: ([n, i]) => Math.abs(value(data.completions[n], i, "difference", 0) ?? 0),
      ratio: ([n, i]) => Math.abs(raw(data.completions[n], i) ?? 0),
      others: ([n, i]) => disagreement(data.completions[n], i),
    };
    const key = keys[state.rank];
    const ranked = every.map((pair) => [key(pair), pair]).sort((a, b) => b[0] - a[0]).slice(0, MAX_LISTED);
    body.replaceChildren();
    for (const [, [n, i]] of ranked) {
      const c = data.completions[n];
      const row = K.put(body, "tr");
      row.dataset.place = n + ":" + i;
      const cell = K.put(row, "td", "context");
      const button = K.put(cell, "button", "jump");
      button.type = "button";
      const line = (tokens) => tokens.join("").replace(/\s/g, (char) => (char === " " ? char : "↵"));
      K.put(button, "span", "muted", line(c.token.slice(Math.max(0, i - 6), i)).slice(-24));
      K.put(button, "b", shade(raw(c, i), scales[n]), line([c.token[i]]) || "∅");
      K.put(button, "span", "muted", line(c.token.slice(i + 1, i + 7)).slice(0, 24));
      button.addEventListener("click", () => { open(n, i); focusToken(i); });
      K.put(row, "td", "num", String(c.step));
      K.put(row, "td", "num", K.short(raw(c, i), true));
      K.put(row, "td", "num", K.short(weight(c, i, 0), true));
      K.put(row, "td", "num", K.short(value(c, i, "difference", 0), true));
      K.put(row, "td", "num", K.short(disagreement(c, i)));
      K.put(row, "td", "", kept(c, i, 0) ? "kept" : "clipped");
    }
    for (const heading of K.byId("changed").querySelectorAll("th[data-rank]")) {
      const chosen = heading.dataset.rank === state.rank;
      if (chosen) heading.setAttribute("aria-sort", "descending"); else heading.removeAttribute("aria-sort");
    }
  }

  function disagreement(c, i) {
    const all = c.by.map((_, m) => coefficient(c, i, m)).filter(K.known);
    return all.length ? Math.max(...all) - Math.min(...all) : 0;
  }

  // ---- moving about

  function open(n, i) {
    state.completion = n;
    state.token = i;
    fillMethods();
    markList();
    showText();
    showToken(i);
    strips();
    remember();
  }

  // What is open, for a viewer that loads a newer page and sets its fields as they were.
  const nameOf = (c) => [data.runs[c.run].run, c.step, c.sequence];
  function remember() {
    K.byId("chosen").value = JSON.stringify([...nameOf(current()), state.token]);
  }
  function recall() {
    try {
      const [run, step, sequence, token] = JSON.parse(K.byId("chosen").value);
      const same = (c) => nameOf(c).every((part, k) => part === [run, step, sequence][k]);
      const n = data.completions.findIndex(same);
      if (n >= 0 && token in data.completions[n].token) open(n, token);
    } catch { /* not written by this page */ }
  }

  function pick(i) {
    const nodes = K.byId("tokens").children;
    for (const [old, on] of [[state.token, false], [i, true]]) {
      nodes[old].tabIndex = on ? 0 : -1;
      nodes[old].setAttribute("aria-selected", on);
    }
    state.token = i;
    remember();
    peek(i);
  }

  function peek(i) {
    showToken(i);
    KStrips.point(i);
  }

  function focusToken(i) {
    const node = K.byId("tokens").children[i];
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }

  function strips() {
    const c = current();
    KStrips.show(K.byId("strips"), {
      raw: c.raw, weight: c.by[Math.min(state.method, c.by.length - 1)][0],
      deviation: state.method === 0 ? c.deviation : null, gain: state.method === 0 ? c.gain : null,
      coefficient: c.token.map((_, i) => coefficient(c, i)), kept: c.token.map((_, i) => kept(c, i)),
      rows: methods(c).map((method, m) => ({
        name: method.name, here: m === state.method,
        cells: c.token.map((_, i) => (kept(c, i, m) ? shade(value(c, i, "coefficient", m), 0.2) : "dropped")),
      })),
    }, peek, (i) => { pick(i); focusToken(i); });
    KStrips.point(state.token);
  }

  function fillMethods() {
    const select = K.byId("method");
    select.replaceChildren();
    methods(current()).forEach((method, m) => {
      const option = K.put(select, "option", "", method.name + (method.recorded ? " (as recorded)" : ""));
      option.value = m;
    });
    state.method = Math.min(state.method, methods(current()).length - 1);
    select.value = String(state.method);
  }

  for (const [key, [name]] of Object.entries(ORDERS)) K.put(K.byId("order"), "option", "", name).value = key;
  K.byId("order").addEventListener("change", (event) => { state.order = event.target.value; fillList(); });
  K.byId("method").addEventListener("change", (event) => { state.method = Number(event.target.value); paint(); showToken(state.token); strips(); });
  for (const mode of MODES) {
    K.byId("mode-" + mode).addEventListener("change", () => { state.mode = mode; root.dataset.mode = mode; paint(); });
  }
  for (const heading of K.byId("changed").querySelectorAll("th[data-rank]")) {
    const button = K.put(null, "button", "sort", heading.textContent);
    button.type = "button";
    heading.replaceChildren(button);
    button.addEventListener("click", () => { state.rank = heading.dataset.rank; fillChanged(); });
  }
  K.roving(K.byId("tokens"), focusToken);
  K.roving(K.byId("completions"), (place) => {
    const item = K.byId("completions").children[place];
    open(Number(item.dataset.item), 0);
    item.focus();
  }, true);
  K.byId("tokens").addEventListener("mouseleave", () => peek(state.token));
  K.byId("chosen").addEventListener("change", recall);
  let width = 0;
  new ResizeObserver(() => {
    const now = K.byId("strips").clientWidth;
    if (now && now !== width) { width = now; strips(); }
  }).observe(K.byId("strips"));

  root.hidden = false;
  K.byId("inspector-off").hidden = true;
  root.dataset.mode = state.mode;
  if (!facts.some((fact) => fact.changed)) { state.order = "largest"; state.rank = "ratio"; K.byId("order").value = "largest"; }
  const [, rank] = ORDERS[state.order];
  state.completion = data.completions.map((_, i) => i).sort((a, b) => rank(b) - rank(a))[0];
  fillList();
  fillChanged();
  const c = current();
  const moved = state.rank === "ratio" ? c.token.map((_, i) => Math.abs(raw(c, i) ?? 0)) : changes(c);
  open(state.completion, moved.indexOf(Math.max(...moved)));
})();
