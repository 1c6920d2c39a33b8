// A chart: an SVG that is drawn anew whenever its size, its range or its data change.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 52, right: 14, top: 12, bottom: 26 };
const MOST_DOTS = 60; // of an evaluation curve; more would merge into a band

/** An element with attributes, in `parent`; data only ever becomes an attribute or text, never markup. */
function add(parent, name, attributes = {}, text = null) {
  const svg = parent.namespaceURI === SVG || name === "svg";
  const child = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) child.setAttribute(key, value);
  if (text !== null) child.textContent = text;
  parent.appendChild(child);
  return child;
}

class Chart {
  /** `view` is shared by all charts: axis, range, cursor, hidden runs; `changed` draws them all again. */
  constructor(holder, spec, data, view, changed) {
    Object.assign(this, { holder, spec, view, changed, log: spec.log, drag: null });
    this.box = holder.querySelector(".plot");
    this.box.replaceChildren();
    this.svg = add(this.box, "svg", { tabindex: "0", role: "img" });
    this.tip = add(this.box, "div", { class: "tip", role: "status", hidden: "" });
    const compared = data.runs.length > 1;
    this.lines = [];
    data.runs.forEach((run, index) => {
      const found = spec.series.filter((series) => run.series[series.key]);
      const smooth = found.some((series) => series.kind === "line");
      found.forEach((series) => {
        // Several runs: one line each, or they would hide one another.
        if (compared && series.kind === "faint" && smooth) return;
        const [steps, values] = run.series[series.key];
        const kind = series.kind === "faint" && !smooth ? "line" : series.kind;
        const colour = compared ? index : kind === "dots" || kind === "best" ? 1 : 0;
        const dashed = index >= data.colours || (compared && kind === "dots") ? " dashed" : "";
        const own = found.length > 1 ? `${run.name}, ${series.label}` : run.name;
        const label = compared ? own : series.label;
        const name = `${kind} c${colour % data.colours}${dashed}`;
        this.lines.push({ run, index, steps, values, kind, name, label, xs: steps });
      });
    });
    this.listen();
    this.legend(compared);
  }

  legend(compared) {
    const list = this.holder.querySelector(".legend");
    const name = (line, text) => {
      const item = add(list, "li");
      add(item, "i", { class: `swatch ${line.name}` });
      item.append(text);
    };
    if (!compared) return this.lines.length > 1 && this.lines.forEach((line) => name(line, line.label));
    // The runs are the same in all charts; the first one, which is the largest, names them.
    if (this.holder.previousElementSibling) return;
    const named = new Map(this.trends.filter((line) => line.kind !== "dots").map((line) => [line.index, line]));
    for (const line of named.values()) name(line, line.run.name);
    if (this.lines.some((line) => line.kind === "dots")) add(list, "li", {}, "with dots: evaluation; ring: the best");
  }

  /** Recompute where the points lie after the axis was changed. */
  moveTo(axis) {
    for (const line of this.lines) line.xs = line.steps.map((step) => place(line.run, axis, step));
  }

  get shown() {
    return this.lines.filter((line) => !this.view.hidden.has(line.index));
  }

  /** Those that have a course; the ring around the best evaluation says nothing that its curve does not. */
  get trends() {
    return this.shown.filter((line) => line.kind !== "best");
  }

