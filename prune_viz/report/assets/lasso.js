// A lasso: a line drawn around things on a map with a mouse or pen; fingers scroll.
(function (pruneViz) {
  "use strict";
  const LEAST = 6; // pixels; below it a click is a click

  const within = function (line, x, y) {
    let inside = false;
    for (let i = 0, j = line.length - 1; i < line.length; j = i, i += 1) {
      const [ax, ay] = line[i], [bx, by] = line[j];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
    }
    return inside;
  };

  // `finished` gets a test of what is inside, in pixels of the map, and whether that is to be added.
  pruneViz.lasso = function (map, finished) {
    map.insertAdjacentHTML("beforeend", '<svg class="lasso" aria-hidden="true"><polygon></polygon></svg>');
    const shape = map.querySelector(".lasso polygon");
    let line = null, drawing = false;

    const at = function (event) {
      const box = map.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const end = function () {
      line = null;
      drawing = false;
      map.classList.remove("drawing");
      shape.setAttribute("points", "");
    };
    map.addEventListener("dragstart", function (event) { event.preventDefault(); });
    map.addEventListener("pointerdown", function (event) {
      if (event.button === 0 && event.pointerType !== "touch") line = [at(event)];
    });
    map.addEventListener("pointermove", function (event) {
      if (!line) return;
      if (!(event.buttons & 1)) return end(); // let go outside of the map
      const here = at(event), last = line[line.length - 1];
      const far = Math.hypot(here[0] - last[0], here[1] - last[1]);
      if (far < (drawing ? 2 : LEAST)) return;
      if (!drawing) {
        drawing = true;
        map.setPointerCapture(event.pointerId);
        map.classList.add("drawing");
        pruneViz.preview.hide();
      }
      line.push(here);
      shape.setAttribute("points", line.map(function (point) { return point.join(","); }).join(" "));
    });
    map.addEventListener("pointerup", function (event) {
      if (drawing) {
        const drawn = line;
        finished(function (x, y) { return within(drawn, x, y); }, event.shiftKey);
        // The click that follows is not one.
        const swallow = function (click) { click.preventDefault(); click.stopPropagation(); };
        addEventListener("click", swallow, { capture: true, once: true });
        setTimeout(function () { removeEventListener("click", swallow, { capture: true }); }, 0);
      }
      end();
    });
    map.addEventListener("pointercancel", end);
    addEventListener("keydown", function (event) {
      if (event.key !== "Escape" || !drawing) return;
      event.stopPropagation(); // what was selected stays
      end();
    }, { capture: true });
    return { drawing: function () { return drawing; } };
  };
})(window.pruneViz);
