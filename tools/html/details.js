// What is known of the selected node, site or weight; of the whole model if nothing is selected.
const Details = (() => {
  const TOP = 6;
  const USERS = 12;
  const GAP = "\u0001";
  const box = document.getElementById("details");

  const make = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  };

  const link = (words, item) => {
    const made = make("a", { role: "button", tabindex: "0" }, words);
    const go = () => {
      if (!item.weight) State.reveal(item);
      State.select(item, "details");
    };
    made.addEventListener("click", go);
    made.addEventListener("keydown", (event) => event.key === "Enter" && go());
    return made;
  };

  const nodeOf = (side, id) => Model.sides[side].nodes[id];
  const badge = (status, words = status) => (status === "same" ? null : make("span", { class: `badge ${status}` }, words));
  const swatch = () => make("span", { class: "swatch" });
  const section = (title, ...content) => make("section", {}, make("h3", {}, title), ...content);

  // Rows of a table, with a value of each side; those that differ are marked.
  const table = (rows, columns) => {
    const body = make("table");
    if (columns.length > 1) body.append(make("tr", {}, make("th"), ...columns.map((name) => make("th", {}, name))));
    for (const [name, ...values] of rows) {
      if (values.every((value) => value === "" || value === null || value === undefined)) continue;
      const plain = values.map((value) => value?.textContent ?? String(value ?? ""));
      const row = make("tr", {}, make("th", {}, name), ...values.map((value) => make("td", {}, value ?? "")));
      if (values.length > 1 && plain[0] !== plain[1]) row.className = "differs";
      body.append(row);
    }
    return body;
  };

  // "linear(x, weight, bias)" with its operands as links.
  const call = (node) => {
    const pieces = node.call.split(GAP);
    const made = make("code", {}, `${node.op}(`);
    pieces.forEach((piece, at) => {
      made.append(piece);
      const read = node.reads[at];
      if (at >= pieces.length - 1 || read === undefined) return;
      if (typeof read === "string") made.append(`@${read}`);
      else if (read >= 0) made.append(link(nodeOf(node.side, read).name, nodeOf(node.side, read)));
      else made.append(link(Model.sides[node.side].weights[-1 - read].name, { weight: Model.sides[node.side].weights[-1 - read] }));
    });
    made.append(")");
    return made;
  };

  const cost = (node) => {
    if (!node.macs && !node.formula) return "0";
    return node.formula ? `${Format.count(node.macs)} = ${node.formula}` : Format.count(node.macs);
  };

  const readers = (side, ids) => {
    if (!ids.length) return "";
    const made = make("span");
    ids.slice(0, USERS).forEach((id, at) => made.append(at ? ", " : "", link(nodeOf(side, id).name, nodeOf(side, id))));
    if (ids.length > USERS) made.append(` and ${ids.length - USERS} more`);
    return made;
  };

  const statistics = (weight) => {
    const { stats } = weight;
    if (!stats) return make("p", { class: "muted" }, `No numbers: ${weight.none ?? "not read"}.`);
    const [min, max, mean, std] = stats.range;
    const sampled = stats.read < weight.numel;
    const bad = stats.read - stats.finite;
    const facts = stats.finite
      ? `min ${Format.real(min)}, max ${Format.real(max)}, mean ${Format.real(mean)}, std ${Format.real(std)}, ` +
        `zeros ${Format.count(stats.zeros)} (${Format.percent(stats.zeros / stats.read)})`
      : "no finite number";
    const made = make("div", {}, make("p", { class: "stats" }, facts, bad ? `, ${Format.count(bad)} infinite or NaN` : ""));
    if (sampled) made.append(make("p", { class: "muted" }, `From a sample of ${Format.count(stats.read)} of ${Format.count(weight.numel)} numbers.`));
    if (stats.counts.length) made.append(Histogram.draw(stats));
    return made;
  };

  const weightCard = (weight, linked = true) => {
    const name = linked ? link(weight.name, { weight }) : weight.name;
    const made = make("div", { class: "weight" }, make("div", {}, name));
    const also = weight.also ? `, tied: ${weight.also.join(", ")}` : "";
    made.append(make("div", { class: "muted" }, `${weight.type}, ${Format.count(weight.numel)} numbers, ${Format.bytes(weight.bytes)}${also}`));
    made.append(statistics(weight));
    return made;
  };

  const weightsOf = (node) => node.weights.map((id) => Model.sides[node.side].weights[id]);

  const showNode = (node) => {
    const nodes = node.twin ? [node, node.twin].sort((a, b) => a.side - b.side) : [node];
    const both = (of) => nodes.map(of);
    const heading = make("h2", {}, `${Model.title(node)} `, badge(node.status));
    const why = node.changes.length ? make("p", { class: "muted" }, `Differs in ${node.changes.join(", ")}.`) : null;
    const rows = [
      ["name", ...both((n) => n.name)],
      ["operator", ...both((n) => n.op)],
      ["role", ...both((n) => n.role)],
      ["type", ...both((n) => n.type)],
      ["at these sizes", ...both((n) => n.at)],
      ["call", ...both((n) => (n.call || n.reads.length ? call(n) : ""))],
      ["from", ...both((n) => n.origin)],
      ["made by", ...both((n) => n.by || (n.op === "input" || n.op === "output" ? "" : "the front end"))],
      ["MACs", ...both(cost)],
      ["parameters", ...both((n) => Format.count(n.params))],
      ["activation", ...both((n) => (n.out ? Format.bytes(n.out) : "none of its own"))],
      ["bytes moved", ...both((n) => Format.bytes(n.moved))],
      ["read by", ...both((n) => readers(n.side, n.users))],
      ["site", ...both((n) => link(Model.path(n.group).slice(1).map((group) => group.label).join(" / ") || "top", n.group))],
    ];
    const facts = make("div", {}, heading, why, table(rows, both((n) => (n.side ? "after" : "before"))));
    const cards = both((n) => (n.weights.length ? section(nodes.length > 1 ? `Weights ${n.side ? "after" : "before"}` : "Weights", ...weightsOf(n).map((w) => weightCard(w))) : null));
    return [facts, ...cards];
  };

  const showWeight = (weight) => {
    const uses = section("Read by", make("p", {}, readers(weight.side, weight.readers) || "no operator"));
    return [make("div", {}, make("h2", {}, weight.name), weightCard(weight, false)), uses];
  };

  const sums = (group) => {
    const present = Model.sides.map((_, s) => s).filter((s) => Model.has(group, s));
    const rows = [["operators", ...present.map((s) => Format.count(group.sums[s].count))]];
    for (const { key, label, show } of Model.measures) {
      rows.push([label, ...present.map((s) => {
        const whole = Model.root.sums[s][key];
        const share = whole && group !== Model.root ? ` (${Format.percent(group.sums[s][key] / whole)})` : "";
        return `${show(group.sums[s][key])}${share}`;
      })]);
    }
    return table(rows, present.map((s) => (s ? "after" : "before")));
  };

  const dearest = (group) => {
    const { key, label, show } = State.measure;
    const side = Model.has(group, 1 * Model.two) ? 1 * Model.two : 0;
    const nodes = [...Model.members(group, side)].filter((node) => node[key] > 0).sort((a, b) => b[key] - a[key]);
    const lines = nodes.slice(0, TOP).map((node) => make("li", {}, link(Model.title(node), node), make("span", { class: "muted" }, `  ${node.name}  ${show(node[key])}`)));
    return lines.length ? section(`Most ${label}${Model.two ? (side ? ", after" : ", before") : ""}`, make("ul", {}, ...lines)) : null;
  };

  const counted = ({ removed, added, changed }) =>
    [[removed, "removed"], [added, "added"], [changed, "changed"]].filter(([n]) => n).map(([n, what]) => badge(what, `${Format.count(n)} ${what}`));

  const spaced = (parts) => parts.flatMap((part) => [part, " "]);

  const showGroup = (group) => {
    const toggle = make("button", { type: "button" }, State.isOpen(group) ? "Close" : "Open");
    toggle.addEventListener("click", () => {
      State.setOpen(group, !State.isOpen(group));
      show();
    });
    const heading = make("h2", { class: `k-${group.kind}` }, swatch(), `${group.label} `);
    const lines = [group.detail, group.origin && `from ${group.origin}`, group.note && `note: ${group.note}`].filter(Boolean);
    const changes = Model.two ? make("p", {}, ...spaced(counted(group.statuses))) : null;
    return [make("div", {}, heading, changes, ...lines.map((words) => make("p", { class: "muted" }, words)), sums(group), make("p", {}, toggle)), dearest(group)];
  };

  const legend = () => {
    const kinds = [["attention", "attention"], ["mlp", "MLP"], ["conv", "convolution"], ["mixer", "other mixer"], ["embedding", "embedding"], ["head", "head"], ["port", "input, output"]];
    const used = kinds.filter(([kind]) => Model.groups.some((group) => group.kind === kind));
    const marks = Model.two ? [badge("removed", "− removed"), badge("added", "+ added"), badge("changed", "~ changed")] : [];
    return section("Legend", make("div", { class: "legend" }, ...used.map(([kind, name]) => make("span", { class: `k-${kind}` }, swatch(), name)), ...marks),
      make("p", { class: "muted" }, "↖ names a value that many read, instead of an edge. A box with a shadow opens: double-click, or Enter."));
  };

  const showModel = () => {
    const keys = [...new Set(Model.sides.flatMap((side) => side.facts.map(([key]) => key)))];
    const value = (side, key) => side.facts.filter(([name]) => name === key).map(([, words]) => words).join("\n");
    const rows = keys.map((key) => [key, ...Model.sides.map((side) => value(side, key))]);
    const heading = make("h2", {}, Model.two ? "Before and after" : Model.sides[0].title);
    const changes = Model.two ? make("p", {}, ...spaced(counted(Model.counts)), counted(Model.counts).length ? "" : "No difference.") : null;
    const histories = Model.sides.map((side, s) => (side.history.length ? section(`Passes${Model.two ? (s ? ", after" : ", before") : ""}`, make("ul", { class: "mono" }, ...side.history.map((words) => make("li", {}, words)))) : null));
    const notes = [...new Set([...Model.notes, ...Model.sides.flatMap((side) => side.notes)])];
    const first = make("div", {}, heading, changes, table(rows, Model.sides.map((side) => side.title)));
    const second = make("div", {}, ...histories.filter(Boolean), notes.length ? section("Notes", ...notes.map((words) => make("p", {}, words))) : null, legend());
    return [first, second, dearest(Model.root)];
  };

  const show = () => {
    const item = State.selected;
    const parts = item === null ? showModel() : item.weight ? showWeight(item.weight) : item.items ? showGroup(item) : showNode(item);
    box.replaceChildren(make("div", { class: "columns" }, ...parts.filter(Boolean)));
    box.scrollTop = 0;
  };

  const start = () => {
    State.on("select", show);
    State.on("measure", show);
    show();
  };

  return { start };
})();
