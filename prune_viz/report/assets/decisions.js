// What is decided on a run's filters: what goes together, totals, undo, what the browser keeps.
(function (pruneViz) {
  "use strict";
  const run = pruneViz.run;
  if (!run.run) return;

  // Channels: what is decided together, a channel of a coupling group or a filter that is in none.
  const groups = new Map(run.groups.map(function (group) { return [group.id, group]; }));
  const channels = new Map(); // key -> { group, size, flagged, damage, removable }
  const keys = run.layers.map(function (layer) {
    const group = groups.get(layer.group);
    const damage = pruneViz.unpack(layer.damage, Float32Array);
    return Array.from(layer.verdicts, function (verdict, filter) {
      const channel = layer.channels ? layer.channels[filter] : filter;
      const key = group ? group.id + ":" + channel : layer.name + "/" + filter;
      const one = channels.get(key) || { group: group && group.id, size: 0, flagged: false, damage: 0 };
      one.size += 1;
      one.flagged = one.flagged || run.verdicts[verdict][1];
      one.removable = group ? group.removable : one.flagged;
      one.damage = Math.max(one.damage, damage[filter]);
      channels.set(key, one);
      return key;
    });
  });
  const removable = function (place, filter) { return channels.get(keys[place][filter]).removable; };
  const places = new Map(run.layers.map(function (layer, place) { return [layer.name, place]; }));
  const decidable = Array.from(channels.values()).filter(function (one) { return one.flagged; }).length;

  // What was decided: key -> { layer, filter, decision }. Served, the run directory keeps it too.
  const shelf = "prune-viz/review/" + run.run, unsaved = shelf + "/unsaved"; // whether this browser is ahead
  const source = document.currentScript.src; // none where all is in one file
  const served = source && location.protocol === "http:" && new URL("../review.json", source);
  const listeners = [];
  const past = [];
  let decided = {};
  let complaint = function () {};
  const tell = function () { listeners.forEach(function (listener) { listener(); }); };
  const changed = function () {
    try {
      localStorage.setItem(shelf, JSON.stringify(decided));
      if (served) localStorage.setItem(unsaved, "1");
    } catch {
      setTimeout(complaint, 0, "This browser keeps nothing: save the review before you leave the page");
    }
    if (served) put();
    tell();
  };
  const recall = function () {
    try { decided = JSON.parse(localStorage.getItem(shelf)) || {}; } catch { decided = {}; }
  };
  const file = function () { return { format: 1, run: run.run, decisions: Object.values(decided) }; };
  // One save at a time, or an older one could come last; what changes meanwhile is saved next.
  let saving = Boolean(served), waiting = false, loaded = false; // nothing is saved before what is there is read
  const put = function () {
    waiting = saving;
    if (saving) return;
    saving = true;
    const body = JSON.stringify(file());
    const kept = new Blob([body]).size < 60000; // browsers finish no larger ones once the page is left
    fetch(served, { method: "PUT", body: body, keepalive: kept, headers: { "Content-Type": "application/json" } })
      .then(function (answer) {
        if (!answer.ok) return answer.text().then(function (why) { complaint("Not saved: " + why); });
        if (waiting) return;
        try { localStorage.removeItem(unsaved); } catch { /* nothing is kept */ }
      })
      .catch(function () { complaint("Not saved: the server does not answer"); })
      .then(proceed);
  };
  const proceed = function () {
    saving = false;
    if (waiting) put();
  };

  // Decide on filters, pairs of a place and a number; tells how many of them can be decided on.
  const decide = function (filters, decision) {
    const before = {};
    const able = filters.filter(function (pair) { return removable(...pair); });
    able.forEach(function (pair) {
      const key = keys[pair[0]][pair[1]];
      if (key in before) return;
      before[key] = decided[key] || null;
      if (decision) decided[key] = { layer: run.layers[pair[0]].name, filter: pair[1], decision: decision };
      else delete decided[key];
    });
    if (able.length) {
      past.push(before);
      changed();
    }
    return able.length;
  };
  const undo = function () {
    const before = past.pop();
    if (!before) return false;
    Object.keys(before).forEach(function (key) {
      if (before[key]) decided[key] = before[key];
      else delete decided[key];
    });
    changed();
    return true;
  };

  // What all that is flagged costs together, over the sum of what each costs alone.
  let alone = 0;
  channels.forEach(function (one) { if (one.flagged) alone += one.damage; });
  const together = run.predicted && alone ? run.predicted / alone : 1;

  // Totals, as prune_viz.budgets counts them.
  const totals = function () {
    let filters = 0, damage = 0, reviewed = 0, added = 0;
    const gone = new Map();
    channels.forEach(function (one, key) {
      const decision = decided[key] && decided[key].decision;
      if (decision && one.flagged) reviewed += 1;
      if (!(decision ? decision === "remove" : one.flagged)) return;
      filters += one.size;
      damage += one.damage * (one.flagged ? together : 1);
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
    const macs = all ? 1 - left / all : 0;
    return { filters: filters, damage: damage, reviewed: reviewed, decidable: decidable, added: added, macs: macs };
  };

  const parse = function (read) {
    const found = {};
    read.decisions.forEach(function (one) {
      const place = places.get(one.layer);
      const key = Number.isInteger(one.filter) ? (keys[place] || [])[one.filter] : undefined;
      const known = one.decision === "remove" || one.decision === "keep";
      if (key && known && removable(place, one.filter)) found[key] = { layer: one.layer, filter: one.filter, decision: one.decision };
    });
    return found;
  };
  // Take over a saved review: how many decisions it holds; null where it is of another run.
  const open = function (text) {
    const read = JSON.parse(text);
    if (read.run !== run.run) return null;
    const before = decided;
    decided = parse(read);
    const touched = Object.keys({ ...before, ...decided });
    past.push(Object.fromEntries(touched.map(function (key) { return [key, before[key] || null]; })));
    changed();
    return Object.keys(decided).length;
  };

  addEventListener("storage", function (event) { if (event.key === shelf) { recall(); tell(); } });
  recall();
  if (served) { // the run directory knows best, but of what was decided since, or left before it was saved
    const before = decided;
    try { waiting = localStorage.getItem(unsaved) !== null; } catch { /* nothing is kept */ }
    const ahead = waiting;
    decided = { ...before };
    fetch(served).then(function (answer) {
      if (answer.status === 409) answer.text().then(function (why) { complaint(why); }); // what is there is no review
      return answer.ok ? answer.json() : null;
    }).then(function (saved) {
      if (ahead || !saved || saved.run !== run.run) return;
      const since = decided;
      decided = parse(saved);
      Object.keys({ ...before, ...since }).forEach(function (key) {
        if (since[key] === before[key]) return;
        if (since[key]) decided[key] = since[key];
        else delete decided[key];
      });
      tell();
    }).catch(function () { complaint("The server does not answer"); }).then(function () {
      loaded = true;
      proceed();
    });
    addEventListener("pagehide", function () { if (loaded) proceed(); });
  }

  pruneViz.decisions = {
    decide: decide, undo: undo, totals: totals, file: file, open: open,
    of: function (place, filter) { return (decided[keys[place][filter]] || { decision: "" }).decision; },
    removable: removable,
    undoable: function () { return past.length > 0; },
    listen: function (listener) { listeners.push(listener); },
    complain: function (say) { complaint = say; },
  };
})(window.pruneViz);
