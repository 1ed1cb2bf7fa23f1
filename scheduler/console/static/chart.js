// One chart of the last two minutes: a line for each series, the newest point at the right edge.

import { key } from "./dom.js";

const SPAN_S = 120;
const WIDTH = 600;
const HEIGHT = 120;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  #points = [];
  #series;
  #paths;
  #values;
  #top;
  #svg;
  #title;
  #ceiling;
  #format;

  // `series` names the lines, `ceiling` what the scale never falls below, `format` how each value is told.
  constructor(parent, { title, series, ceiling, format }) {
    this.#title = title;
    this.#series = series;
    this.#ceiling = ceiling;
    this.#format = format;
    const figure = parent.appendChild(document.createElement("figure"));
    figure.className = "panel chart";
    const caption = figure.appendChild(document.createElement("figcaption"));
    caption.appendChild(document.createElement("span")).textContent = title;
    this.#values = caption.appendChild(document.createElement("span"));
    this.#top = figure.appendChild(document.createElement("span"));
    this.#top.className = "scale";
    this.#svg = figure.appendChild(element("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    }));
    for (const share of [0, 0.5, 1]) {
      const y = share * HEIGHT;
      this.#svg.appendChild(element("line", { x1: 0, x2: WIDTH, y1: y, y2: y, class: "grid" }));
    }
    this.#paths = series.map((name) => this.#svg.appendChild(element("path", { class: `line ${name}` })));
  }

  // `at` is in seconds; `values` holds one number for each series.
  add(at, values) {
    this.#points.push({ at, values });
    while (this.#points[0].at < at - SPAN_S) this.#points.shift();
    const most = Math.max(this.#ceiling, ...this.#points.flatMap((point) => point.values));
    const scale = niceAbove(most);
    this.#paths.forEach((path, index) => path.setAttribute("d", this.#line(index, at, scale)));
    const told = this.#format(values);
    this.#values.replaceChildren(...told.map((text, index) => key(this.#series[index], text)));
    this.#top.textContent = scale.toLocaleString();
    this.#svg.setAttribute("aria-label", `${this.#title}: ${told.join(", ")}, at most ${round(most)} in two minutes`);
  }

  #line(index, now, scale) {
    const places = this.#points.map(({ at, values }) => {
      const x = WIDTH * (1 - (now - at) / SPAN_S);
      const y = HEIGHT * (1 - values[index] / scale);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    return `M${places.join("L")}`;
  }
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// The next of 1, 2, 5, 10, 20, …
function niceAbove(value) {
  const magnitude = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * magnitude).find((step) => step >= value);
}

function round(value) {
  return Number(value.toPrecision(3)).toLocaleString();
}
