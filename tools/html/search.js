// Search by operator, name, origin or weight. `op:conv`, `role:`, `name:`, `origin:`, `by:` and `weight:` look in one of them only.
const Search = (() => {
  const SHOWN = 60;
  const fields = ["op", "role", "name", "origin", "weight", "by"];

  const nodeText = {
    op: (node) => `${node.op} ${node.what}`,
    role: (node) => node.role,
    name: (node) => node.name,
    origin: (node) => node.origin,
    weight: () => "",
    by: (node) => node.by,
  };

  const parse = (query) => {
    const match = /^\s*(\w+):(.*)$/.exec(query);
    const only = match && fields.includes(match[1]) ? match[1] : null;
    const words = (only ? match[2] : query).toLowerCase().split(/\s+/).filter(Boolean);
    return { only, words };
  };

  // All nodes and weights in which every word of the query occurs.
  const find = (query) => {
    const { only, words } = parse(query);
    if (!words.length) return { nodes: [], weights: [] };
    const looked = only ? [only] : fields;
    const fits = (texts) => {
      const lower = texts.join("\n").toLowerCase();
      return words.every((word) => lower.includes(word));
    };
    const nodes = new Set();
    const weights = [];
    for (const side of Model.sides) {
      // A pair is found once, on the first side.
      for (const node of side.nodes) {
        if (node.side === 1 && node.twin && nodes.has(node.twin)) continue;
        if (fits(looked.map((field) => nodeText[field](node)))) nodes.add(node);
      }
      if (!only || only === "weight") {
        for (const weight of side.weights) if (fits([weight.name, ...(weight.also ?? [])])) weights.push(weight);
      }
    }
    return { nodes: [...nodes], weights };
  };

  const input = document.getElementById("query");
  const list = document.getElementById("hits");
  let current = [];
  let chosen = -1;

  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };

  const choose = (place) => {
    chosen = place;
    [...list.children].forEach((line, at) => line.setAttribute("aria-selected", String(at === place)));
    const line = list.children[place];
    if (!line) return;
    line.scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", line.id);
  };

  const take = (place) => {
    const item = current[place];
    if (!item) return;
    close();
    if (item.weight) {
      const { readers, side } = item.weight;
      if (readers.length) State.reveal(Model.sides[side].nodes[readers[0]]);
    } else {
      State.reveal(item);
    }
    State.select(item, "search");
  };

  const line = (item, place) => {
    const entry = document.createElement("li");
    entry.id = `hit-${place}`;
    entry.setAttribute("role", "option");
    entry.setAttribute("aria-selected", "false");
    const more = document.createElement("small");
    if (item.weight) {
      entry.append(item.weight.name);
      more.textContent = `weight ${item.weight.type}`;
    } else {
      entry.append(Model.title(item), " ");
      const where = Model.two ? (item.twin ? "" : item.status) : "";
      more.textContent = [item.name, item.origin, where].filter(Boolean).join("  ·  ");
    }
    entry.append(more);
    entry.addEventListener("mousedown", (event) => {
      event.preventDefault();
      take(place);
    });
    return entry;
  };

  const update = () => {
    const { nodes, weights } = find(input.value);
    State.setHits(nodes);
    if (!input.value.trim()) return close();
    current = [...nodes.slice(0, SHOWN), ...weights.slice(0, SHOWN).map((weight) => ({ weight }))];
    list.replaceChildren(...current.map(line));
    const left = nodes.length + weights.length - current.length;
    const last = document.createElement("li");
    last.className = "none";
    last.textContent = current.length ? `${Format.count(nodes.length)} operators, ${Format.count(weights.length)} weights` : "nothing found";
    if (left > 0) last.textContent += `; ${Format.count(left)} not listed`;
    list.append(last);
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    choose(current.length ? 0 : -1);
  };

  const start = () => {
    input.addEventListener("input", update);
    input.addEventListener("focus", () => input.value.trim() && update());
    input.addEventListener("blur", close);
    input.addEventListener("keydown", (event) => {
      const steps = { ArrowDown: 1, ArrowUp: -1 };
      if (event.key in steps && current.length) {
        event.preventDefault();
        choose((chosen + steps[event.key] + current.length) % current.length);
      } else if (event.key === "Enter") {
        take(chosen);
      } else if (event.key === "Escape") {
        if (list.hidden) input.value = "";
        State.setHits(input.value ? find(input.value).nodes : []);
        close();
      }
    });
  };

  return { start, find, focus: () => input.select() };
})();
