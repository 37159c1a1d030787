// Puts the parts together: header, keys, theme, and when what is drawn.
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const keys = [
    ["/", "search; op:  role:  name:  origin:  weight:  by: look in one field"],
    ["Esc", "select nothing: shows the whole model"],
    ["↑ ↓ ← →", "in the tree: move, open, close; in the graph: move along edges"],
    ["Enter", "open or close the selected site"],
    ["Backspace", "in the graph: select the site around"],
    ["Shift + arrows", "in the graph: pan (or drag)"],
    ["+  −  0", "zoom in, zoom out, show all (or turn the wheel)"],
    ["c  o", "collapse all, back to the overview"],
    ["m", "next cost"],
    ["t", "dark or light"],
    ...(Model.compression.length ? [["p", "what was compressed, with pictures"]] : []),
  ];

  // A page opened from a file may have no storage; then the choice lasts as long as the page.
  const remembered = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("graphlathe-theme", value);
      return localStorage.getItem("graphlathe-theme");
    } catch {
      return null;
    }
  };

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    byId("theme").textContent = theme === "dark" ? "☾" : "☀";
  };
  const flipTheme = () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme(theme);
    remembered(theme);
  };

  const header = () => {
    const small = (words, name = "") => Object.assign(document.createElement("small"), { textContent: words, className: name });
    const { params, macs } = Model.sides[0].totals;
    const after = Model.two ? Model.sides[1].totals : null;
    const compare = (key, label) => `${Format.short(Model.sides[0].totals[key])} → ${Format.short(after[key])} ${label} (${Format.change(Model.sides[0].totals[key], after[key])})`;
    const line = after ? `${compare("params", "parameters")}, ${compare("macs", "MACs")}` : `${Format.short(params)} parameters, ${Format.short(macs)} MACs`;
    const names = Model.two ? [Model.sides[0].title, small("→", "versus"), Model.sides[1].title] : [Model.sides[0].title];
    byId("title").append(...names, small(line));
    byId("title").title = byId("title").textContent;
    for (const { key, label } of Model.measures) byId("measure").append(new Option(label, key));
  };

  const help = () => {
    const rows = keys.map(([key, what]) => {
      const row = document.createElement("tr");
      const cells = [document.createElement("td"), document.createElement("td")];
      cells[0].append(Object.assign(document.createElement("kbd"), { textContent: key }));
      cells[1].textContent = what;
      row.append(...cells);
      return row;
    });
    const table = document.createElement("table");
    table.append(...rows);
    const licences = document.createElement("details");
    licences.append(Object.assign(document.createElement("summary"), { textContent: "Licences of the libraries in this page: d3, elkjs" }));
    licences.append(Object.assign(document.createElement("pre"), { textContent: byId("licences").textContent.trim() }));
    byId("help").replaceChildren(table, licences);
    byId("help").showModal();
  };

  header();
  setTheme(remembered() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  document.body.classList.toggle("two", Model.two);
  const graphs = Model.sides.map((_, side) => makeGraph(side, byId("views")));
  let layouts = 0;

  // One layout at a time; what is opened meanwhile is laid out together, afterwards.
  let busy = false;
  let next = null;

  const redraw = async (anchor) => {
    if (busy) {
      next = { anchor };
      return;
    }
    busy = true;
    root.dataset.busy = "";
    await redrawNow(anchor);
    busy = false;
    if (!next) delete root.dataset.busy;
    if (next) {
      const { anchor: later } = next;
      next = null;
      redraw(later);
    }
  };

  const redrawNow = async (anchor) => {
    try {
      const results = await Promise.all(graphs.map((graph) => graph.update(anchor)));
      const refused = results.find((result) => result.refused);
      byId("status").textContent = refused
        ? `${Format.count(refused.refused)} boxes are too many to draw (at most ${Format.count(Layout.MOST)}): collapse some`
        : "";
      layouts += 1;
      // For whoever measures: how many drawings there were, how long the last one took, and `busy` while one is made.
      root.dataset.layouts = layouts;
      root.dataset.milliseconds = Math.round(Math.max(...results.map((result) => result.ms ?? 0)));
    } catch (error) {
      byId("status").textContent = `the graph could not be laid out: ${error.message ?? error}`;
      console.error(error);
    }
  };

  const actions = {
    in: () => graphs.forEach((graph) => graph.zoomBy(1.3)),
    out: () => graphs.forEach((graph) => graph.zoomBy(1 / 1.3)),
    fit: () => graphs.forEach((graph) => graph.fit()),
    collapse: () => State.collapseAll(),
  };
  byId("tools").addEventListener("click", (event) => actions[event.target.dataset.do]?.());
  byId("theme").addEventListener("click", flipTheme);
  byId("keys").addEventListener("click", help);
  byId("help").addEventListener("click", (event) => event.target.closest("details") || byId("help").close());
  byId("measure").addEventListener("change", (event) => State.setMeasure(event.target.value));

  const nextMeasure = () => {
    const at = (Model.measures.indexOf(State.measure) + 1) % Model.measures.length;
    byId("measure").value = Model.measures[at].key;
    State.setMeasure(Model.measures[at].key);
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.closest("input, select")) return;
    const pressed = {
      "/": Search.focus,
      "?": help,
      Escape: () => State.select(null, "keys"),
      0: actions.fit,
      "+": actions.in,
      "-": actions.out,
      c: actions.collapse,
      o: () => State.overview(),
      m: nextMeasure,
      t: flipTheme,
      p: Pictures.show,
    }[event.key];
    if (!pressed) return;
    event.preventDefault();
    pressed();
  });

  // The tree's width, by dragging or with the arrow keys.
  const divider = byId("divider");
  const widen = (width) => root.style.setProperty("--tree", `${Math.max(180, Math.min(innerWidth - 400, width))}px`);
  divider.addEventListener("pointerdown", (event) => {
    divider.setPointerCapture(event.pointerId);
    divider.onpointermove = (move) => widen(move.clientX);
    divider.onpointerup = () => (divider.onpointermove = null);
  });
  divider.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -20, ArrowRight: 20 }[event.key];
    if (step) widen(byId("tree-pane").clientWidth + step);
  });

  State.overview();
  Tree.start();
  Details.start();
  Search.start();
  Pictures.start();
  State.on("open", redraw);
  State.on("measure", () => redraw(Model.root));
  redraw(null);
})();
