// Draws the charts of a run's report. The page carries its data in #data; nothing is fetched.
// All charts share one cursor: hovering a step, or the arrow keys, reads every series at that step.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const MARGIN = { top: 8, right: 12, bottom: 22, left: 52 };
  const SMOOTH_FROM = 40; // points; shorter series are drawn as they are

  const element = (parent, name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  // A number as a person writes it: 4 significant digits, thousands as k, M, G, small ones as a power of ten.
  const figure = (value) => {
    if (value === null || value === undefined) return "-";
    const size = Math.abs(value);
    for (const [limit, suffix] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]])
      if (size >= limit) return +(value / (suffix === "k" ? 1e3 : limit)).toPrecision(4) + suffix;
    if (size > 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(+value.toPrecision(4));
  };

  // About `count` round values that cover [low, high].
  const ticks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const unit = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
    const found = [];
    for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-9; i++) found.push(+(i * unit).toPrecision(12));
    return found;
  };

  // Mean over a window centred on each point, narrower towards the ends so that it never lags; gaps stay gaps.
  const smooth = (values) => {
    const most = Math.max(2, Math.round(values.length / 60));
    const sums = [0];
    const counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return values.map((value, i) => {
      const half = Math.min(most, i, values.length - 1 - i);
      const [from, to] = [i - half, i + half + 1];
      return value === null ? null : (sums[to] - sums[from]) / (counts[to] - counts[from]);
    });
  };

  // Index of the point whose step is nearest.
  const nearest = (steps, step) => {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  };

  // A value between two gaps is a line of no length, which round caps show as a dot.
  const line = (steps, values, x, y) => {
    let path = "";
    let pen = false;
    values.forEach((value, i) => {
      if (value !== null) path += `${pen ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}${pen ? "" : "h0"}`;
      pen = value !== null;
    });
    return path;
  };

  class Chart {
    constructor(card, spec) {
      this.spec = spec;
      this.plot = card.querySelector(".plot");
      const legend = card.querySelector(".legend");
      this.readouts = spec.series.map((series) => {
        const entry = document.createElement("span");
        const swatch = document.createElement("i");
        swatch.className = series.points ? "dot" : "";
        swatch.style.background = `var(--c${series.color})`;
        const value = document.createElement("b");
        entry.append(swatch, `${series.name} `, value);
        legend.append(entry);
        return value;
      });
      const all = spec.series.flatMap((series) => series.values).filter((v) => v !== null);
      this.empty = all.length === 0;
      if (this.empty) {
        const note = document.createElement("div");
        note.className = "empty";
        note.textContent = "nothing recorded";
        this.plot.append(note);
        return;
      }
      all.push(...spec.baselines.map((baseline) => baseline.value));
      const low = spec.zero ? 0 : all.reduce((a, b) => Math.min(a, b));
      const high = all.reduce((a, b) => Math.max(a, b));
      // Values that differ by rounding alone count as equal: no ticks fit between neighbouring numbers.
      const size = Math.max(Math.abs(low), Math.abs(high));
      const pad = (high - low > size * 1e-9 ? high - low : size || 1) * 0.06;
      this.low = spec.zero ? 0 : low - pad;
      this.high = high + pad;
      new ResizeObserver(() => this.draw()).observe(this.plot);
      this.draw();
    }

    draw() {
      const { width, height } = this.plot.getBoundingClientRect();
      if (width < 80) return;
      const right = width - MARGIN.right;
      const bottom = height - MARGIN.bottom;
      const [first, last] = data.range;
      const span = last - first || 1;
      this.x = (step) => MARGIN.left + ((step - first) / span) * (right - MARGIN.left);
      this.y = (value) => bottom - ((value - this.low) / (this.high - this.low)) * (bottom - MARGIN.top);
      const svg = document.createElementNS(NS, "svg");
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("role", "img");
      svg.setAttribute("tabindex", "0");
      svg.setAttribute("aria-label", this.spec.label);
      for (const value of ticks(this.low, this.high, height > 250 ? 7 : 4)) {
        const at = this.y(value);
        element(svg, "line", { class: "gridline", x1: MARGIN.left, x2: right, y1: at, y2: at });
        element(svg, "text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, figure(value));
      }
      for (const step of ticks(first, last || 1, Math.max(3, Math.floor(width / 75)))) {
        if (!Number.isInteger(step)) continue;
        element(svg, "text", { x: this.x(step), y: height - 4, "text-anchor": "middle" }, figure(step));
      }
      element(svg, "line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom });
      for (const { name, value } of this.spec.baselines) {
        const at = this.y(value);
        element(svg, "line", { class: "baseline", x1: MARGIN.left, x2: right, y1: at, y2: at });
        element(svg, "text", { class: "halo", x: right - 4, y: at - 5, "text-anchor": "end" }, `${name} ${figure(value)}`);
      }
      for (const { steps, values, color, points, smoothed } of this.spec.series) {
        const stroke = `var(--c${color})`;
        const shared = { fill: "none", stroke, "stroke-linejoin": "round", "stroke-linecap": "round" };
        const busy = smoothed && values.length >= SMOOTH_FROM;
        const radius = values.length > 40 ? 2 : 3.5;
        const raw = { ...shared, d: line(steps, values, this.x, this.y) };
        element(svg, "path", { ...raw, "stroke-width": busy ? 1 : 2, "stroke-opacity": busy ? 0.32 : 1 });
        if (busy) element(svg, "path", { ...shared, d: line(steps, smooth(values), this.x, this.y), "stroke-width": 2 });
        if (points || values.length === 1)
          values.forEach((value, i) => {
            if (value === null) return;
            element(svg, "circle", { cx: this.x(steps[i]), cy: this.y(value), r: radius, fill: stroke });
          });
      }
      const hidden = { visibility: "hidden" };
      this.cursor = element(svg, "line", { class: "cursor", y1: MARGIN.top, y2: bottom, ...hidden });
      this.dots = this.spec.series.map(({ color }) =>
        element(svg, "circle", { r: 4, fill: `var(--c${color})`, stroke: "var(--card)", "stroke-width": 2, ...hidden }));
      this.badge = element(svg, "text", { class: "halo", y: MARGIN.top + 8, ...hidden });
      const stepAt = (event) => {
        const box = svg.getBoundingClientRect();
        const part = (event.clientX - box.left - MARGIN.left) / (right - MARGIN.left);
        return Math.round(first + Math.min(1, Math.max(0, part)) * span);
      };
      svg.addEventListener("pointermove", (event) => point(stepAt(event)));
      svg.addEventListener("pointerdown", (event) => point(stepAt(event)));
      svg.addEventListener("pointerleave", () => point(null));
      svg.addEventListener("blur", () => point(null));
      svg.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (move === undefined) return;
        event.preventDefault();
        const steps = data.steps;
        if (!steps.length) return;
        const from = current === null ? steps.length - 1 : nearest(steps, current);
        point(steps[Math.min(steps.length - 1, Math.max(0, from + (current === null ? 0 : move)))]);
      });
      const focused = this.plot.firstChild !== null && this.plot.firstChild === document.activeElement;
      this.plot.replaceChildren(svg);
      if (focused) svg.focus();
      this.read(current);
    }

    // Show the values at a step; null: the last ones, without a cursor.
    read(step) {
      if (this.empty || !this.cursor) return;
      const show = step === null ? "hidden" : "visible";
      this.cursor.setAttribute("visibility", show);
      this.badge.setAttribute("visibility", show);
      this.spec.series.forEach(({ steps, values }, i) => {
        const at = steps.length === 0 ? -1 : step === null ? steps.length - 1 : nearest(steps, step);
        const value = at < 0 ? null : values[at];
        this.readouts[i].textContent = figure(value);
        const visible = step !== null && value !== null;
        this.dots[i].setAttribute("visibility", visible ? "visible" : "hidden");
        if (!visible) return;
        this.dots[i].setAttribute("cx", this.x(steps[at]));
        this.dots[i].setAttribute("cy", this.y(value));
      });
      if (step === null) return;
      const at = this.x(step);
      const [first, last] = data.range;
      const late = step - first > (last - first) * 0.8;
      this.cursor.setAttribute("x1", at);
      this.cursor.setAttribute("x2", at);
      this.badge.setAttribute("x", at + (late ? -6 : 6));
      this.badge.setAttribute("text-anchor", late ? "end" : "start");
      this.badge.textContent = `step ${step}`;
    }
  }

  let current = null;
  const point = (step) => {
    current = step;
    for (const chart of charts) chart.read(step);
  };
  const charts = [];
  for (const spec of data.charts) charts.push(new Chart(document.getElementById(spec.id), spec));
  document.documentElement.dataset.ready = "true";
})();
