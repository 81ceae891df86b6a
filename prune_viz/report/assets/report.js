// Comforts of every page: tables that sort and narrow, one verdict at a time, arrow keys from layer to layer.
(function (pruneViz) {
  "use strict";
  const main = pruneViz.main;
  document.documentElement.classList.add("js");

  // Columns of a table sort by the cells' data-value.
  main.querySelectorAll("table[data-sortable]").forEach(function (table) {
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

  // A table narrows to the rows that hold all words of what is typed.
  main.querySelectorAll(".narrow").forEach(function (box) {
    const input = box.querySelector("input"), status = box.querySelector("[role=status]");
    const rows = Array.from(box.closest("section").querySelectorAll("tbody tr"));
    box.hidden = false;
    input.addEventListener("input", function () {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach(function (row) {
        const text = Array.from(row.cells, function (cell) { return cell.textContent.toLowerCase(); }).join(" ");
        row.hidden = !words.every(function (word) { return text.includes(word); });
      });
      const left = rows.filter(function (row) { return !row.hidden; }).length;
      status.textContent = words.length ? left + " of " + rows.length : "";
    });
  });

  // Show one verdict only.
  const choice = main.querySelector(".show");
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

  // Left and right go to the layer before and after.
  document.addEventListener("keydown", function (event) {
    const free = !event.defaultPrevented && !event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey;
    if (!free || event.target.closest("input, dialog, pre, .scroll, [data-map]")) return;
    const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const link = rel && document.querySelector(".top:not([hidden]) a[rel=" + rel + "]");
    if (link) link.click();
  });
})(window.pruneViz);
