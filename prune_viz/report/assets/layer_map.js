// The map of a layer: what is pointed at, its cluster, arrow keys, and a lasso.
(function (pruneViz) {
  "use strict";
  const main = pruneViz.main, place = pruneViz.place;
  const map = main.querySelector("[data-map]");
  if (!map) return;
  const tiles = Array.from(map.querySelectorAll("a"));
  const members = Array.from(map.querySelectorAll("[data-cluster]"));
  const number = function (tile) { return Number(tile.id.slice(tile.id.indexOf("-") + 1)); };
  const shown = function (tile) { return main.dataset.show === "all" || tile.classList.contains(main.dataset.show); };
  const centre = function (tile) {
    const at = tile.getBoundingClientRect(), box = map.getBoundingClientRect();
    return [at.left + at.width / 2 - box.left, at.top + at.height / 2 - box.top];
  };
  let current = null;

  const enter = function (tile) {
    const cluster = tile.dataset.cluster, peers = cluster !== "-1";
    const lines = tile.getAttribute("aria-label").split(", ");
    if (peers) lines.push("cluster " + cluster);
    pruneViz.preview.show(pruneViz.picture("t", place, number(tile)), lines.map(function (line) {
      const cut = line.lastIndexOf(" ");
      return cut < 0 ? [line] : [line.slice(0, cut), line.slice(cut + 1)];
    }), tile.getBoundingClientRect());
    current = tile;
    map.classList.toggle("one-cluster", peers);
    members.forEach(function (other) { other.classList.toggle("peer", peers && other.dataset.cluster === cluster); });
  };
  const leave = function () {
    current = null;
    pruneViz.preview.hide();
    map.classList.remove("one-cluster");
    members.forEach(function (other) { other.classList.remove("peer"); });
  };
  const lasso = pruneViz.lasso(map, function (inside, more) {
    const found = tiles.filter(function (tile) {
      return shown(tile) && inside(...centre(tile));
    });
    pruneViz.selection.take(found.map(function (tile) { return [place, number(tile)]; }), more);
  });
  map.addEventListener("pointerover", function (event) {
    const tile = event.target.closest("a");
    if (tile && !lasso.drawing()) enter(tile);
  });
  map.addEventListener("pointerout", leave);
  map.addEventListener("focusin", function (event) { if (event.target.matches(":focus-visible")) enter(event.target); });
  map.addEventListener("focusout", leave);
  addEventListener("scroll", function () { if (current) enter(current); }, { passive: true });

  const mark = function () {
    const chosen = pruneViz.selection.of(place);
    tiles.forEach(function (tile) { tile.classList.toggle("chosen", chosen.has(number(tile))); });
  };
  pruneViz.selection.listen(mark);
  mark();

  // One stop for the tab key; arrows go to the nearest thumbnail in that direction.
  const stop = function (tile) {
    tiles.forEach(function (other) { other.tabIndex = other === tile ? 0 : -1; });
  };
  if (tiles.length) stop(tiles[0]);
  map.addEventListener("focusin", function (event) { stop(event.target); });
  map.addEventListener("keydown", function (event) {
    if (event.key === "Escape") return leave();
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const here = event.target, from = centre(here);
    let best = null, least = Infinity;
    tiles.forEach(function (tile) {
      if (tile === here || !shown(tile)) return;
      const to = centre(tile), x = to[0] - from[0], y = to[1] - from[1];
      const along = x * step[0] + y * step[1], across = Math.abs(x * step[1] + y * step[0]);
      const distance = along + 2 * across;
      if (along > 0 && distance < least) { least = distance; best = tile; }
    });
    if (best) best.focus();
  });
})(window.pruneViz);
