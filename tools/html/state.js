// What is open, selected and measured. Views listen; nobody else keeps any of it.
const State = (() => {
  const listeners = new Map();
  const open = new Set([Model.root]);
  let selected = null;
  let measure = Model.measures[0];
  let hits = { nodes: new Set(), groups: new Set() };

  const closed = new Set(["rest", "step", "nested", "port", "embedding", "head"]);

  const emit = (event, value) => (listeners.get(event) ?? []).forEach((listener) => listener(value));
  const on = (event, listener) => listeners.set(event, [...(listeners.get(event) ?? []), listener]);

  // Open what gives an overview: level by level, as long as few things are in view. Long runs stay closed.
  const overview = (most) => {
    open.clear();
    open.add(Model.root);
    let shown = Model.root.items.length;
    let level = Model.root.items;
    while (level.length) {
      const next = [];
      for (const item of level) {
        if (item.row || closed.has(item.kind) || item.items.length > 12 || shown + item.items.length > most) continue;
        open.add(item);
        shown += item.items.length;
        next.push(...item.items);
      }
      level = next;
    }
  };

  return {
    on,
    isOpen: (group) => open.has(group),
    get selected() { return selected; },
    get measure() { return measure; },
    get hits() { return hits; },
    overview: (most = 26) => {
      overview(most);
      emit("open", null);
    },
    // `anchor` is what should stay in place on the screen.
    setOpen: (group, value, anchor = group) => {
      if (group === Model.root || open.has(group) === value) return;
      if (value) open.add(group);
      else open.delete(group);
      emit("open", anchor);
    },
    // Open everything around an item; returns whether anything had to be opened.
    reveal: (item) => {
      const closed = Model.path(item.row || item.side !== undefined ? item.group : item.parent).filter((g) => !open.has(g));
      closed.forEach((group) => open.add(group));
      if (closed.length) emit("open", null);
      return closed.length > 0;
    },
    collapseAll: () => {
      open.clear();
      open.add(Model.root);
      emit("open", null);
    },
    // An item is a node, a group, or a weight ({weight}); `from` says which view it came from.
    select: (item, from = "") => {
      selected = item;
      emit("select", { item, from });
    },
    setMeasure: (key) => {
      measure = Model.measures.find((one) => one.key === key);
      emit("measure", measure);
    },
    setHits: (nodes) => {
      const groups = new Set();
      for (const node of nodes) for (const group of Model.path(node.group)) groups.add(group);
      hits = { nodes: new Set(nodes), groups };
      emit("hits", hits);
    },
  };
})();
