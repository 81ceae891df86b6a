// The map of the network: every filter can be pointed at, opened and selected; linked with the table of layers.
(function (pruneViz) {
  "use strict";
  const run = pruneViz.run, main = pruneViz.main, packed = window.pruneVizNetwork;
  const map = main.querySelector(".network");
  if (!map || !packed) return;
  const REST = 60; // milliseconds that the pointer rests before a picture is fetched
  const NEAR = 12; // pixels from a filter that still point at it
  const CELLS = 64; // across, of the grid in which neighbours are sought
  const MOST = 60; // selected filters that are drawn
  const STEPS = 65534, NOWHERE = 65535; // as map_drawing.py packs places

  // Filters in the order of layers: where they lie, in units of the map's width.
  const raw = pruneViz.unpack(packed.places, Uint16Array);
  const clusters = pruneViz.unpack(packed.clusters, Int16Array);
  const starts = [], layerOf = [];
  run.layers.forEach(function (layer, place) {
    starts.push(layerOf.length);
    for (let filter = 0; filter < layer.verdicts.length; filter += 1) layerOf.push(place);
  });
  const known = function (index) { return raw[2 * index] !== NOWHERE; };
  const x = function (index) { return raw[2 * index] / STEPS; };
  const y = function (index) { return raw[2 * index + 1] / STEPS; };
  const pair = function (index) { return [layerOf[index], index - starts[layerOf[index]]]; };
  const shown = function (index) {
    return known(index) && (main.dataset.show === "all" || pruneViz.verdict(...pair(index)) === main.dataset.show);
  };
  const grid = new Map();
  const cell = function (at) { return Math.floor(at * CELLS); };
  layerOf.forEach(function (place, index) {
    if (!known(index)) return;
    const key = cell(y(index)) * CELLS + cell(x(index));
    if (grid.has(key)) grid.get(key).push(index);
    else grid.set(key, [index]);
  });
  const nearest = function (atX, atY, within) {
    let best = -1, least = within * within;
    const reach = Math.ceil(within * CELLS);
    for (let row = cell(atY) - reach; row <= cell(atY) + reach; row += 1) {
      for (let column = cell(atX) - reach; column <= cell(atX) + reach; column += 1) {
        for (const index of grid.get(row * CELLS + column) || []) {
          const distance = (x(index) - atX) ** 2 + (y(index) - atY) ** 2;
          if (distance < least && shown(index)) { least = distance; best = index; }
        }
      }
    }
    return best;
  };

  // What changes is drawn above the dots, which are drawn once.
  const canvas = document.createElement("canvas");
  canvas.setAttribute("aria-hidden", "true");
  map.append(canvas);
  const paint = canvas.getContext("2d");
  const tints = new Map();
  const tint = function (place) {
    if (!tints.has(place)) {
      const path = map.querySelector("svg .d" + place + " path");
      tints.set(place, path ? getComputedStyle(path).stroke : "gray");
    }
    return tints.get(place);
  };
  const dots = function (indices, radius, ring) {
    const width = map.clientWidth;
    paint.beginPath();
    indices.forEach(function (index) {
      if (!shown(index)) return;
      paint.moveTo(x(index) * width + radius, y(index) * width);
      paint.arc(x(index) * width, y(index) * width, radius, 0, 7);
    });
    if (ring) paint.stroke();
    else paint.fill();
  };
  const range = function (place) {
    return Array.from(run.layers[place].verdicts, function (_, filter) { return starts[place] + filter; });
  };
  let lit = -1, current = -1, pending = false;
  const draw = function () {
    pending = false;
    const scale = devicePixelRatio || 1, width = map.clientWidth, height = map.clientHeight;
    if (canvas.width !== Math.round(width * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    paint.clearRect(0, 0, width, height);
    const dot = (packed.dot * width) / 2;
    const { color: ink, backgroundColor: ground } = getComputedStyle(map);
    if (lit >= 0) {
      // A veil over the others: fading them would draw all of them anew.
      paint.globalAlpha = 0.78;
      paint.fillStyle = ground;
      paint.fillRect(0, 0, width, height);
      paint.globalAlpha = 1;
      paint.fillStyle = tint(lit);
      dots(range(lit), Math.max(1.35 * dot, 2));
    }
    paint.strokeStyle = ink;
    paint.lineWidth = 1.25;
    if (current >= 0 && clusters[current] >= 0) {
      dots(range(lit).filter(function (index) { return clusters[index] === clusters[current]; }), dot + 3, true);
    }
    paint.fillStyle = ink;
    dots(pruneViz.selection.listed().map(function (one) { return starts[one[0]] + one[1]; }), dot + 1.5);
    if (current >= 0) {
      paint.lineWidth = 2.5;
      dots([current], dot + 4, true);
    }
  };
  const redraw = function () {
    if (!pending) requestAnimationFrame(draw);
    pending = true;
  };
  let waiting = 0;
  const light = function (place, index) {
    if (place === lit && index === current) return;
    lit = place;
    current = index;
    redraw();
  };
  const describe = function (index) {
    if (lasso.drawing()) return;
    const [place, filter] = pair(index);
    const lines = [[run.layers[place].shown], ["Filter", filter], ["Verdict", pruneViz.verdict(place, filter)]];
    if (clusters[index] >= 0) lines.push(["Cluster", clusters[index]]);
    const box = map.getBoundingClientRect();
    const left = box.left + x(index) * box.width, top = box.top + y(index) * box.width;
    pruneViz.preview.show(pruneViz.picture("t", place, filter), lines, new DOMRect(left - 6, top - 6, 12, 12));
  };

  const lasso = pruneViz.lasso(map, function (inside, more) {
    const width = map.clientWidth;
    const found = [];
    layerOf.forEach(function (_, index) {
      if (shown(index) && inside(x(index) * width, y(index) * width)) found.push(pair(index));
    });
    pruneViz.selection.take(found, more);
  });
  const under = function (event) {
    const tile = event.target.closest(".t");
    if (tile) return starts[Number(tile.dataset.place)] + Number(tile.dataset.number);
    const box = map.getBoundingClientRect();
    return nearest((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.width, NEAR / box.width);
  };
  const leave = function () {
    light(-1, -1);
    clearTimeout(waiting);
    pruneViz.preview.hide();
  };
  map.addEventListener("pointermove", function (event) {
    if (lasso.drawing()) return;
    const index = under(event);
    if (index === current) return;
    if (index < 0) return leave();
    light(layerOf[index], index);
    clearTimeout(waiting);
    waiting = setTimeout(describe, REST, index);
  });
  map.addEventListener("pointerleave", leave);
  map.addEventListener("click", function (event) {
    const index = event.detail ? under(event) : -1; // the return key goes where the link does
    if (index < 0) return;
    event.preventDefault();
    const link = pruneViz.link(...pair(index));
    if (event.ctrlKey || event.metaKey || event.shiftKey) open(link);
    else location.href = link;
  });
  map.addEventListener("focusin", function (event) {
    const link = event.target.closest("[data-place]");
    if (link && link.matches(":focus-visible")) light(Number(link.dataset.place), -1);
  });
  map.addEventListener("focusout", leave);
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { tints.clear(); redraw(); });
  main.addEventListener("change", redraw);

  // The table of layers: a row lights its layer up, and says how many of its filters are selected.
  const rows = Array.from(main.querySelectorAll(".layers tbody tr"));
  rows.forEach(function (row) {
    const place = Number(row.dataset.place);
    row.addEventListener("pointerenter", function () { light(place, -1); });
    row.addEventListener("pointerleave", leave);
    row.addEventListener("focusin", function () { light(place, -1); });
    row.addEventListener("focusout", leave);
  });
  const listing = main.querySelector(".selected");
  const tile = function (one) {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = pruneViz.link(...one);
    link.className = pruneViz.picture("m", ...one);
    link.setAttribute("aria-label", run.layers[one[0]].shown + ", filter " + one[1]);
    link.addEventListener("pointerenter", function () { light(one[0], starts[one[0]] + one[1]); });
    link.addEventListener("pointerleave", leave);
    item.append(link);
    return item;
  };
  const list = function () {
    leave(); // a tile that goes away is not left
    const chosen = pruneViz.selection.listed();
    const layers = new Set(chosen.map(function (one) { return one[0]; }));
    listing.hidden = !chosen.length;
    const more = chosen.length > MOST ? ", the first " + MOST + " of them below" : "";
    listing.querySelector("h3").textContent = chosen.length + " selected in " + layers.size + (layers.size === 1 ? " layer" : " layers") + more;
    listing.querySelector("ul").replaceChildren(...chosen.slice(0, MOST).map(tile));
    rows.forEach(function (row) {
      const count = pruneViz.selection.of(Number(row.dataset.place)).size;
      row.classList.toggle("chosen", count > 0);
      row.querySelector("[data-selected]").textContent = count ? count + " selected" : "";
    });
    redraw();
  };
  pruneViz.selection.listen(list);
  list();
})(window.pruneViz);
