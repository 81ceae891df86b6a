// A card beside what is pointed at on a map: the filter's stimulus and what is known of it.
(function (pruneViz) {
  "use strict";
  const card = document.getElementById("preview");
  const row = function (pair) {
    const line = document.createElement("span");
    line.className = "line";
    line.append(...pair.map(function (text) {
      const piece = document.createElement("span");
      piece.textContent = text;
      return piece;
    }));
    return line;
  };
  pruneViz.preview = {
    // `picture` is the class of a tile, `lines` a text or a name and a value each, `at` the box of what is pointed at.
    show: function (picture, lines, at) {
      card.firstElementChild.className = picture;
      card.lastElementChild.replaceChildren(...lines.map(row));
      card.hidden = false;
      const box = card.getBoundingClientRect();
      const gap = at.width / 2 + 12;
      const fits = at.right + gap + box.width < document.documentElement.clientWidth;
      const top = Math.min(Math.max(8, at.top + at.height / 2 - box.height / 2), innerHeight - box.height - 8);
      card.style.left = (fits ? at.right + gap : Math.max(8, at.left - gap - box.width)) + "px";
      card.style.top = top + "px";
    },
    hide: function () { card.hidden = true; },
  };
})(window.pruneViz);
