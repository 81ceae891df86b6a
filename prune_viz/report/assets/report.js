// Comforts only: every page reads without this file.
(function () {
  "use strict";
  document.documentElement.classList.add("js");

  // Columns of a table sort by the cells' data-value.
  document.querySelectorAll("table[data-sortable]").forEach(function (table) {
    const heads = Array.from(table.tHead.rows[0].cells);
    const body = table.tBodies[0];
    const value = function (row, column) { return row.cells[column].dataset.value; };
    heads.forEach(function (head, column) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", function () {
        const rows = Array.from(body.rows);
        const numeric = rows.every(function (row) { return value(row, column) !== "" && !isNaN(value(row, column)); });
        const now = head.getAttribute("aria-sort");
        const down = now ? now === "ascending" : numeric;
        rows.sort(function (a, b) {
          const x = value(a, column), y = value(b, column);
          const order = numeric ? x - y : x.localeCompare(y, undefined, { numeric: true });
          return down ? -order : order;
        });
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        body.append(...rows);
      });
    });
  });

  // Show one verdict only.
  const main = document.getElementById("main");
  const choice = document.querySelector(".show");
  if (choice) {
    choice.hidden = false;
    const show = function (verdict) {
      main.dataset.show = verdict;
      choice.querySelector("[value=" + verdict + "]").checked = true;
    };
    show("all");
    choice.addEventListener("change", function (event) { show(event.target.value); });
    // A link to a filter that is not shown shows all again, or it would lead nowhere.
    document.addEventListener("click", function (event) {
      const link = event.target.closest("main a[href^='#']");
      const target = link && document.getElementById(link.getAttribute("href").slice(1));
      if (target && !target.getClientRects().length) show("all");
    });
  }

  const map = document.querySelector("[data-map]");
  const preview = document.getElementById("preview");
  if (map && preview) {
    const tiles = Array.from(map.querySelectorAll("a"));
    const members = Array.from(map.querySelectorAll("[data-cluster]"));
    const picture = preview.firstElementChild;
    const text = preview.lastElementChild;
    let current = null;

    const enter = function (tile) {
      picture.className = "t t" + tile.id.slice(1);
      const cluster = tile.dataset.cluster;
      const lines = tile.getAttribute("aria-label").split(", ");
      if (cluster !== "-1") lines.push("cluster " + cluster);
      text.replaceChildren(...lines.map(function (line) {
        const row = document.createElement("span");
        row.className = "line";
        const cut = line.lastIndexOf(" ");
        row.append(...(cut < 0 ? [line] : [line.slice(0, cut), " ", line.slice(cut + 1)]).map(function (part) {
          const piece = document.createElement("span");
          piece.textContent = part;
          return piece;
        }));
        return row;
      }));
      preview.hidden = false;
      current = tile;
      beside(tile);
      const peers = cluster !== "-1";
      map.classList.toggle("one-cluster", peers);
      members.forEach(function (other) { other.classList.toggle("peer", peers && other.dataset.cluster === cluster); });
    };
    const beside = function (tile) {
      const at = tile.getBoundingClientRect();
      const box = preview.getBoundingClientRect();
      const gap = at.width * 0.5 + 12;
      const right = at.right + gap + box.width < document.documentElement.clientWidth;
      const left = right ? at.right + gap : Math.max(8, at.left - gap - box.width);
      const top = Math.min(Math.max(8, at.top + at.height / 2 - box.height / 2), innerHeight - box.height - 8);
      preview.style.left = left + "px";
      preview.style.top = top + "px";
    };
    const leave = function () {
      current = null;
      preview.hidden = true;
      map.classList.remove("one-cluster");
      members.forEach(function (other) { other.classList.remove("peer"); });
    };
    map.addEventListener("pointerover", function (event) {
      const tile = event.target.closest("a");
      if (tile) enter(tile);
    });
    map.addEventListener("pointerout", leave);
    map.addEventListener("focusin", function (event) { if (event.target.matches(":focus-visible")) enter(event.target); });
    map.addEventListener("focusout", leave);
    addEventListener("scroll", function () { if (current) beside(current); }, { passive: true });

    // One stop for the tab key; arrows go to the nearest thumbnail in that direction.
    const stop = function (tile) {
      tiles.forEach(function (other) { other.tabIndex = other === tile ? 0 : -1; });
    };
    if (tiles.length) stop(tiles[0]);
    map.addEventListener("focusin", function (event) { stop(event.target); });
    map.addEventListener("keydown", function (event) {
      if (event.key === "Escape") return leave();
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const shown = main.dataset.show;
      const here = event.target;
      let best = null, least = Infinity;
      tiles.forEach(function (tile) {
        if (tile === here || (shown !== "all" && !tile.classList.contains(shown))) return;
        const x = tile.offsetLeft - here.offsetLeft, y = tile.offsetTop - here.offsetTop;
        const along = x * step[0] + y * step[1], across = Math.abs(x * step[1] + y * step[0]);
        const distance = along + 2 * across;
        if (along > 0 && distance < least) { least = distance; best = tile; }
      });
      if (best) best.focus();
    });
  }

  // Left and right go to the layer before and after.
  document.addEventListener("keydown", function (event) {
    const free = !event.defaultPrevented && !event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey;
    if (!free || event.target.closest("input, pre, .scroll, [data-map]")) return;
    const id = { ArrowLeft: "previous", ArrowRight: "following" }[event.key];
    const link = id && document.getElementById(id);
    if (link) link.click();
  });
})();
