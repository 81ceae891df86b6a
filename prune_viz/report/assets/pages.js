// Which page this is and how to get to another: a file each, or all in one.
(function () {
  "use strict";
  const run = window.pruneVizRun || { layers: [] };
  const mains = Array.from(document.querySelectorAll("main"));
  const together = mains.length > 1;

  // A link may name a layer and a filter, `#layer/filter`, on whatever page it is opened.
  const named = function () {
    const parts = /^#(.*)\/(\d+)$/.exec(location.hash);
    if (!parts) return null;
    let layer = "";
    try { layer = decodeURIComponent(parts[1]); } catch { return null; }
    const filter = Number(parts[2]);
    const place = run.layers.findIndex(function (one) { return one.name === layer; });
    return place >= 0 && run.layers[place].verdicts[filter] ? { place: place, filter: filter } : null;
  };
  const wanted = function () {
    const found = named();
    if (found) return document.getElementById("layer-" + found.place);
    const target = document.getElementById(location.hash.slice(1));
    return (target && target.closest("main")) || mains[0];
  };
  const main = together ? wanted() : mains[0];
  const place = main.dataset.layer === undefined ? -1 : Number(main.dataset.layer);

  // Of all pages in one file only one is shown; going to another starts anew there.
  if (together) {
    document.querySelectorAll("main, .top").forEach(function (part) {
      part.hidden = part.dataset.layer !== main.dataset.layer;
    });
    document.title = main.dataset.title;
    document.querySelector("body > .skip").hash = main.id;
    addEventListener("hashchange", function () {
      if (wanted() !== main) location.reload();
    });
    addEventListener("load", function () {
      const target = !named() && document.getElementById(location.hash.slice(1));
      if (target && target !== main) target.scrollIntoView();
      else scrollTo(0, 0);
    });
  }

  const url = function (to, fragment) {
    if (together || to === place) return fragment;
    return (place < 0 ? "layers/" : "") + run.layers[to].page + fragment;
  };
  const page = function (to) { return url(to, to === place || together ? "#layer-" + to : ""); };
  const link = function (to, filter) {
    return url(to, "#" + encodeURIComponent(run.layers[to].name) + "/" + filter);
  };

  // The class that shows a filter's stimulus ("t", small "m") or weights ("w"), as render.py writes them. Those of
  // another layer come with its style sheet, once that is needed.
  const styled = new Set(together ? run.layers.keys() : [place]);
  const picture = function (kind, layer, filter) {
    if (!styled.has(layer)) {
      const sheet = document.createElement("link");
      sheet.rel = "stylesheet";
      sheet.href = url(layer, "").replace(/\.html$/, ".css");
      document.head.append(sheet);
      styled.add(layer);
    }
    return "t " + kind + layer + "-" + filter;
  };

  // Numbers of a run, packed.
  const unpack = function (text, Type) {
    return new Type(Uint8Array.from(atob(text), function (one) { return one.charCodeAt(0); }).buffer);
  };

  window.pruneViz = {
    run: run, main: main, place: place, named: named, page: page, link: link, picture: picture, unpack: unpack,
    verdict: function (layer, filter) {
      return run.verdicts[run.layers[layer].verdicts[filter]][0];
    },
  };
})();
