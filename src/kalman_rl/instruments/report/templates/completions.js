// The table of completions: search, order, and the way to their tokens.
(() => {
  const root = K.byId("listed"), source = K.byId("completions-data");
  if (!root || !source) return;
  const data = JSON.parse(source.textContent);
  const STEP = 50;
  const state = { sort: "", down: true, shown: STEP };
  const several = data.runs.length > 1;
  const answers = data.rows.some((row) => row[4]);
  const inspected = JSON.parse(K.byId("inspector-data")?.textContent || '{"runs": [], "completions": []}');
  const name = (run, step, sequence) => JSON.stringify([run, step, sequence]);
  const tokens = new Set(inspected.completions.map((c) => name(inspected.runs[c.run].run, c.step, c.sequence)));
  const texts = data.rows.map((row) => [data.runs[row[0]], data.prompts[row[3]], row[4], row[5]].join("\n").toLowerCase());

  const columns = [
    ...(several ? [{ name: "run", text: (row) => data.runs[row[0]] }] : []),
    { name: "step", number: (row) => row[1] },
    { name: "prompt", kind: "asked", text: (row) => data.prompts[row[3]] },
    { name: "completion", kind: "asked", text: (row) => row[5] },
    ...(answers ? [{ name: "expected", kind: "asked", text: (row) => row[4] }] : []),
    ...data.numbers.map((title, n) => ({ name: title, number: (row) => row[6][n] })),
  ];

  function chosen() {
    const words = K.byId("listed-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = data.rows.map((_, i) => i).filter((i) => words.every((word) => texts[i].includes(word)));
    const by = columns.find((column) => column.name === state.sort);
    if (!by) return found;
    const value = (i) => by.number(data.rows[i]);
    const side = state.down ? 1 : -1;
    return found.sort((a, b) => (K.known(value(b)) - K.known(value(a))) || side * (value(b) - value(a)) || a - b);
  }

  function show() {
    const found = chosen();
    const body = root.querySelector("tbody");
    body.replaceChildren();
    for (const i of found.slice(0, state.shown)) {
      const row = data.rows[i], line = K.put(body, "tr");
      for (const column of columns) {
        const cell = K.put(line, "td", column.number ? "num" : column.kind || "", column.number ? K.short(column.number(row)) : column.text(row));
        if (column.name === "completion" && tokens.has(name(data.runs[row[0]], row[1], row[2]))) {
          const button = K.put(cell, "button", "tool", "tokens");
          button.type = "button";
          button.addEventListener("click", () => {
            const field = K.byId("chosen");
            field.value = JSON.stringify([data.runs[row[0]], row[1], row[2], 0]);
            field.dispatchEvent(new Event("change"));
            K.byId("tokens-section").scrollIntoView();
          });
        }
      }
    }
    K.byId("listed-count").textContent = found.length + " of " + data.rows.length;
    K.byId("listed-more").hidden = found.length <= state.shown;
  }

  const head = K.put(root.querySelector("thead"), "tr");
  for (const column of columns) {
    const heading = K.put(head, "th", column.number ? "num" : "");
    if (!column.number) { heading.textContent = column.name; continue; }
    const button = K.put(heading, "button", "sort", column.name);
    button.type = "button";
    button.addEventListener("click", () => {
      state.down = state.sort === column.name ? !state.down : true;
      state.sort = column.name;
      for (const other of head.children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      show();
    });
  }
  K.byId("listed-search").addEventListener("input", () => { state.shown = STEP; show(); });
  K.byId("listed-more").addEventListener("click", () => { state.shown += STEP; show(); });
  root.hidden = false;
  show();
})();
