() => {
  // What a person with a screen reader, a keyboard or weak eyes would trip over: WCAG 2.2, 1.4.3, 2.4.3, 4.1.2.
  const found = [];
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const check = (element, ink, paper) => {
    const seen = ratio(ink, paper);
    if (seen < 4.5) found.push(`contrast ${seen.toFixed(2)}: ${element.tagName} ${element.textContent.slice(0, 40)}`);
  };
  const paperOf = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  for (const each of document.querySelectorAll("a, button, select, input, .node[data-ref]")) {
    const name = each.getAttribute("aria-label") || each.closest("label")?.textContent || each.textContent;
    if (!name.trim()) found.push(`no name: ${each.outerHTML.slice(0, 80)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  if (!document.documentElement.lang) found.push("no language");
  if (document.querySelectorAll("main").length !== 1 || document.querySelectorAll("h1").length !== 1) found.push("main or h1");
  if (document.querySelector("[tabindex]:not([tabindex='0'])")) found.push("an order of focus of its own");
  for (const each of document.querySelectorAll("h1, h2, h3, p, label, li, li a, footer, th, td, button")) {
    if (each.offsetParent) check(each, getComputedStyle(each).color, paperOf(each));
  }
  for (const node of document.querySelectorAll(".node[data-ref]")) {
    const paper = getComputedStyle(node.querySelector(".box")).fill;
    for (const text of node.querySelectorAll("text")) check(text, getComputedStyle(text).fill, paper);
  }
  return found;
}
