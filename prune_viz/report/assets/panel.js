// The panel of one filter, large, with all that is known of it; `#layer/filter` opens it on any page.
(function (pruneViz) {
  "use strict";
  const run = pruneViz.run, main = pruneViz.main, place = pruneViz.place;
  const panel = document.getElementById("filter");
  const text = (window.pruneVizLayers || {})[place];
  const follow = function () {
    const found = pruneViz.named();
    if (!found) return close(); // gone back to before it was opened
    if (found.place !== place) location.replace(pruneViz.link(found.place, found.filter));
    else if (text) open(found.filter);
  };

  let data = null, shown = -1; // what the layer's script holds, once it is needed
  const close = function () { if (panel.open) panel.close(); };
  const part = function (name) { return panel.querySelector("[data-part=" + name + "]"); };
  const make = function (tag, content, options) {
    const node = Object.assign(document.createElement(tag), options);
    node.append(...[content].flat());
    return node;
  };
  const tile = function (kind, number, label) {
    const picture = make("span", [], { className: pruneViz.picture(kind, place, number) });
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", label + " of filter " + number);
    return picture;
  };
  const others = function (list) {
    return list.map(function (pair) {
      const inner = [tile("t", pair[0], "Stimulus"), make("b", String(pair[0])), make("span", pair[1])];
      const button = make("button", inner, { type: "button" });
      button.addEventListener("click", function () { open(pair[0]); });
      return make("li", button);
    });
  };
  // A window on one of the run's example images: the class brings the image, the style the place, which
  // panel_data.py gives in thousandths.
  const crop = function (one) {
    const [image, left, top] = one, rest = 1 - data.side;
    const picture = make("span", [], { className: "t i" + image });
    picture.style.backgroundSize = 100 / data.side + "%";
    if (rest > 0) picture.style.backgroundPosition = left / rest / 10 + "% " + top / rest / 10 + "%";
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", "Part of image " + image);
    return make("li", picture);
  };
  const fill = function (name, nodes) {
    part(name).replaceChildren(...nodes);
    part(name).closest("section").hidden = !nodes.length;
  };
  const open = function (number) {
    data = data || JSON.parse(text);
    if (data.reasons[number] === undefined) return;
    shown = number;
    part("title").textContent = "Filter " + number;
    part("layer").textContent = run.layers[place].shown;
    part("picture").replaceChildren(tile("t", number, "Stimulus"));
    part("reason").textContent = data.reasons[number];
    part("answers").replaceChildren(...(data.answers[number] || []).map(function (line) { return make("li", line); }));
    part("figures").replaceChildren(...data.figures.map(function (pair) {
      return make("div", [make("dt", pair[0]), make("dd", pair[1][number])]);
    }));
    fill("consumers", data.consumers.map(function (pair) {
      const name = make("code", pair[0]);
      return make("li", pair[1] < 0 ? name : make("a", name, { href: pruneViz.page(pair[1]) }));
    }));
    fill("weights", data.weights ? [tile("w", number, "Weights")] : []);
    fill("crops", data.crops ? data.crops[number].map(crop) : []);
    fill("fires", others(data.fires[number]));
    fill("alike", others(data.alike[number]));
    const link = pruneViz.link(place, number);
    if (location.hash !== link) history.replaceState(null, "", link);
    if (!panel.open) panel.showModal();
    panel.focus(); // what was chosen in it is there no more
  };
  if (text) {
    panel.tabIndex = -1;
    panel.addEventListener("close", function () {
      if (!pruneViz.named()) return;
      history.replaceState(null, "", "#f" + place + "-" + shown);
      const card = document.getElementById("f" + place + "-" + shown);
      if (card) card.scrollIntoView({ block: "nearest" });
    });
    // A click beside it closes it: one that began there too, and no second half of a double click.
    const beside = function (event) {
      const box = panel.getBoundingClientRect();
      return event.clientX < box.left || event.clientX > box.right || event.clientY < box.top || event.clientY > box.bottom;
    };
    let pressed = false;
    panel.addEventListener("pointerdown", function (event) { pressed = beside(event); });
    panel.addEventListener("click", function (event) {
      if (event.target === panel && event.detail === 1 && pressed && beside(event)) panel.close();
    });
    panel.addEventListener("keydown", function (event) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      open((shown + step + data.reasons.length) % data.reasons.length);
    });
    document.addEventListener("keydown", function (event) {
      const item = event.target.closest("[data-filter]");
      const free = !event.altKey && !event.ctrlKey && !event.metaKey && !event.target.closest("dialog");
      if (event.key === "o" && item && free) open(Number(item.dataset.filter));
    });
    main.addEventListener("dblclick", function (event) {
      const item = event.target.closest(".card[data-filter]");
      if (item) open(Number(item.dataset.filter));
    });
    main.addEventListener("click", function (event) {
      const name = event.target.closest(".card[data-filter] b");
      if (name) open(Number(name.closest("[data-filter]").dataset.filter));
    });
  }
  addEventListener("hashchange", follow);
  follow();
})(window.pruneViz);
