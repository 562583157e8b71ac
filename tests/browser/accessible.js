() => {
  // WCAG 2.2, 1.4.3 for text inside a drawing: axe reads the colours of HTML only, and calls those of SVG undecided.
  const found = [];
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  for (const text of document.querySelectorAll("svg text")) {
    if (text.closest(".miss, .searching .edge-group")) continue; // what a search did not find steps back on purpose
    const sign = text.parentElement.matches(".recall") ? text.parentElement : text.closest(".node");
    const paper = sign?.querySelector("rect") ?? document.querySelector("rect.paper");
    const seen = ratio(getComputedStyle(text).fill, getComputedStyle(paper).fill);
    if (seen < 4.5) found.push(`contrast ${seen.toFixed(2)}: ${text.textContent.slice(0, 40)}`);
  }
  return found;
}