  /** Lowest and highest value among the visible points. */
  heights([from, to]) {
    let [low, high] = [Infinity, -Infinity];
    for (const line of this.trends) {
      // One point further on each side: lines run on to the edge.
      const first = lastNotAbove(line.xs, from);
      const last = Math.min(lastNotAbove(line.xs, to) + 1, line.xs.length - 1);
      for (let i = first; i <= last; i++) {
        const value = line.values[i];
        if (this.log && value <= 0) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    if (low > high) return this.log ? [0.1, 1] : [0, 1];
    if (this.log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
    if (this.spec.fromZero) return [Math.min(0, low), high * 1.08 || 1];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  draw() {
    const [width, height] = [this.box.clientWidth, this.box.clientHeight];
    if (!width) return;
    const range = this.view.range || this.view.extent;
    const [low, high] = this.heights(range);
    const bend = this.log ? Math.log : (value) => value;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    this.inner = inner;
    this.x = (value) => MARGIN.left + (inner.width * (value - range[0])) / (range[1] - range[0] || 1);
    this.unX = (pixel) => range[0] + ((range[1] - range[0]) * (pixel - MARGIN.left)) / inner.width;
    this.y = (value) => MARGIN.top + inner.height * (1 - (bend(value) - bend(low)) / (bend(high) - bend(low)));
    const svg = this.svg;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const names = this.shown.map((line) => `${line.label} ${figure(line.values[line.values.length - 1])} at the end`);
    svg.setAttribute("aria-label", `${this.spec.title}: ${names.slice(0, 8).join(", ")}`);
    this.grid(range, low, high, width, height);
    const clip = `clip-${this.spec.name}`;
    const { left, top } = MARGIN;
    add(add(svg, "clipPath", { id: clip }), "rect", { x: left, y: 0, width: inner.width + 10, height: top + inner.height + 8 });
    const curves = add(svg, "g", { "clip-path": `url(#${clip})` });
    for (const line of this.shown) this.curve(curves, line, range);
    this.marks = add(svg, "g", { class: "marks" });
    this.point();
  }

  grid(range, low, high, width, height) {
    const lines = add(this.svg, "g", { class: "grid" });
    const rows = Math.max(2, Math.round(this.inner.height / 40));
    for (const value of this.log ? logTicks(low, high, rows) : linearTicks(low, high, rows)) {
      const y = this.y(value).toFixed(1);
      add(lines, "line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y });
      add(lines, "text", { x: MARGIN.left - 8, y, dy: "0.32em", "text-anchor": "end" }, figure(value, 3));
    }
    const axis = AXES[this.view.axis];
    for (const value of linearTicks(...range, Math.max(2, Math.round(this.inner.width / 100)), axis.steps)) {
      if (!axis.steps && !Number.isInteger(value)) continue; // there is no half step, and no half token
      const x = this.x(value);
      const anchor = x > width - 40 ? "end" : "middle";
      const right = anchor === "end" ? Math.min(x + 12, width - 2) : x;
      add(lines, "text", { x: right.toFixed(1), y: height - 7, "text-anchor": anchor }, axis.tick(value));
    }
  }

  curve(parent, line, [from, to]) {
    const first = lastNotAbove(line.xs, from);
    const last = Math.min(lastNotAbove(line.xs, to) + 1, line.xs.length - 1);
    const path = [];
    let pen = "M";
    for (let i = first; i <= last; i++) {
      if (this.log && line.values[i] <= 0) {
        pen = "M";
        continue;
      }
      path.push(`${pen}${this.x(line.xs[i]).toFixed(1)} ${this.y(line.values[i]).toFixed(1)}`);
      pen = "L";
    }
    if (path.length > 1) add(parent, "path", { class: `curve ${line.name}`, d: path.join("") });
    // A lone point has no line.
    if ((line.kind === "dots" && path.length <= MOST_DOTS) || path.length === 1) {
      for (const place of path) {
        const [cx, cy] = place.slice(1).split(" ");
        add(parent, "circle", { class: `dot ${line.name}`, cx, cy, r: 3.5 });
      }
    }
  }

  /** Draw the cursor, if there is one, and say the values there in the chart that it is in. */
  point() {
    this.marks.replaceChildren();
    const cursor = this.view.cursor;
    this.tip.hidden = !cursor || cursor.chart !== this;
    if (!cursor) return;
    const x = this.x(cursor.x);
    if (x < MARGIN.left - 1 || x > MARGIN.left + this.inner.width + 1) return;
    const attributes = { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: MARGIN.top + this.inner.height };
    add(this.marks, "line", attributes);
    const rows = [];
    for (const line of this.trends) {
      const i = nearest(line.xs, cursor.x);
      if (this.log && line.values[i] <= 0) continue;
      // An evaluation is rare, and the nearest may be far: it says where it is.
      const where = line.kind === "dots" && line.xs[i] !== cursor.x ? `, ${AXES[this.view.axis].word(line.xs[i])}` : "";
      rows.push([line, line.label + where, line.values[i]]);
      const place = { cx: this.x(line.xs[i]), cy: this.y(line.values[i]) };
      if (place.cx >= MARGIN.left - 1) add(this.marks, "circle", { class: `dot ${line.name}`, ...place, r: 4 });
    }
    if (cursor.chart === this) this.say(x, cursor.x, rows);
  }

  say(x, at, rows) {
    this.tip.replaceChildren();
    add(this.tip, "b", {}, AXES[this.view.axis].word(at));
    for (const [line, label, value] of rows) {
      const row = add(this.tip, "div");
      add(row, "i", { class: `swatch ${line.name}` });
      add(row, "span", {}, label);
      add(row, "b", {}, figure(value));
    }
    const width = this.tip.offsetWidth;
    const left = x + 14 + width > this.box.clientWidth ? x - width - 14 : x + 14;
    this.tip.style.left = `${Math.max(0, left)}px`;
  }

  listen() {
    const pixel = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    const snap = (x) => {
      const line = this.shown[0];
      return line && line.xs.length ? line.xs[nearest(line.xs, x)] : x;
    };
    const show = (event) => {
      this.view.cursor = { chart: this, x: snap(this.unX(pixel(event))) };
      this.changed("cursor");
    };
    const hide = () => {
      this.view.cursor = null;
      this.changed("cursor");
    };
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.svg.setPointerCapture(event.pointerId);
      this.drag = { from: pixel(event), band: null };
      show(event);
    });
    this.svg.addEventListener("pointermove", (event) => {
      show(event);
      if (!this.drag || (!this.drag.band && Math.abs(pixel(event) - this.drag.from) < 8)) return;
      this.drag.band ||= add(this.svg, "rect", { class: "band", y: MARGIN.top, height: this.inner.height });
      const [a, b] = this.between(this.drag.from, pixel(event));
      this.drag.band.setAttribute("x", a);
      this.drag.band.setAttribute("width", b - a);
    });
    this.svg.addEventListener("pointerup", (event) => {
      const drag = this.drag;
      this.drag = null;
      if (drag?.band) return this.zoom(...this.between(drag.from, pixel(event)).map(this.unX));
      // A second tap soon after the first; the browser says so only for a mouse.
      const twice = event.pointerType !== "mouse" && event.timeStamp - (this.tapped || -1e3) < 350;
      this.tapped = event.timeStamp;
      if (twice) this.reset();
    });
    this.svg.addEventListener("pointercancel", () => {
      this.drag?.band?.remove();
      this.drag = null;
      hide();
    });
    // A finger that is lifted leaves too, and the values it asked for are to stay.
    this.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    this.svg.addEventListener("blur", hide);
    this.svg.addEventListener("dblclick", () => this.reset());
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  between(a, b) {
    const inside = (x) => Math.min(Math.max(x, MARGIN.left), MARGIN.left + this.inner.width);
    return [inside(a), inside(b)].sort((first, second) => first - second);
  }

  zoom(from, to) {
    const [first, last] = this.view.extent;
    const range = [Math.max(first, from), Math.min(last, to)];
    if (range[1] - range[0] > (last - first) * 1e-4) this.view.range = range;
    if (range[0] <= first && range[1] >= last) this.view.range = null;
    this.changed("range");
  }

  reset() {
    this.view.range = null;
    this.changed("range");
  }

  key(event) {
    const line = this.shown[0];
    if (!line || event.ctrlKey || event.metaKey || event.altKey) return;
    const range = this.view.range || this.view.extent;
    const at = nearest(line.xs, this.view.cursor?.chart === this ? this.view.cursor.x : range[0]);
    const go = (i) => {
      const x = line.xs[Math.min(Math.max(i, lastNotAbove(line.xs, range[0])), lastNotAbove(line.xs, range[1]))];
      this.view.cursor = { chart: this, x };
      this.changed("cursor");
    };
    const scale = (factor) => {
      const middle = this.view.cursor?.x ?? (range[0] + range[1]) / 2;
      this.zoom(middle - (middle - range[0]) * factor, middle + (range[1] - middle) * factor);
    };
    const stride = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowLeft: () => go(at - stride),
      ArrowRight: () => go(at + stride),
      Home: () => go(0),
      End: () => go(line.xs.length - 1),
      "+": () => scale(0.5),
      "=": () => scale(0.5),
      "-": () => scale(2),
      0: () => this.reset(),
      Escape: () => this.reset(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}
