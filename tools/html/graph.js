// The drawing of one side: what is open, as nested boxes; zoom, pan, keys.
const makeGraph = (side, host) => {
  const marks = { removed: "−", added: "+", changed: "~" };
  const FAR = 0.42;
  const view = d3.select(host).append("div").attr("class", "view").attr("data-side", side);
  if (Model.two) view.append("h2").text(`${side ? "after" : "before"}: ${Model.sides[side].title}`);
  const svg = view.append("svg").attr("tabindex", 0).attr("role", "application");
  svg.attr("aria-label", `Graph${Model.two ? (side ? " after" : " before") : ""}: arrows move along edges, Enter opens and closes`);
  const arrow = `arrow-${side}`;
  const marker = svg.append("defs").append("marker").attr("id", arrow).attr("viewBox", "0 0 8 8").attr("refX", 7).attr("refY", 4);
  marker.attr("markerUnits", "userSpaceOnUse").attr("markerWidth", 8).attr("markerHeight", 8).attr("orient", "auto");
  marker.append("path").attr("class", "arrow").attr("d", "M0,0.8 8,4 0,7.2z");
  const scene = svg.append("g").attr("class", "scene");
  const [under, lines, over, heads] = ["under", "lines", "over", "heads"].map((name) => scene.append("g").attr("class", name));
  let drawn = { boxes: [], edges: [], standsFor: [], width: 1, height: 1 };

  const zoom = d3.zoom().scaleExtent([0.02, 3]).on("zoom", ({ transform }) => {
    scene.attr("transform", transform);
    svg.classed("far", transform.k < FAR);
  });
  svg.call(zoom).on("dblclick.zoom", null);

  const size = () => [svg.node().clientWidth || 1, svg.node().clientHeight || 1];
  const transform = () => d3.zoomTransform(svg.node());
  const moveTo = (x, y, k) => svg.call(zoom.transform, d3.zoomIdentity.translate(x, y).scale(k));

  // All of it, but not so small that nothing can be read: a long graph starts at its top.
  const fit = (whole) => {
    const [width, height] = size();
    const head = Model.two ? 34 : 0;
    const all = Math.min(width / drawn.width, (height - head) / drawn.height, 1);
    const k = whole ? all : Math.max(all, Math.min(0.7, width / drawn.width));
    moveTo((width - drawn.width * k) / 2, head + Math.max(0, (height - head - drawn.height * k) / 2), k);
  };

  const boxOf = (item) => {
    if (!item) return null;
    if (item.weight) return item.weight.side === side ? boxOf(Model.sides[side].nodes[item.weight.readers[0]]) : null;
    if (item.items) return drawn.boxes.find((box) => box.item === item) ?? null;
    const node = item.side === side ? item : item.twin;
    return node ? drawn.standsFor[node.id] : null;
  };

  const center = (box) => {
    const [width, height] = size();
    const { x, y, k } = transform();
    const [left, top] = [box.x * k + x, box.y * k + y];
    const seen = left > 0 && top > 0 && left + box.width * k < width && top + Math.min(box.height * k, 60) < height;
    if (seen && k > FAR) return;
    const scale = Math.max(k, 0.75);
    moveTo(width / 2 - (box.x + box.width / 2) * scale, height / 2 - (box.y + Math.min(box.height, 80) / 2) * scale, scale);
  };

  // Rounded corners: a line to just before each bend, and a curve around it.
  const path = (points) => {
    const line = d3.path();
    line.moveTo(points[0].x, points[0].y);
    for (let i = 1; i < points.length - 1; i += 1) line.arcTo(points[i].x, points[i].y, points[i + 1].x, points[i + 1].y, 5);
    const last = points[points.length - 1];
    line.lineTo(last.x, last.y);
    return line.toString();
  };

  // Its part of the cost of the site around.
  const share = (box) => {
    const { key } = State.measure;
    const around = (box.item.row ? box.item.group : box.item.parent).sums[side][key];
    const value = box.item.row ? box.item.nodes[side][key] : box.item.sums[side][key];
    return around ? value / around : 0;
  };

  // The title of an open site lies above the edges that cross it.
  const head = function head(box) {
    const g = d3.select(this);
    g.selectAll(":scope > *").remove();
    const top = box.tag ? 14 : 0;
    if (box.tag) g.append("text").attr("class", "tag").attr("x", 10).attr("y", 13).text(box.tag);
    g.append("text").attr("class", "title").attr("x", 26).attr("y", top + 17).text(box.title);
    twist(g, box, top, true);
  };

  const fill = function fill(box) {
    const g = d3.select(this);
    const { item } = box;
    g.selectAll(":scope > *").remove();
    const opened = box.children.length > 0;
    if (!item.row && !opened) g.append("rect").attr("class", "stack").attr("x", 3).attr("y", 3).attr("rx", 6).attr("width", box.width).attr("height", box.height);
    g.append("rect").attr("class", "body").attr("rx", item.row ? 5 : 7).attr("width", box.width).attr("height", box.height);
    const top = box.tag ? 14 : 0;
    if (box.tag && !opened) g.append("text").attr("class", "tag").attr("x", 10).attr("y", 13).text(box.tag);
    const left = item.row ? 10 : 26;
    if (!opened) g.append("text").attr("class", "title").attr("x", left).attr("y", top + 17).text(box.title);
    if (box.sub && !opened) g.append("text").attr("class", "sub").attr("x", left).attr("y", top + 31).text(box.sub);
    if (!item.row && !opened) twist(g, box, top, opened);
    if (!opened && share(box) > 0.0005) {
      g.append("rect").attr("class", "cost").attr("x", 6).attr("y", box.height - 4).attr("height", 2.5).attr("rx", 1).attr("width", Math.max(1.5, share(box) * (box.width - 12)));
    }
    if (Model.two && marks[item.status]) g.append("text").attr("class", "mark").attr("x", box.width - 15).attr("y", 16).text(marks[item.status]);
    g.append("title").text([box.title, box.sub, item.row ? item.nodes[side].name : item.origin].filter(Boolean).join("\n"));
  };

  const twist = (g, box, top, opened) => {
    const sign = g.append("g").attr("class", "toggle").attr("transform", `translate(9,${top + 7})`);
    sign.append("rect").attr("class", "twist").attr("width", 12).attr("height", 12).attr("rx", 3);
    sign.append("path").attr("class", "twist-sign").attr("d", opened ? "M3,6h6" : "M3,6h6M6,3v6");
  };

  const classes = (box) => {
    const { item } = box;
    const chosen = box === boxOf(State.selected);
    const found = item.row ? State.hits.nodes.has(item.nodes[side]) || State.hits.nodes.has(item.nodes[side].twin) : !box.children.length && State.hits.groups.has(item);
    return [
      "item",
      item.row ? "leaf" : "site",
      `k-${item.row ? (["input", "output"].includes(item.node.op) ? "port" : item.group.kind) : item.kind}`,
      box.children.length ? "open" : "",
      Model.two && item.status !== "same" ? item.status : "",
      found ? "hit" : "",
      chosen ? "selected" : "",
    ].filter(Boolean).join(" ");
  };

  const mark = () => {
    scene.selectAll("g.item").attr("class", classes).attr("aria-selected", (box) => box === boxOf(State.selected));
    const chosen = boxOf(State.selected);
    lines.selectAll("path.edge").classed("near", (edge) => chosen !== null && (edge.source === chosen || edge.target === chosen));
  };

  const draw = () => {
    // Open sites lie under the edges, but for their titles; everything else above them.
    const opened = drawn.boxes.filter((box) => box.children.length);
    const closed = drawn.boxes.filter((box) => !box.children.length);
    for (const [layer, list, paint] of [[under, opened, fill], [over, closed, fill], [heads, opened, head]]) {
      const items = layer.selectAll("g.item").data(list, (box) => box.key).join((enter) => enter.append("g").attr("class", "item"));
      items.attr("transform", (box) => `translate(${box.x},${box.y})`).attr("data-key", (box) => box.key).each(paint).order();
    }
    const sections = drawn.edges.flatMap((edge) => edge.points.map((points) => ({ ...edge, points })));
    const paths = lines.selectAll("path.edge").data(sections).join("path").attr("class", "edge");
    paths.attr("d", (edge) => path(edge.points)).attr("marker-end", `url(#${arrow})`);
    mark();
  };

  const update = async (anchor) => {
    const start = performance.now();
    const before = anchor && boxOf(anchor);
    const old = before ? { x: before.x, y: before.y } : null;
    const found = await Layout.run(side);
    if (found.refused) return found;
    const empty = !drawn.boxes.length;
    drawn = found;
    draw();
    const after = old && boxOf(anchor);
    const { x, y, k } = transform();
    // What was clicked stays where it is on the screen.
    if (after) moveTo(x + (old.x - after.x) * k, y + (old.y - after.y) * k, k);
    else if (empty || !anchor) fit(false);
    if (!after && State.selected && boxOf(State.selected)) center(boxOf(State.selected));
    return { boxes: drawn.boxes.length, ms: performance.now() - start };
  };

  const itemOf = (box) => (box.item.row ? box.item.nodes[side] : box.item);
  const select = (box) => State.select(itemOf(box), `graph-${side}`);

  // Neighbors of a box in the drawing: along edges for up and down, beside it for left and right.
  const neighbor = (box, key) => {
    const middle = (b) => b.x + b.width / 2;
    if (key === "ArrowDown" || key === "ArrowUp") {
      const down = key === "ArrowDown";
      const ends = drawn.edges.filter((edge) => (down ? edge.source : edge.target) === box).map((edge) => (down ? edge.target : edge.source));
      return d3.least(ends, (b) => Math.abs(middle(b) - middle(box)));
    }
    const right = key === "ArrowRight";
    const beside = drawn.boxes.filter((b) => b.parent === box.parent && b !== box && (right ? b.x >= box.x + box.width : b.x + b.width <= box.x));
    return d3.least(beside, (b) => Math.abs(middle(b) - middle(box)) + 3 * Math.abs(b.y - box.y));
  };

  const onKey = (event) => {
    const [width, height] = size();
    const chosen = boxOf(State.selected) ?? drawn.boxes[0];
    const pan = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] }[event.key];
    if (pan && event.shiftKey) svg.call(zoom.translateBy, ...pan.map((step) => step / transform().k));
    else if (pan && chosen) {
      const next = State.selected ? neighbor(chosen, event.key) : chosen;
      if (next) select(next);
    } else if ((event.key === "Enter" || event.key === " ") && chosen && !chosen.item.row) State.setOpen(chosen.item, !State.isOpen(chosen.item));
    else if (event.key === "Backspace" && chosen?.parent) select(chosen.parent);
    else if (event.key === "+" || event.key === "=") svg.call(zoom.scaleBy, 1.3, [width / 2, height / 2]);
    else if (event.key === "-") svg.call(zoom.scaleBy, 1 / 1.3, [width / 2, height / 2]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  svg.on("keydown", onKey);
  svg.on("click", (event) => {
    const g = event.target.closest("g.item");
    if (!g) return State.select(null, `graph-${side}`);
    const box = d3.select(g).datum();
    if (event.target.closest(".toggle")) State.setOpen(box.item, !State.isOpen(box.item));
    else select(box);
  });
  svg.on("dblclick", (event) => {
    const g = event.target.closest("g.item");
    const box = g && d3.select(g).datum();
    if (box && !box.item.row && !event.target.closest(".toggle")) State.setOpen(box.item, !State.isOpen(box.item));
  });

  State.on("select", ({ item, from }) => {
    mark();
    const box = boxOf(item);
    if (box && from !== `graph-${side}`) center(box);
    else if (box && document.activeElement === svg.node()) center(box);
  });
  State.on("hits", mark);

  return {
    update,
    fit: () => fit(true),
    zoomBy: (factor) => svg.call(zoom.scaleBy, factor, size().map((length) => length / 2)),
  };
};
