// What of one side is in view, and where: a nested graph of what is open, laid out by ELK in a worker.
const Layout = (() => {
  const FAN_OUT = 6;
  const MOST = 1500;
  const TAG = 14;
  const HEAD = 24;

  const canvas = document.createElement("canvas").getContext("2d");
  const family = getComputedStyle(document.body).fontFamily;
  const measured = new Map();
  const widthOf = (text, font) => {
    const key = `${font}${text}`;
    if (!measured.has(key)) {
      canvas.font = `${font} ${family}`;
      measured.set(key, canvas.measureText(text).width);
    }
    return measured.get(key);
  };
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

  const code = document.getElementById("elk-worker").textContent;
  let elk = null;
  const engine = () => {
    elk ??= new ELK({
      workerUrl: URL.createObjectURL(new Blob([code], { type: "text/javascript" })),
      workerFactory: (url) => new Worker(url),
    });
    return elk;
  };

  const LONG = 34;

  const titles = (item, side) => {
    if (item.row) {
      const node = item.nodes[side];
      // Long symbolic shapes say less than the numbers of the example.
      const type = node.type.length > LONG && node.at ? node.at : node.type;
      return [cut(Model.title(node), 44), cut(node.op === "input" ? `${node.name} ${type}` : type, 46)];
    }
    const sum = item.sums[side];
    if (item.kind === "port") return [item.label, cut([...Model.members(item, side)].map((node) => `${node.name} ${node.type}`).join(", "), 46)];
    const value = sum[State.measure.key];
    const cost = value ? `, ${State.measure.show(value)} ${State.measure.label}` : "";
    return [cut(item.label, 44), cut(item.detail, 46) || `${Format.count(sum.count)} operator${sum.count === 1 ? "" : "s"}${cost}`];
  };

  const keyOf = (item, side) => (item.row ? `n${item.nodes[side].id}` : `g${item.id}`);

  // The boxes in view, nested; and which box stands for each node.
  const boxes = (side) => {
    const standsFor = new Array(Model.sides[side].nodes.length).fill(null);
    const all = new Map();
    const visit = (item, parent) => {
      if (item.row ? !item.nodes[side] : !Model.has(item, side)) return null;
      const box = { key: keyOf(item, side), item, parent, children: [], tags: new Map() };
      all.set(box.key, box);
      if (item.row) standsFor[item.nodes[side].id] = box;
      else if (State.isOpen(item)) box.children = item.items.map((inner) => visit(inner, box)).filter(Boolean);
      else for (const node of Model.members(item, side)) standsFor[node.id] = box;
      [box.title, box.sub] = titles(item, side);
      return box;
    };
    const top = Model.root.items.map((item) => visit(item, null)).filter(Boolean);
    return { top, all, standsFor };
  };

  // Edges between boxes. A value that many boxes read is written on them instead of drawn to them.
  const edges = (side, { standsFor }) => {
    const found = new Map();
    for (const node of Model.sides[side].nodes) {
      const target = standsFor[node.id];
      if (!target) continue;
      for (const input of node.inputs) {
        const source = standsFor[input];
        if (!source || source === target) continue;
        const key = `${source.key}>${target.key}`;
        const edge = found.get(key) ?? { key, source, target, values: new Set() };
        edge.values.add(input);
        found.set(key, edge);
      }
    }
    const outward = new Map();
    for (const edge of found.values()) outward.set(edge.source, [...(outward.get(edge.source) ?? []), edge]);
    const drawn = [];
    for (const [source, list] of outward) {
      if (list.length <= FAN_OUT) drawn.push(...list);
      else for (const edge of list) edge.target.tags.set(source.key, source);
    }
    return drawn;
  };

  const tagText = (box) => {
    const names = [...box.tags.values()].map((source) => (source.item.row ? source.title : source.item.label));
    return names.length ? cut(`↖ ${names.slice(0, 3).join(", ")}${names.length > 3 ? "…" : ""}`, 48) : "";
  };

  const toElk = (box) => {
    const opened = box.children.length > 0;
    const tag = tagText(box);
    box.tag = tag;
    const width = Math.max(widthOf(box.title, "600 12px"), widthOf(box.sub, "10.5px"), widthOf(tag, "italic 10.5px"));
    const needed = Math.ceil(width) + 26 + (box.item.row ? 0 : 20);
    const top = (box.sub ? 38 : 26) + (tag ? TAG : 0);
    if (!opened) return { id: box.key, width: Math.max(needed, 60), height: top };
    return {
      id: box.key,
      children: box.children.map(toElk),
      layoutOptions: {
        "elk.padding": `[top=${HEAD + 6 + (tag ? TAG : 0)},left=14,bottom=14,right=14]`,
        "elk.nodeSize.constraints": "MINIMUM_SIZE",
        "elk.nodeSize.minimum": `(${needed + 20}, 60)`,
      },
    };
  };

  const options = {
    "elk.algorithm": "layered",
    "elk.direction": "DOWN",
    "elk.hierarchyHandling": "INCLUDE_CHILDREN",
    "elk.edgeRouting": "ORTHOGONAL",
    "elk.json.shapeCoords": "ROOT",
    "elk.json.edgeCoords": "ROOT",
    "elk.layered.considerModelOrder.strategy": "PREFER_NODES",
    "elk.layered.nodePlacement.bk.fixedAlignment": "BALANCED",
    "elk.layered.spacing.nodeNodeBetweenLayers": "26",
    "elk.layered.spacing.edgeNodeBetweenLayers": "12",
    "elk.spacing.nodeNode": "22",
    "elk.spacing.edgeNode": "14",
    "elk.spacing.edgeEdge": "8",
    "elk.spacing.componentComponent": "36",
    "elk.padding": "[top=20,left=20,bottom=20,right=20]",
  };

  // Lay out what is open of one side: {boxes, edges, width, height}; or {refused: number of boxes}.
  const run = async (side) => {
    const shown = boxes(side);
    if (shown.all.size > MOST) return { refused: shown.all.size };
    const drawn = edges(side, shown);
    const graph = {
      id: "root",
      layoutOptions: options,
      children: shown.top.map(toElk),
      edges: drawn.map((edge) => ({ id: edge.key, sources: [edge.source.key], targets: [edge.target.key] })),
    };
    const placed = await engine().layout(graph);
    const place = (node) => {
      const box = shown.all.get(node.id);
      if (box) Object.assign(box, { x: node.x, y: node.y, width: node.width, height: node.height });
      (node.children ?? []).forEach(place);
    };
    place(placed);
    placed.edges.forEach((edge, at) => {
      drawn[at].points = (edge.sections ?? []).map((s) => [s.startPoint, ...(s.bendPoints ?? []), s.endPoint]);
    });
    return { boxes: [...shown.all.values()], edges: drawn, standsFor: shown.standsFor, width: placed.width, height: placed.height };
  };

  return { run, MOST };
})();
