// The panel of one filter: large, with who fires on its stimulus and who responds alike; #layer/filter opens it.
(function () {
  "use strict";
  const run = window.pruneVizRun;
  if (!run) return;

  // A link may name a layer and a filter, on whatever page it is opened.
  const named = function () {
    const cut = location.hash.lastIndexOf("/");
    if (cut < 1) return null;
    let layer = location.hash.slice(1, cut);
    try { layer = decodeURIComponent(layer); } catch { return null; }
    const filter = Number(location.hash.slice(cut + 1));
    const place = run.layers.findIndex(function (one) { return one.name === layer; });
    return place >= 0 && run.layers[place].channels[filter] !== undefined ? { place: place, filter: filter } : null;
  };
  const main = document.getElementById("main");
  const here = main.dataset.layer === undefined ? -1 : Number(main.dataset.layer);
  const follow = function () {
    const found = named();
    if (!found) return;
    if (found.place !== here) location.href = (here < 0 ? "layers/" : "") + run.layers[found.place].page + location.hash;
    else open(found.filter);
  };

  const panel = document.getElementById("filter");
  const data = window.pruneVizLayer;
  let shown = -1;
  const part = function (name) { return panel.querySelector("[data-part=" + name + "]"); };
  const tile = function (number) {
    const picture = document.createElement("span");
    picture.className = "t t" + number;
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", "Stimulus of filter " + number);
    return picture;
  };
  const others = function (list) {
    return list.map(function (pair) {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      const name = document.createElement("b");
      name.textContent = pair[0];
      const share = document.createElement("span");
      share.textContent = Math.round(100 * pair[1]) + "\u202f%";
      button.append(tile(pair[0]), name, share);
      button.addEventListener("click", function () { open(pair[0]); });
      item.append(button);
      return item;
    });
  };
  const open = function (number) {
    const one = data && data.filters[number];
    if (!panel || !one) return;
    shown = number;
    part("title").textContent = "Filter " + number;
    part("picture").replaceChildren(tile(number));
    part("reason").textContent = one.reason;
    part("figures").replaceChildren(...one.figures.map(function (pair) {
      const row = document.createElement("div");
      const name = document.createElement("dt"), value = document.createElement("dd");
      name.textContent = pair[0];
      value.textContent = pair[1];
      row.append(name, value);
      return row;
    }));
    part("fires").replaceChildren(...others(one.fires));
    part("alike").replaceChildren(...others(one.alike));
    part("fires").closest("section").hidden = !one.fires.length;
    part("alike").closest("section").hidden = !one.alike.length;
    const link = "#" + encodeURIComponent(run.layers[here].name) + "/" + number;
    if (location.hash !== link) history.replaceState(null, "", link);
    if (!panel.open) panel.showModal();
    panel.focus(); // what was chosen in it is there no more
  };
  if (panel && data) {
    panel.tabIndex = -1;
    panel.addEventListener("close", function () {
      history.replaceState(null, "", "#f" + shown);
      const card = document.getElementById("f" + shown);
      if (card) card.scrollIntoView({ block: "nearest" });
    });
    panel.addEventListener("click", function (event) { if (event.target === panel) panel.close(); });
    panel.addEventListener("keydown", function (event) {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      open((shown + step + data.filters.length) % data.filters.length);
    });
    document.addEventListener("keydown", function (event) {
      const item = event.target.closest("[data-filter]");
      if (event.key === "o" && item && !event.target.closest("input, dialog")) open(Number(item.dataset.filter));
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
})();
