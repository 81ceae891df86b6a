// Which filters are selected: by lasso on the maps, by clicks and keys on the cards. Kept from page to page.
(function (pruneViz) {
  "use strict";
  const shelf = "prune-viz/selection/" + pruneViz.run.run;
  const listeners = [];
  let chosen = new Map(); // place -> set of numbers
  try {
    chosen = new Map(JSON.parse(sessionStorage.getItem(shelf)).map(function (pair) {
      return [pair[0], new Set(pair[1])];
    }).filter(function (pair) { return pruneViz.run.layers[pair[0]]; }));
  } catch { /* nothing was selected, or nothing is kept */ }
  const changed = function () {
    const listed = Array.from(chosen, function (pair) { return [pair[0], Array.from(pair[1])]; });
    try { sessionStorage.setItem(shelf, JSON.stringify(listed)); } catch { /* private windows keep nothing */ }
    listeners.forEach(function (listener) { listener(); });
  };
  // What this page acts on: a layer's page on its own filters, the overview on all.
  const here = function () {
    return pruneViz.place < 0 ? Array.from(chosen.keys()).sort(function (a, b) { return a - b; }) : [pruneViz.place];
  };
  const of = function (place) { return chosen.get(place) || new Set(); };

  const put = function (filters, on) {
    filters.forEach(function (pair) {
      if (!chosen.has(pair[0])) chosen.set(pair[0], new Set());
      chosen.get(pair[0])[on ? "add" : "delete"](pair[1]);
    });
    changed();
  };
  const drop = function () { here().forEach(function (place) { chosen.delete(place); }); };

  pruneViz.selection = {
    of: of,
    listed: function () {
      return here().flatMap(function (place) {
        return Array.from(of(place)).sort(function (a, b) { return a - b; }).map(function (number) { return [place, number]; });
      });
    },
    set: put,
    // What a lasso found, instead of what was selected or in addition.
    take: function (filters, more) {
      if (!more) drop();
      put(filters, true);
    },
    clear: function () {
      drop();
      changed();
    },
    listen: function (listener) { listeners.push(listener); },
  };
})(window.pruneViz);
