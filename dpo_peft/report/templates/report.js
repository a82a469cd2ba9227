"use strict";
// Values of a chart under the pointer or, by the arrow keys, at the cursor; runs of a comparison brought out.
const SVG = "http://www.w3.org/2000/svg";
const NEAR = 5, MOST_ROWS = 12;
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
const numbers = (text) => text.split(" ").map(Number);
const make = (parent, name, text = "") => {
  const child = parent.appendChild(document.createElement(name));
  child.textContent = text;
  return child;
};

function watch(svg) {
  const [x0, x1, y0, y1] = numbers(svg.dataset.domain);
  const [left, right, top, bottom] = numbers(svg.dataset.box);
  const toX = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
  const toY = (y) => bottom + ((y - y0) / (y1 - y0)) * (top - bottom);
  const traces = [...svg.querySelectorAll("[data-points]")].map((path) => {
    const flat = path.dataset.points ? numbers(path.dataset.points) : [];
    return { path, points: flat.filter((_, i) => i % 2 === 0).map((x, i) => [x, flat[2 * i + 1]]) };
  });
  const steps = [...new Set(traces.flatMap((trace) => trace.points.map(([x]) => x)))].sort((a, b) => a - b);
  if (!steps.length) return; // no value is finite
  const cursor = svg.appendChild(document.createElementNS(SVG, "g"));
  cursor.setAttribute("class", "cursor");
  let at = -1;
  const nearest = (points, place) =>
    points.reduce((best, point) => (Math.abs(toX(point[0]) - place) < Math.abs(toX(best[0]) - place) ? point : best));

  function show(x, clientX, clientY) {
    cursor.replaceChildren();
    tip.replaceChildren();
    const line = cursor.appendChild(document.createElementNS(SVG, "path"));
    line.setAttribute("d", `M${toX(x)} ${top}V${bottom}`);
    make(tip, "div", `${svg.dataset.x} ${x}`.replace(" -", " −"));
    let left_out = 0;
    for (const { path, points } of traces.filter((trace) => trace.points.length)) {
      const [px, value] = nearest(points, toX(x));
      if (Math.abs(toX(px) - toX(x)) > NEAR) continue;
      if (tip.childElementCount > MOST_ROWS) { left_out += 1; continue; }
      const dot = cursor.appendChild(document.createElementNS(SVG, "circle"));
      for (const [name, set] of Object.entries({ cx: toX(px), cy: toY(value), r: 3.2 })) dot.setAttribute(name, set);
      const row = make(tip, "p");
      make(row, "span", path.dataset.label);
      make(row, "b", `${value} ${svg.dataset.unit || ""}`.trim().replace("-", "−"));
      const color = path.classList[1];
      for (const part of [dot, row]) part.classList.add(color);
    }
    if (left_out) make(tip, "div", `and ${left_out} more`);
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const beside = clientX + 14 + width > document.documentElement.clientWidth ? clientX - 14 - width : clientX + 14;
    tip.style.left = `${Math.max(4, beside)}px`;
    tip.style.top = `${Math.max(4, Math.min(clientY + 14, window.innerHeight - height - 4))}px`;
  }
  function hide() {
    cursor.replaceChildren();
    tip.hidden = true;
    at = -1;
  }
  function point(event) {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = nearest(steps.map((step) => [step]), place)[0];
    at = steps.indexOf(x);
    show(x, event.clientX, event.clientY);
  }
  function press(event) {
    if (event.key === "Escape") return hide();
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.min(Math.max(at + move, 0), steps.length - 1);
    const box = svg.getBoundingClientRect();
    show(steps[at], box.left + (toX(steps[at]) / svg.viewBox.baseVal.width) * box.width, box.top + box.height / 3);
  }
  for (const name of ["pointermove", "pointerdown"]) svg.addEventListener(name, point);
  for (const name of ["pointerleave", "pointercancel", "blur"]) svg.addEventListener(name, hide);
  svg.addEventListener("keydown", press);
}
document.querySelectorAll("svg.chart[data-x]").forEach(watch);

const buttons = [...document.querySelectorAll(".key button")];
for (const button of buttons) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    const pressed = buttons.filter((other) => other.getAttribute("aria-pressed") === "true");
    const chosen = new Set(pressed.map((other) => other.dataset.group));
    for (const svg of document.querySelectorAll("svg.chart")) {
      svg.classList.toggle("dimmed", chosen.size > 0);
      const paths = svg.querySelectorAll("[data-group]");
      paths.forEach((path) => path.classList.toggle("chosen", chosen.has(path.dataset.group)));
    }
  });
}
window.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
