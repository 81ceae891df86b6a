// Reviewing: accept or overrule verdicts, undo, live totals, review.json. Pages read without this file.
(function () {
  "use strict";
  const run = window.pruneVizRun;
  const bar = document.getElementById("review");
  if (!run || !bar) return;

  // Channels: what is decided together, a channel of a coupling group or a filter that is in none.
  const groups = new Map(run.groups.map(function (group) { return [group.id, group]; }));
  const channels = new Map(); // key -> { group, size, flagged, damage, removable }
  const keys = new Map(); // layer -> the key of each filter
  run.layers.forEach(function (layer) {
    const group = groups.get(layer.group);
    const flagged = new Set(layer.flagged);
    keys.set(layer.name, layer.channels.map(function (channel, filter) {
      const key = group ? group.id + ":" + channel : layer.name + "/" + filter;
      const one = channels.get(key) || { group: group && group.id, size: 0, flagged: false, damage: 0 };
      one.size += 1;
      one.flagged = one.flagged || flagged.has(filter);
      one.removable = group ? group.removable : one.flagged;
      one.damage = Math.max(one.damage, layer.damage[filter]);
      channels.set(key, one);
      return key;
    }));
  });
  const keyOf = function (layer, filter) { return (keys.get(layer) || [])[filter]; };
  const decidable = Array.from(channels.values()).filter(function (one) { return one.flagged; }).length;

  // What was decided: key -> { layer, filter, decision }.
  const shelf = "prune-viz/review/" + run.run;
  const served = location.protocol === "http:" && new URL("../review.json", document.currentScript.src);
  let decided = {};
  const past = [];
  const remember = function () {
    try { localStorage.setItem(shelf, JSON.stringify(decided)); } catch { /* private windows keep nothing */ }
    if (served) put();
  };
  const recall = function () {
    try { decided = JSON.parse(localStorage.getItem(shelf)) || {}; } catch { decided = {}; }
  };

  // Controls of what can be decided on this page.
  const at = run.layers[Number(document.getElementById("main").dataset.layer)];
  const layer = at && at.name;
  const items = Array.from(document.querySelectorAll("[data-filter]")).filter(function (item) {
    const one = channels.get(keyOf(layer, Number(item.dataset.filter)));
    return one && one.removable;
  });
  const keyAt = function (item) { return keyOf(layer, Number(item.dataset.filter)); };
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
    item.tabIndex = -1;
  });
  if (items.length) items[0].tabIndex = 0;

  const decide = function (chosen, decision) {
    const before = {};
    chosen.forEach(function (item) {
      const key = keyAt(item);
      if (key in before) return;
      before[key] = decided[key] || null;
      if (decision) decided[key] = { layer: layer, filter: Number(item.dataset.filter), decision: decision };
      else delete decided[key];
    });
    const count = Object.keys(before).length;
    if (!count) return;
    past.push(before);
    remember();
    show();
    const words = { remove: ["goes", "go"], keep: ["stays", "stay"] }[decision] || ["is undecided", "are undecided"];
    say(count === 1 ? "Filter " + chosen[0].dataset.filter + " " + words[0] : count + " filters " + words[1]);
  };
  const undo = function () {
    const before = past.pop();
    if (!before) return say("Nothing to undo");
    Object.keys(before).forEach(function (key) {
      if (before[key]) decided[key] = before[key];
      else delete decided[key];
    });
    remember();
    show();
    say("Undone");
  };

  // Totals, as prune_viz.budgets counts them.
  const totals = function () {
    let filters = 0, damage = 0, reviewed = 0, added = 0;
    const gone = new Map();
    channels.forEach(function (one, key) {
      const decision = decided[key] && decided[key].decision;
      if (decision && one.flagged) reviewed += 1;
      if (!(decision ? decision === "remove" : one.flagged)) return;
      filters += one.size;
      damage += one.damage;
      if (!one.flagged) added += one.size;
      gone.set(one.group, (gone.get(one.group) || 0) + 1);
    });
    const written = new Map(), read = new Map();
    run.groups.forEach(function (group) {
      const share = (gone.get(group.id) || 0) / group.channels;
      group.layers.forEach(function (name) { written.set(name, (written.get(name) ?? 1) - share); });
      Object.keys(group.reads).forEach(function (name) {
        read.set(name, (read.get(name) ?? 1) - share * group.reads[name]);
      });
    });
    let all = 0, left = 0;
    Object.keys(run.macs).forEach(function (name) {
      all += run.macs[name];
      left += run.macs[name] * (written.get(name) ?? 1) * (read.get(name) ?? 1);
    });
    return { filters: filters, damage: damage, reviewed: reviewed, added: added, macs: all ? 1 - left / all : 0 };
  };
  const percent = function (share) { return (100 * share).toFixed(1) + "\u202f%"; };
  const sized = function (damage) {
    if (run.unit === "nats") return (damage >= 1e-9 ? Number(damage.toPrecision(2)) : "below 1e-9") + "\u202fnats";
    const small = damage > 0 && damage < 0.001;
    return (small ? Number((100 * damage).toPrecision(2)) + "\u202f%" : percent(damage)) + (run.unit === "output" ? " of the output" : " of what reads it");
  };

  const put = function () {
    fetch(served, { method: "PUT", body: JSON.stringify(review()), headers: { "Content-Type": "application/json" } })
      .then(function (answer) { if (!answer.ok) say("Not saved: the run has changed, or the server ended"); })
      .catch(function () { say("Not saved: the server does not answer"); });
  };
  const review = function () {
    return { format: 1, run: run.run, decisions: Object.values(decided) };
  };
  const save = function () {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(review(), null, 1)], { type: "application/json" }));
    link.download = "review.json";
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
    say(Object.keys(decided).length + " decisions saved as review.json");
  };

  const show = function () {
    const now = totals();
    const fields = {
      reviewed: now.reviewed + " of " + decidable + " reviewed",
      filters: now.filters + " of " + run.filters + " filters go" + (now.added ? ", " + now.added + " of them added" : ""),
      macs: percent(now.macs) + " fewer multiply-accumulates",
      damage: "damage " + sized(now.damage),
    };
    Object.keys(fields).forEach(function (name) {
      bar.querySelector("[data-total=" + name + "]").textContent = fields[name];
    });
    items.forEach(function (item) {
      const one = decided[keyAt(item)];
      item.dataset.decided = one ? one.decision : "";
      item.querySelectorAll(".decide button").forEach(function (button) {
        button.setAttribute("aria-pressed", String(Boolean(one) && one.decision === button.dataset.decision));
      });
    });
    bar.querySelector("[data-do=undo]").disabled = !past.length;
  };
  const say = function (text) { bar.querySelector("[role=status]").textContent = text; };

  // Choosing several.
  const chosen = new Set();
  let last = null;
  const choose = function (item, on) {
    chosen[on ? "add" : "delete"](item);
    item.classList.toggle("chosen", on);
    bar.dataset.chosen = chosen.size || "";
    bar.querySelector("[data-total=chosen]").textContent = chosen.size ? chosen.size + " selected" : "";
  };
  const free = function () { Array.from(chosen).forEach(function (item) { choose(item, false); }); };
  const acting = function (item) { return chosen.size ? Array.from(chosen) : item ? [item] : []; };
  const shown = function () { return items.filter(function (item) { return item.getClientRects().length; }); };

  document.addEventListener("click", function (event) {
    const button = event.target.closest(".decide button");
    if (button) {
      const item = button.closest("[data-filter]");
      const on = button.getAttribute("aria-pressed") !== "true";
      decide(chosen.has(item) ? Array.from(chosen) : [item], on ? button.dataset.decision : null);
      return;
    }
    const every = event.target.closest("[data-every]");
    if (every) {
      const within = shown().filter(function (item) { return every.closest("section").contains(item); });
      return decide(within, every.value || null);
    }
    const act = event.target.closest("#review [data-do]");
    if (act) return acts[act.dataset.do]();
    const card = event.target.closest(".card[data-filter]");
    if (!card || event.target.closest("a")) return;
    if (event.shiftKey && last) {
      const list = shown();
      const ends = [list.indexOf(last), list.indexOf(card)].sort(function (a, b) { return a - b; });
      list.slice(ends[0], ends[1] + 1).forEach(function (item) { choose(item, true); });
      getSelection().removeAllRanges();
    } else choose(card, !chosen.has(card));
    last = card;
  });

  // Keys: one stop for tab; j and k go on and back.
  const go = function (step) {
    const list = shown();
    if (!list.length) return;
    const here = list.indexOf(document.activeElement.closest("[data-filter]"));
    const next = list[here < 0 ? (step > 0 ? 0 : list.length - 1) : (here + step + list.length) % list.length];
    items.forEach(function (item) { item.tabIndex = item === next ? 0 : -1; });
    next.focus();
  };
  const help = document.getElementById("keys");
  const acts = {
    undo: undo,
    save: save,
    help: function () { help.showModal(); },
    clear: function () { free(); },
    remove: function () { decide(Array.from(chosen), "remove"); free(); },
    keep: function () { decide(Array.from(chosen), "keep"); free(); },
    undecide: function () { decide(Array.from(chosen), null); free(); },
    load: function () { bar.querySelector("input[type=file]").click(); },
  };
  bar.querySelector("input[type=file]").addEventListener("change", function (event) {
    const file = event.target.files[0];
    if (file) file.text().then(load).catch(function () { say("That file is not a review"); });
    event.target.value = "";
  });
  const parse = function (read) {
    const found = {};
    read.decisions.forEach(function (one) {
      const key = keyOf(one.layer, one.filter);
      const known = one.decision === "remove" || one.decision === "keep";
      if (key && known) found[key] = { layer: one.layer, filter: one.filter, decision: one.decision };
    });
    return found;
  };
  const load = function (text) {
    const read = JSON.parse(text);
    if (read.run !== run.run) return say("That review is of another run");
    const before = decided;
    decided = parse(read);
    const touched = Object.keys({ ...before, ...decided });
    past.push(Object.fromEntries(touched.map(function (key) { return [key, before[key] || null]; })));
    remember();
    show();
    say(read.decisions.length + " decisions read");
  };
  document.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, dialog")) return;
    const item = event.target.closest("[data-filter]");
    const pressed = {
      a: function () { decide(acting(item), "remove"); },
      r: function () { decide(acting(item), "keep"); },
      u: function () { decide(acting(item), null); },
      x: function () { if (item) { choose(item, !chosen.has(item)); last = item; } },
      j: function () { go(1); },
      k: function () { go(-1); },
      z: undo,
      s: save,
      "?": function () { help.showModal(); },
      Escape: free,
    };
    if (!Object.hasOwn(pressed, event.key)) return;
    event.preventDefault();
    pressed[event.key]();
  });
  addEventListener("storage", function (event) { if (event.key === shelf) { recall(); show(); } });

  bar.hidden = false;
  document.documentElement.classList.add("reviewing");
  recall();
  show();
  // Served, the run directory knows best.
  if (served) {
    fetch(served).then(function (answer) { return answer.ok ? answer.json() : null; }).then(function (saved) {
      if (!saved || saved.run !== run.run) return;
      decided = parse(saved);
      show();
    }).catch(function () { say("The server does not answer"); });
  }
})();
