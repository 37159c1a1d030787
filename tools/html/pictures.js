// Plans of a compression: what they say and their pictures, in a dialog that opens from the header.
const Pictures = (() => {
  const dialog = document.getElementById("pictures");

  const make = (tag, attributes, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  };

  const picture = ({ name, width, height, src }) =>
    make("figure", {}, make("img", { src, width, height, alt: name, title: name }));

  const plan = ({ pass, facts, pictures }) =>
    make("section", {}, make("h3", { className: "mono", textContent: pass }),
      make("ul", {}, ...facts.map((words) => make("li", { textContent: words }))),
      make("div", { className: "pictures" }, ...pictures.map(picture)));

  // The pictures are made when they are first looked at: a page opens as fast as without them.
  const show = () => {
    if (!Model.compression.length) return;
    const plans = document.getElementById("plans");
    if (!plans.childElementCount) plans.append(...Model.compression.map(plan));
    dialog.showModal();
    plans.scrollTop = 0;
  };

  const start = () => {
    const button = document.getElementById("compression");
    button.hidden = !Model.compression.length;
    button.addEventListener("click", show);
    dialog.querySelector("button").addEventListener("click", () => dialog.close());
    // What lies around the dialog belongs to it, too.
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  };

  return { show, start };
})();
