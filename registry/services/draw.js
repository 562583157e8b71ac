"use strict";
// Looking around in a drawn lineage. All text of the registry is set as text: nothing here builds markup.
(() => {
  const svg = document.querySelector("main > svg");
  const card = document.getElementById("card");
  const search = document.getElementById("search");
  const found = document.getElementById("found");
  const look = document.getElementById("look");
  const { root, versions } = JSON.parse(document.getElementById("data").textContent); // root: only where it is served
  const data = new Map(Object.entries(versions));
  const nodes = new Map([...svg.querySelectorAll(".node[data-ref]")].map((node) => [node.dataset.ref, node]));
  const edges = svg.querySelectorAll(".edge-group");
  const whole = svg.viewBox.baseVal;
  const full = { x: whole.x, y: whole.y, width: whole.width, height: whole.height };
  const view = { ...full };
  let chosen = null;

  // --- where one looks
  const apply = () => svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
  const scale = () => svg.getScreenCTM().a;
  const fit = () => { Object.assign(view, full); apply(); };
  const point = (x, y) => new DOMPoint(x, y).matrixTransform(svg.getScreenCTM().inverse());
  const middle = () => { const box = svg.getBoundingClientRect(); return point(box.x + box.width / 2, box.y + box.height / 2); };
  const zoom = (factor, at = middle()) => {
    const bounded = Math.min(Math.max(view.width / factor, 160), full.width * 4) / view.width;
    view.x = at.x - (at.x - view.x) * bounded;
    view.y = at.y - (at.y - view.y) * bounded;
    view.width *= bounded;
    view.height *= bounded;
    apply();
  };
  const centre = (element) => {
    const box = element.getBoundingClientRect();
    const at = point(box.x + box.width / 2, box.y + box.height / 2);
    const factor = scale() < 0.9 ? 1 / scale() : 1;
    view.width /= factor;
    view.height /= factor;
    view.x = at.x - view.width / 2;
    view.y = at.y - view.height / 2;
    apply();
  };
  const reveal = (element) => {
    const box = element.getBoundingClientRect(), frame = svg.getBoundingClientRect();
    if (box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom) centre(element);
  };

  const tabbed = (element) => { if (element.matches(":focus-visible")) reveal(element); }; // not what a click is still on

  // --- what is known of a version
  const add = (parent, tag, text) => { const child = document.createElement(tag); child.textContent = text; parent.append(child); return child; };
  const table = (title, rows) => {
    if (!rows.length) return;
    if (title) add(card, "h3", title);
    const body = add(card, "table", "");
    for (const [key, value] of rows) { const row = add(body, "tr", ""); add(row, "th", key).scope = "row"; add(row, "td", value); }
  };
  const relatives = (title, rows) => {
    if (!rows.length) return;
    add(card, "h3", title);
    for (const [ref, label] of rows) {
      const shown = nodes.has(ref), beyond = !shown && root !== null; // another page shows it
      const item = add(card, shown ? "button" : "div", beyond ? "" : `${ref}  ${label}`);
      if (shown) { item.type = "button"; item.addEventListener("click", () => go(ref)); }
      if (beyond) { add(item, "a", ref).href = page(ref); item.append(` ${label}`); }
    }
  };
  const page = (ref) => { const end = ref.lastIndexOf(":"); return `${root}adapters/${encodeURIComponent(ref.slice(0, end))}/${ref.slice(end + 1)}`; };
  const links = (rows) => {
    if (!rows) return;
    const line = add(card, "p", "");
    for (const [word, address] of rows) { const link = add(line, "a", word); link.href = address; line.append(" "); }
  };
  const receipts = new Map();
  const share = (value) => value === undefined || value === null ? value : value === 0 || value === 1 ? `${100 * value}%` : value >= 1e-4 ? `${(100 * value).toFixed(2)}%` : value.toExponential(1);
  const proof = async (ref, path) => {
    if (!receipts.has(ref)) {
      const answer = await fetch(root + path);
      if (!answer.ok) return;
      receipts.set(ref, await answer.json());
    }
    if (ref !== chosen) return;
    const { layers, checks, spectrum, fingerprint, predicted_loss: promised, loss } = receipts.get(ref);
    const rows = [["measured loss", share(loss)], ["promised loss", share(promised)], ["energy held at this rank", share(spectrum?.energy_at_rank)],
      ["checks passed", checks?.length], ["computed with", fingerprint && `numpy ${fingerprint.numpy}, ${fingerprint.blas}, ${fingerprint.cpu}`]];
    if (layers?.loss.length) {
      const worst = layers.loss.indexOf(Math.max(...layers.loss));
      rows.push(["hardest module", `${layers.module[worst]}, loss ${share(layers.loss[worst])}`]);
    }
    table("Receipt", rows.filter(([, value]) => value !== undefined && value !== null));
    const link = add(card, "a", "The whole receipt (JSON)");
    link.href = root + path;
  };
  const show = (ref) => {
    card.hidden = !data.has(ref);
    card.parentElement.classList.toggle("empty", card.hidden && root === null);
    if (card.hidden) return;
    const known = data.get(ref);
    card.replaceChildren();
    add(card, "h2", ref);
    links(known.links);
    table("", known.facts);
    table("Metrics", known.metrics);
    relatives("Parents", known.parents);
    relatives("Children", known.children);
    if (ref === chosen && known.receipt) proof(ref, known.receipt);
  };
  const mark = (ref) => {
    for (const edge of edges) edge.classList.toggle("near", ref !== null && (edge.dataset.parent === ref || edge.dataset.child === ref));
  };
  const choose = (ref) => { chosen = ref; show(ref); mark(ref); history.replaceState(null, "", ref ? `#${encodeURIComponent(ref)}` : location.pathname + location.search); };
  const open = (ref) => { const page = data.get(ref).links?.[0][1]; if (page) location.assign(page); };
  const go = (ref) => { if (nodes.has(ref)) { nodes.get(ref).focus({ preventScroll: true }); reveal(nodes.get(ref)); } };

  // --- search
  const seek = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let hits = 0;
    svg.classList.toggle("searching", words.length > 0);
    for (const [ref, node] of nodes) {
      const hit = words.length > 0 && words.every((word) => data.get(ref).words.includes(word));
      node.classList.toggle("hit", hit);
      node.classList.toggle("miss", words.length > 0 && !hit);
      hits += hit;
    }
    found.textContent = words.length ? `${hits} of ${nodes.size}` : "";
  };
  const next = () => {
    const hits = [...nodes.keys()].filter((ref) => nodes.get(ref).classList.contains("hit"));
    if (hits.length) go(hits[(hits.indexOf(chosen) + 1) % hits.length]);
  };

  // --- keyboard
  const beside = (ref, step) => {
    const at = nodes.get(ref).getBoundingClientRect();
    const row = [...nodes].map(([other, node]) => [other, node.getBoundingClientRect()]).filter(([, box]) => Math.abs(box.y - at.y) < 2);
    row.sort((a, b) => a[1].x - b[1].x);
    return row[row.findIndex(([other]) => other === ref) + step]?.[0];
  };
  const walk = {
    ArrowUp: (ref) => data.get(ref).parents.find(([other]) => nodes.has(other))?.[0],
    ArrowDown: (ref) => data.get(ref).children[0]?.[0],
    ArrowLeft: (ref) => beside(ref, -1),
    ArrowRight: (ref) => beside(ref, 1),
    Enter: (ref) => { centre(nodes.get(ref)); return ref; },
    o: (ref) => { open(ref); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") { search.value = ""; seek(); document.activeElement.blur(); choose(null); return; }
    if (event.target.closest?.("select")) return;
    if (event.target === search) { if (event.key === "Enter") next(); return; }
    const ref = document.activeElement.dataset?.ref;
    const action = { "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit, "/": () => search.focus() }[event.key];
    if (action) { action(); event.preventDefault(); return; }
    if (ref !== undefined && Object.hasOwn(walk, event.key)) { const to = walk[event.key](ref); if (to !== undefined) go(to); event.preventDefault(); }
  });

  // --- pointer
  let from = null;
  svg.addEventListener("pointerdown", (event) => { if (event.button === 0 && !event.target.closest(".node[data-ref]")) from = point(event.clientX, event.clientY); });
  window.addEventListener("pointermove", (event) => {
    if (!from) return;
    const to = point(event.clientX, event.clientY);
    view.x += from.x - to.x;
    view.y += from.y - to.y;
    apply();
  });
  window.addEventListener("pointerup", () => { from = null; });
  svg.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.12 : 1 / 1.12, point(event.clientX, event.clientY)); }, { passive: false });
  for (const [ref, node] of nodes) {
    node.addEventListener("focus", () => { choose(ref); tabbed(node); });
    node.addEventListener("click", () => go(ref));
    node.addEventListener("dblclick", () => open(ref));
    node.addEventListener("pointerenter", () => { if (!from) show(ref); });
    node.addEventListener("pointerleave", () => show(chosen));
  }
  for (const more of svg.querySelectorAll("a")) more.addEventListener("focus", () => tabbed(more));
  document.getElementById("in").addEventListener("click", () => zoom(1.25));
  document.getElementById("out").addEventListener("click", () => zoom(0.8));
  document.getElementById("fit").addEventListener("click", fit);
  search.addEventListener("input", seek);
  look?.querySelector("button").remove(); // a choice is followed at once
  look?.addEventListener("change", () => { look.action = location.pathname + location.hash; look.requestSubmit(); });

  const follow = () => { try { const ref = decodeURIComponent(location.hash.slice(1)); if (nodes.has(ref)) go(ref); } catch { /* a broken address shows the whole graph */ } };
  window.addEventListener("hashchange", follow);
  const own = svg.querySelector(".node.root");
  if (scale() < 0.4 && own) centre(own); // the whole would be too small to read; 0 shows it
  follow();
})();
