// Reviewing: the bar with its totals, the controls on cards, and the keys. Pages read without this file.
(function (pruneViz) {
  "use strict";
  const run = pruneViz.run, place = pruneViz.place, main = pruneViz.main;
  const decisions = pruneViz.decisions, selection = pruneViz.selection;
  const bar = document.getElementById("review");
  if (!decisions) return;

  // Controls of what can be decided on this page.
  const numbered = Array.from(main.querySelectorAll("[data-filter]"));
  const number = function (item) { return Number(item.dataset.filter); };
  const items = numbered.filter(function (item) { return decisions.removable(place, number(item)); });
  items.forEach(function (item) {
    const box = document.createElement("span");
    box.className = "decide";
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Decide on filter " + item.dataset.filter);
    [["remove", "Remove"], ["keep", "Keep"]].forEach(function (pair) {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.decision = pair[0];
      button.textContent = pair[1];
      box.append(button);
    });
    item.append(box);
  });
  numbered.forEach(function (item, index) { item.tabIndex = index ? -1 : 0; });

  const say = function (text) { bar.querySelector("[role=status]").textContent = text; };
  decisions.complain(say);
  const decide = function (filters, decision) {
    if (!filters.length) return;
    const count = decisions.decide(filters, decision);
    const one = filters.length === 1;
    const words = { remove: ["goes", "go"], keep: ["stays", "stay"] }[decision] || ["is undecided", "are undecided"];
    if (one) say(count ? "Filter " + filters[0][1] + " " + words[0] : "Filter " + filters[0][1] + " cannot be removed");
    else say(count ? count + (count === 1 ? " filter " + words[0] : " filters " + words[1]) : "None of these can be removed");
  };
  const pairs = function (list) { return list.map(function (item) { return [place, number(item)]; }); };

  // Totals and what each card shows.
  const inFull = function (number) { return number.toLocaleString("en-US"); };  // as the pages write it
  const percent = function (share) { return (100 * share).toFixed(1) + "\u202f%"; };
  const sized = function (damage) {
    const unit = run.unit, figure = damage * unit.scale;  // written as `prune_viz.runs.damage` does
    const two = function (value) {
      if (value >= 99.5) return value.toFixed(0);
      return value && value < 1e-4 ? value.toExponential(1).replace(".0e", "e") : String(Number(value.toPrecision(2)));
    };
    const size = figure && figure < unit.least ? "under " + two(unit.least) : two(figure);
    return size + "\u202f" + unit.symbol + (unit.of && " " + unit.of);
  };
  const show = function () {
    const now = decisions.totals();
    const fields = {
      reviewed: inFull(now.reviewed) + " of " + inFull(now.decidable) + " reviewed",
      filters: inFull(now.filters) + " of " + inFull(run.filters) + " filters go" + (now.added ? ", " + inFull(now.added) + " of them added" : ""),
      macs: percent(now.macs) + " fewer multiply-accumulates",
      damage: "damage " + sized(now.damage),
    };
    Object.keys(fields).forEach(function (name) {
      bar.querySelector("[data-total=" + name + "]").textContent = fields[name];
    });
    items.forEach(function (item) {
      const decided = decisions.of(place, number(item));
      item.dataset.decided = decided;
      item.querySelectorAll(".decide button").forEach(function (button) {
        button.setAttribute("aria-pressed", String(decided === button.dataset.decision));
      });
    });
    bar.querySelector("[data-do=undo]").disabled = !decisions.undoable();
  };
  const mark = function () {
    const chosen = selection.of(place);
    numbered.forEach(function (item) { item.classList.toggle("chosen", chosen.has(number(item))); });
    const count = selection.listed().length;
    bar.dataset.chosen = count || "";
    bar.querySelector("[data-total=chosen]").textContent = count ? count + " selected" : "";
  };
  decisions.listen(show);
  selection.listen(mark);

  const save = function () {
    const review = decisions.file();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(review, null, 1)], { type: "application/json" }));
    link.download = "review.json";
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
    say(review.decisions.length + " decisions saved as review.json");
  };
  bar.querySelector("input[type=file]").addEventListener("change", function (event) {
    const file = event.target.files[0];
    event.target.value = "";
    if (!file) return;
    file.text().then(function (text) {
      const count = decisions.open(text);
      say(count === null ? "That review is of another run" : count + (count === 1 ? " decision read" : " decisions read"));
    }).catch(function () { say("That file is not a review"); });
  });

  const finish = function (decision) { decide(selection.listed(), decision); selection.clear(); };
  const help = document.getElementById("keys");
  const acts = {
    undo: function () { say(decisions.undo() ? "Undone" : "Nothing to undo"); },
    save: save,
    help: function () { help.showModal(); },
    clear: selection.clear,
    remove: function () { finish("remove"); },
    keep: function () { finish("keep"); },
    undecide: function () { finish(null); },
    load: function () { bar.querySelector("input[type=file]").click(); },
  };

  let last = null;
  const shown = function () { return numbered.filter(function (item) { return item.getClientRects().length; }); };
  const toggle = function (item) {
    selection.set(pairs([item]), !item.classList.contains("chosen"));
    last = item;
  };
  document.addEventListener("click", function (event) {
    const button = event.target.closest(".decide button");
    if (button) {
      const item = button.closest("[data-filter]");
      const on = button.getAttribute("aria-pressed") !== "true";
      decide(item.classList.contains("chosen") ? selection.listed() : pairs([item]), on ? button.dataset.decision : null);
      return;
    }
    const every = event.target.closest("[data-every]");
    if (every) {
      const within = shown().filter(function (item) { return every.closest("section").contains(item); });
      return decide(pairs(within), every.value || null);
    }
    const act = event.target.closest("#review [data-do]");
    if (act) return acts[act.dataset.do]();
    const card = event.target.closest(".card[data-filter]");
    if (!card || event.target.closest("a, b") || event.detail > 1) return; // the number, and a double click, open it
    const list = shown();
    if (event.shiftKey && list.includes(last)) {
      const ends = [list.indexOf(last), list.indexOf(card)].sort(function (a, b) { return a - b; });
      selection.set(pairs(list.slice(ends[0], ends[1] + 1)), true);
      getSelection().removeAllRanges();
      last = card;
    } else toggle(card);
  });

  document.addEventListener("dblclick", function (event) {
    const card = event.target.closest(".card[data-filter]");
    if (card && !event.target.closest("a, b, button")) toggle(card); // its first click was not meant to select
  });

  // Keys: one stop for tab; j and k go on and back.
  const go = function (step) {
    const list = shown();
    if (!list.length) return;
    const here = list.indexOf(document.activeElement.closest("[data-filter]"));
    const next = list[here < 0 ? (step > 0 ? 0 : list.length - 1) : (here + step + list.length) % list.length];
    numbered.forEach(function (item) { item.tabIndex = item === next ? 0 : -1; });
    next.focus();
  };
  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input:not([type=radio]), dialog")) return;
    const item = event.target.closest("[data-filter]");
    // What is in focus, alone unless it is one of those selected; what is selected where nothing is in focus.
    const acting = function () {
      return item && !item.classList.contains("chosen") ? pairs([item]) : selection.listed();
    };
    const pressed = {
      a: function () { decide(acting(), "remove"); },
      r: function () { decide(acting(), "keep"); },
      u: function () { decide(acting(), null); },
      x: function () { if (item) toggle(item); },
      j: function () { go(1); },
      k: function () { go(-1); },
      z: acts.undo,
      s: save,
      "?": acts.help,
      Escape: selection.clear,
    };
    if (!Object.hasOwn(pressed, event.key)) return;
    event.preventDefault();
    pressed[event.key]();
  });

  bar.hidden = false;
  document.documentElement.classList.add("reviewing");
  show();
  mark();
})(window.pruneViz);
