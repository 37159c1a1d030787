// The tree of sites with cost bars. Only the rows in view are in the document, so that its length does not matter.
const Tree = (() => {
  const HEIGHT = 26;
  const MARGIN = 8;
  const marks = { removed: "−", added: "+", changed: "~", same: "" };
  const box = document.getElementById("tree");
  const head = document.getElementById("tree-head");
  const spacer = document.createElement("div");
  spacer.className = "spacer";
  let rows = [];
  let cursor = 0;

  const flatten = (group, found) => {
    for (const item of group.items) {
      found.push(item);
      if (!item.row && State.isOpen(item)) flatten(item, found);
    }
    return found;
  };

  const sumsOf = (item) => {
    const { key } = State.measure;
    return Model.sides.map((_, s) => {
      if (item.row) return item.nodes[s] ? item.nodes[s][key] : null;
      return Model.has(item, s) ? item.sums[s][key] : null;
    });
  };

  const isSelected = (item) => {
    const chosen = State.selected;
    return chosen !== null && (item === chosen || (item.row === true && item.nodes.includes(chosen)));
  };

  const span = (name, text) => {
    const made = document.createElement("span");
    made.className = name;
    made.textContent = text;
    return made;
  };

  // Shares of the site around; the longer bar of a pair is the larger side.
  const bars = (item, values) => {
    const made = span("bars", "");
    const around = (item.row ? item.group : item.parent).sums.map((sum) => sum[State.measure.key]);
    const longest = Math.max(...around);
    values.forEach((value, s) => {
      const line = document.createElement("i");
      if (Model.two && s === 0) line.className = "old";
      const fill = document.createElement("b");
      const share = longest ? (value ?? 0) / longest : 0;
      if (share > 0) {
        fill.style.width = `${(100 * share).toFixed(1)}%`;
        line.append(fill);
      }
      const whole = Model.root.sums[s][State.measure.key];
      line.title = value ? `${Format.percent(value / around[s])} of the site around, ${Format.percent(value / whole)} of the whole` : "";
      made.append(line);
    });
    return made;
  };

  const label = (item) => {
    const made = span("label", "");
    made.style.setProperty("--level", item.row ? item.group.depth : item.depth - 1);
    const twist = span("twist", item.row ? "" : "▸");
    made.append(twist);
    if (Model.two) made.append(span("mark", marks[item.status]));
    if (item.row) {
      made.append(span("name", Model.title(item.node)));
      made.append(span("more", item.node.name));
    } else {
      made.append(span("swatch", ""), span("name site", item.label));
      const more = item.detail || item.origin;
      if (more) made.append(span("more", more));
    }
    return made;
  };

  const describe = (item) => {
    const more = item.row ? [item.node.name, item.node.type, item.node.origin] : [item.detail, item.origin, item.note];
    return [item.row ? Model.title(item.node) : item.label, ...more].filter(Boolean).join("\n");
  };

  const line = (item, at) => {
    const values = sumsOf(item);
    const made = document.createElement("div");
    made.className = `row k-${item.kind ?? "operator"}`;
    if (Model.two && item.status !== "same") made.classList.add(item.status);
    made.classList.toggle("selected", isSelected(item));
    made.classList.toggle("hit", item.row ? item.nodes.some((n) => State.hits.nodes.has(n)) : State.hits.groups.has(item));
    made.id = `row-${at}`;
    made.style.top = `${at * HEIGHT}px`;
    made.dataset.at = at;
    made.title = describe(item);
    made.setAttribute("role", "row");
    made.setAttribute("aria-level", item.row ? item.group.depth + 1 : item.depth);
    made.setAttribute("aria-rowindex", at + 1);
    made.setAttribute("aria-selected", String(isSelected(item)));
    if (!item.row) made.setAttribute("aria-expanded", String(State.isOpen(item)));
    const cell = label(item);
    cell.setAttribute("role", "rowheader");
    const show = (value) => (value ? State.measure.show(value) : value === null ? "" : "–");
    const numbers = Model.two
      ? values.map((value) => span("number", show(value)))
      : [span("number count", item.row ? "" : Format.count(item.sums[0].count)), span("number", show(values[0]))];
    for (const number of numbers) number.setAttribute("role", "gridcell");
    made.append(cell, ...numbers, bars(item, values));
    return made;
  };

  const draw = () => {
    const first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - MARGIN);
    const last = Math.min(rows.length, Math.ceil((box.scrollTop + box.clientHeight) / HEIGHT) + MARGIN);
    spacer.style.height = `${rows.length * HEIGHT}px`;
    spacer.replaceChildren();
    for (let at = first; at < last; at += 1) spacer.append(line(rows[at], at));
    box.setAttribute("aria-rowcount", rows.length);
    if (rows[cursor]) box.setAttribute("aria-activedescendant", `row-${cursor}`);
    drawHead();
  };

  const drawHead = () => {
    const values = Model.root.sums.map((sum) => State.measure.show(sum[State.measure.key]));
    const columns = Model.two ? ["before", "after", "of site"] : ["ops", State.measure.label, "of site"];
    const total = `whole: ${values.join(" → ")}`;
    head.replaceChildren(span("", total), ...columns.map((name) => span("", name)));
  };

  const show = (at) => {
    if (at < 0) return;
    cursor = at;
    const top = at * HEIGHT;
    if (top < box.scrollTop || top + HEIGHT > box.scrollTop + box.clientHeight) {
      box.scrollTop = top - box.clientHeight / 2 + HEIGHT;
    }
  };

  const placeOf = (chosen) => rows.findIndex((item) => item === chosen || (item.row && item.nodes.includes(chosen)));

  // What a selected row stands for: a group, or a node (of the first side where there are both).
  const pick = (at) => {
    cursor = Math.max(0, Math.min(rows.length - 1, at));
    const item = rows[cursor];
    State.select(item.row ? item.node : item, "tree");
    show(cursor);
    draw();
  };

  const onKey = (event) => {
    const item = rows[cursor];
    const page = Math.max(1, Math.floor(box.clientHeight / HEIGHT) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -rows.length, End: rows.length };
    if (event.key in moves) pick(cursor + moves[event.key]);
    else if (event.key === "ArrowRight" && item && !item.row && !State.isOpen(item)) State.setOpen(item, true);
    else if (event.key === "ArrowRight" && item && !item.row) pick(cursor + 1);
    else if (event.key === "ArrowLeft" && item && !item.row && State.isOpen(item)) State.setOpen(item, false);
    else if (event.key === "ArrowLeft" && item) pick(placeOf(item.row ? item.group : item.parent));
    else if ((event.key === "Enter" || event.key === " ") && item && !item.row) State.setOpen(item, !State.isOpen(item));
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  const start = () => {
    box.append(spacer);
    const refresh = () => {
      rows = flatten(Model.root, []);
      const at = State.selected ? placeOf(State.selected) : -1;
      cursor = at >= 0 ? at : Math.min(cursor, rows.length - 1);
      draw();
    };
    State.on("open", refresh);
    State.on("measure", draw);
    State.on("hits", draw);
    State.on("select", ({ item, from }) => {
      if (from !== "tree" && item) show(placeOf(item));
      draw();
    });
    box.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    new ResizeObserver(draw).observe(box);
    box.addEventListener("keydown", onKey);
    box.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (!row) return;
      const item = rows[row.dataset.at];
      if (event.target.closest(".twist") && !item.row) State.setOpen(item, !State.isOpen(item));
      else pick(Number(row.dataset.at));
    });
    box.addEventListener("dblclick", (event) => {
      const row = event.target.closest(".row");
      const item = row && rows[row.dataset.at];
      if (item && !item.row && !event.target.closest(".twist")) State.setOpen(item, !State.isOpen(item));
    });
    refresh();
  };

  return { start };
})();
