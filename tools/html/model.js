// The data of the page as objects: nodes of one or two sides, weights, and the tree of groups that both sides share.
const Model = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = (place) => data.texts[place];

  // What can be shown as cost: a sum over operators.
  const measures = [
    { key: "params", label: "parameters", show: Format.short },
    { key: "macs", label: "MACs", show: Format.short },
    { key: "out", label: "activation bytes", show: Format.bytes },
    { key: "moved", label: "bytes moved", show: Format.bytes },
  ];
  const reasons = [
    [1, "operator"],
    [2, "arguments"],
    [4, "type"],
    [8, "inputs"],
    [16, "weights"],
    [32, "numbers of weights"],
  ];

  const makeNodes = (columns, side) => {
    const nodes = columns.name.map((name, id) => ({
      side,
      id,
      name,
      op: text(columns.op[id]),
      what: text(columns.what[id]),
      role: text(columns.role[id]),
      type: text(columns.type[id]),
      at: text(columns.at[id]),
      origin: text(columns.origin[id]),
      by: text(columns.by[id]),
      call: text(columns.call[id]),
      formula: text(columns.formula[id]),
      macs: columns.macs[id],
      moved: columns.moved[id],
      out: columns.out[id],
      params: columns.params[id],
      reads: columns.reads[id],
      inputs: [...new Set(columns.reads[id].filter((read) => read >= 0))],
      weights: [...new Set(columns.reads[id].filter((read) => read < 0).map((read) => -1 - read))],
      users: [],
      group: null,
      twin: null,
      changes: [],
      status: "same",
    }));
    for (const node of nodes) for (const input of node.inputs) nodes[input].users.push(node.id);
    return nodes;
  };

  const sides = data.sides.map((side, number) => {
    const nodes = makeNodes(side.nodes, number);
    const weights = side.weights.map((weight, id) => ({ ...weight, side: number, id, type: text(weight.type), readers: [] }));
    for (const node of nodes) for (const weight of node.weights) weights[weight].readers.push(node.id);
    return { ...side, nodes, weights };
  });
  const two = sides.length === 2;

  if (two) {
    for (const [a, b] of data.pairs) {
      sides[0].nodes[a].twin = sides[1].nodes[b];
      sides[1].nodes[b].twin = sides[0].nodes[a];
    }
    for (const [a, flags] of data.changes) {
      const changes = reasons.filter(([bit]) => flags & bit).map(([, name]) => name);
      for (const node of [sides[0].nodes[a], sides[0].nodes[a].twin]) Object.assign(node, { changes, status: "changed" });
    }
    sides.forEach((side, number) => {
      for (const node of side.nodes) if (!node.twin) node.status = number ? "added" : "removed";
    });
  }

  const groups = [];

  const noSums = () => sides.map(() => ({ count: 0, params: 0, macs: 0, out: 0, moved: 0 }));
  const addTo = (sums, more) => sums.forEach((sum, s) => Object.keys(sum).forEach((key) => (sum[key] += more[s][key])));

  // A row of operators: the node of each side, or null.
  const makeRow = (ids, group) => {
    const nodes = ids.map((id, s) => (id < 0 ? null : sides[s].nodes[id]));
    for (const node of nodes) if (node) node.group = group;
    const node = nodes[0] ?? nodes[1];
    return { row: true, nodes, node, status: node.status, first: nodes[0] ? nodes[0].id : null, group };
  };

  // Children and operators in the order in which they run; what only the second side has stays after its neighbor.
  const inOrder = (children, rows) => {
    const keyed = (items) => {
      let last = -1;
      return items.map((item) => [(last = item.first ?? last), item]);
    };
    const all = [...keyed(children), ...keyed(rows)];
    return all.sort((a, b) => a[0] - b[0]).map(([, item]) => item);
  };

  const makeGroup = (entry, parent) => {
    const group = {
      id: groups.length,
      label: entry.label,
      kind: entry.kind,
      origin: entry.origin ?? "",
      note: entry.note ?? "",
      detail: entry.detail ?? "",
      parent,
      depth: parent ? parent.depth + 1 : 0,
      sums: noSums(),
      first: null,
      statuses: { removed: 0, added: 0, changed: 0, same: 0 },
    };
    groups.push(group);
    const children = (entry.children ?? []).map((child) => makeGroup(child, group));
    const rows = (entry.nodes ?? []).map((ids) => makeRow(ids, group));
    group.items = inOrder(children, rows);
    for (const child of children) {
      addTo(group.sums, child.sums);
      for (const key of Object.keys(group.statuses)) group.statuses[key] += child.statuses[key];
    }
    for (const row of rows) {
      group.statuses[row.status] += 1;
      row.nodes.forEach((node, s) => {
        if (!node) return;
        group.sums[s].count += 1;
        for (const { key } of measures) group.sums[s][key] += node[key];
      });
    }
    const firsts = [...children, ...rows].map((item) => item.first).filter((first) => first !== null);
    group.first = firsts.length ? Math.min(...firsts) : null;
    group.status = statusOf(group);
    return group;
  };

  // A site that only one side has is gone or new, also if some operators in it have a counterpart elsewhere.
  const statusOf = ({ sums, statuses: { removed, added, changed } }) => {
    if (removed && !sums[1].count) return "removed";
    if (added && !sums[0].count) return "added";
    return removed || added || changed ? "changed" : "same";
  };

  const root = makeGroup({ label: "whole", kind: "root", children: data.tree }, null);

  // How many operators were removed, added and changed; a pair counts once, also where its sites are no pair.
  const counts = { removed: 0, added: 0, changed: 0 };
  for (const side of sides) for (const node of side.nodes) if (node.status !== "same" && !(node.side && node.twin)) counts[node.status] += 1;

  return {
    sides,
    two,
    counts,
    root,
    groups,
    measures,
    notes: data.notes,
    compression: data.compression,
    // All groups around a group, itself last.
    path: (group) => (group ? [...Model.path(group.parent), group] : []),
    has: (group, side) => group.sums[side].count > 0,
    title: (node) => (node.role ? `${node.role}: ${node.what || node.op}` : node.what || node.op),
    // The members of a group (any depth) on one side.
    *members(group, side) {
      for (const item of group.items) {
        if (!item.row) yield* Model.members(item, side);
        else if (item.nodes[side]) yield item.nodes[side];
      }
    },
  };
})();
