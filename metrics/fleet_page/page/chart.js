// A line chart in SVG: lines over time, a legend with the last figures, a cursor that tells.

import { clock, node } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const PAD = { left: 62, right: 10, top: 20, bottom: 36 };
const DASHES = ["", "8 4", "2 4", "12 3 2 3"];
const MOST_MARKS = 40;

function svg(name, attributes) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function steps(low, high, count, binary) {
  if (binary && high > 0) {
    const unit = 1024 ** Math.max(0, Math.floor(Math.log2(high) / 10));
    return steps(low / unit, high / unit, count).map((value) => value * unit);
  }
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

const TIME = { title: "time", label: (value, near) => clock(value, near), full: (value) => clock(value, true), bridge: false };
export const VERSION = { title: "version in use", label: (value) => String(Math.round(value)), full: (value) => `version ${value}`, bridge: true };

export class Chart {
  // options: format(value), unit (of the axis), floor (its least value, or null), binary (figures are bytes)
  constructor(figure, { format, unit, floor = null, binary = false }) {
    Object.assign(this, { format, unit, floor, binary, series: [], times: [], axis: TIME });
    this.title = figure.querySelector("figcaption");
    this.svg = svg("svg", { role: "img" });
    this.legend = node("ul", "legend");
    this.tip = node("div", "tip");
    this.tip.hidden = true;
    figure.append(this.svg, this.legend, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  // series: [{name, colour, values}], values as many as times, null where there is none; or over another axis
  show(times, series, axis = TIME) {
    this.axis = axis;
    this.times = times;
    this.series = series;
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth || 400;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const all = this.series.flatMap((one) => one.values).filter((value) => value != null);
    const [from, to] = [this.times[0] ?? 0, this.times[this.times.length - 1] ?? 1];
    let low = this.floor ?? Math.min(...all), high = Math.max(...all);
    if (!all.length) [low, high] = [0, 1];
    if (high - low < 1e-9) high = low + (Math.abs(low) * 0.1 || 1);
    if (this.floor == null) low -= (high - low) * 0.08;
    high += (high - low) * 0.08;
    this.x = (time) => PAD.left + ((time - from) / (to - from || 1)) * (width - PAD.left - PAD.right);
    this.y = (value) => HEIGHT - PAD.bottom - ((value - low) / (high - low)) * (HEIGHT - PAD.top - PAD.bottom);
    const parts = [];
    for (const value of steps(low, high, 4, this.binary)) {
      const y = this.y(value);
      parts.push(svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }));
      const label = svg("text", { class: "axis", x: PAD.left - 8, y: y + 4, "text-anchor": "end" });
      label.textContent = this.format(value);
      parts.push(label);
    }
    if (this.times.length > 1) {
      const near = to - from < 300;
      for (const [time, anchor] of [[from, "start"], [(from + to) / 2, "middle"], [to, "end"]]) {
        const label = svg("text", { class: "axis", x: this.x(time), y: HEIGHT - 20, "text-anchor": anchor });
        label.textContent = this.axis.label(time, near);
        parts.push(label);
      }
    }
    const across = svg("text", { class: "axis title", x: (PAD.left + width - PAD.right) / 2, y: HEIGHT - 5, "text-anchor": "middle" });
    across.textContent = this.axis.title;
    const upwards = svg("text", { class: "axis title", x: 0, y: 9 });
    upwards.textContent = this.unit;
    parts.push(across, upwards);
    for (const one of this.series) parts.push(...this.line(one));
    this.cursor = svg("g", {});
    this.svg.replaceChildren(...parts, this.cursor);
    this.tell();
  }

  line(one) {
    let path = "", open = false;
    one.values.forEach((value, i) => {
      if (value == null) { open = open && this.axis.bridge; return; }
      path += `${open ? "L" : "M"}${this.x(this.times[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      open = true;
    });
    const line = svg("path", { class: `line s${one.colour % 8}`, d: path });
    const dash = DASHES[one.colour % DASHES.length];
    if (dash) line.setAttribute("stroke-dasharray", dash);
    const known = one.values.flatMap((value, i) => (value == null ? [] : [[this.times[i], value]]));
    if (known.length > MOST_MARKS) return [line];
    return [line, ...known.map(([time, value]) => svg("circle", { class: `mark s${one.colour % 8}`, cx: this.x(time), cy: this.y(value), r: 2.5 }))];
  }

  tell() {
    const last = this.series.map((one) => {
      const value = one.values.findLast((each) => each != null);
      return [one, value == null ? "–" : this.format(value)];
    });
    this.legend.replaceChildren(...last.map(([one, value]) => {
      const item = node("li", `s${one.colour % 8} dash${one.colour % DASHES.length}`, one.name);
      item.append(node("b", "", value));
      return item;
    }));
    const spoken = last.map(([one, value]) => `${one.name} ${value}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title.textContent}: ${spoken || "nothing yet"}`);
  }

  point(event) {
    if (this.times.length < 2) return;
    const box = this.svg.getBoundingClientRect();
    const at = event.clientX - box.left;
    let nearest = 0;
    this.times.forEach((time, i) => {
      if (Math.abs(this.x(time) - at) < Math.abs(this.x(this.times[nearest]) - at)) nearest = i;
    });
    const x = this.x(this.times[nearest]);
    this.cursor.replaceChildren(svg("line", { class: "cursor", x1: x, x2: x, y1: PAD.top, y2: HEIGHT - PAD.bottom }));
    const told = [node("time", "", this.axis.full(this.times[nearest]))];
    for (const one of this.series) {
      const value = one.values[nearest];
      if (value == null) continue;
      this.cursor.append(svg("circle", { class: `point s${one.colour % 8}`, cx: x, cy: this.y(value), r: 4 }));
      told.push(node("div", `s${one.colour % 8}`, `${one.name} ${this.format(value)}`));
    }
    this.tip.replaceChildren(...told);
    this.tip.hidden = false;
    const left = x + 16 + this.tip.offsetWidth > box.width ? x - this.tip.offsetWidth - 2 : x + 26;
    this.tip.style.left = `${Math.max(4, left)}px`;
    this.tip.style.top = "38px";
  }

  leave() {
    this.cursor?.replaceChildren();
    this.tip.hidden = true;
  }
}
