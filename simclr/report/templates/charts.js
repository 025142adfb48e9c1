// Curves on canvases that share their axis, their zoom and their cursor. `charts(root, data, options)` fills `root`.
const unpack = (text, kind) => {
  const bytes = atob(text), buffer = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) buffer[i] = bytes.charCodeAt(i);
  return new kind(buffer.buffer);
};
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
};
const colourOf = (() => {  // a colour of the style sheet as it stands in this theme
  const probe = make("i", { hidden: true });
  return (name) => {
    if (name.startsWith("#")) return name;
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
})();
const below = (values, x) => {  // how many are less than x
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1; else high = middle;
  }
  return low;
};
const numberText = (value) => value < 0 ? `\u2212${numberText(-value)}` : plainText(value);
const plainText = (value) => {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e15 || size < 1e-4) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
};
const tickText = (value, step) => {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (step > 0 && step < 1e-4) return value === 0 ? "0" : value.toExponential(0);
  return value.toFixed(Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))));
};
const niceStep = (span, count) => {
  const rough = span / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  return power * ([1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) ?? 10);
};

const MANY = 12;  // curves from which on lines are thin and a single one is lifted out

const charts = (root, data, { change = () => {}, smoothing = false, height = 250 } = {}) => {
  const arrays = data.arrays.map((text) => unpack(text, Float32Array));
  const labels = { epochs: "epoch", steps: "step", images: "images seen", minutes: "minutes" };
  const state = { axis: data.axes[0], from: null, to: null, smooth: 0 };
  const hidden = new Set();  // rows
  let cursor = null, dragged = null, nearestRow = null, due = false, colours = {}, whole = [0, 1], version = 0;
  const panels = [];

  const tools = make("div", { class: "tools" });
  const axis = make("select", { "aria-label": "horizontal axis" });
  for (const name of data.axes) axis.append(make("option", { value: name, text: `by ${name === "minutes" ? "time" : name}` }));
  const reset = make("button", { type: "button", text: "Whole range", hidden: true });
  const smooth = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "aria-label": "smoothing" });
  const hint = make("span", { class: "hint mouse", text: "Drag to zoom, double-click for all. Keys: arrows, + and \u2212, 0." });
  const touch = make("span", { class: "hint touch", text: "Pinch to zoom." });
  if (data.axes.length > 1) tools.append(axis);
  if (smoothing) tools.append(make("label", { class: "slider" }, "smoothing", smooth));
  tools.append(reset, hint, touch);
  const grid = make("div", { class: "panels" });
  const missing = make("p", { class: "caption", hidden: true });
  const spoken = make("p", { class: "spoken", "aria-live": "polite" });
  root.append(tools, grid, missing, spoken);

  const minutesOf = (run, epochs) => {
    const [at, minutes] = run.clock.map((i) => arrays[i]);
    return Float32Array.from(epochs, (epoch) => {
      const i = Math.max(1, Math.min(at.length - 1, below(at, epoch)));
      const share = (epoch - at[i - 1]) / (at[i] - at[i - 1] || 1);
      return minutes[i - 1] + share * (minutes[i] - minutes[i - 1]);
    });
  };
  const timesOf = (series) => {
    const run = data.runs[series.run], epochs = arrays[series.x];
    if (state.axis === "epochs") return epochs;
    if (state.axis === "minutes") return run.clock ? minutesOf(run, epochs) : null;
    const per = run[state.axis];
    return per ? Float32Array.from(epochs, (epoch) => epoch * per) : null;
  };
  const smoothed = (values) => {
    if (!state.smooth || values.length < 3) return values;
    let mean = 0, weight = 0;  // without a bias towards the zero that it begins with
    return Float32Array.from(values, (value) => {
      mean = state.smooth * mean + (1 - state.smooth) * value;
      weight = state.smooth * weight + 1 - state.smooth;
      return mean / weight;
    });
  };
  const settle = () => {  // what does not change while one zooms
    let start = Infinity, end = 0;
    const without = new Set();
    for (const panel of panels) for (const series of panel.series) {
      series.times = timesOf(series);
      series.values = smoothed(arrays[series.y]);
      if (!series.times) { without.add(data.runs[series.run].name); continue; }
      end = Math.max(end, series.times[series.times.length - 1]);
      start = Math.min(start, series.times[0]);
    }
    whole = [0, end || 1];
    missing.hidden = !without.size;
    missing.textContent = `Not recorded against ${labels[state.axis]}: ${[...without].join(", ")}.`;
    axis.value = state.axis;
    smooth.value = state.smooth;
  };
  const range = () => state.from === null ? whole : [state.from, state.to];
  const visible = (series) => series.times && !hidden.has(series.row);

  for (const spec of data.panels) {
    const canvas = make("canvas", { tabindex: 0, role: "img" });
    const readout = make("div", { class: "readout", hidden: true, "aria-hidden": "true" });
    const panel = { ...spec, canvas, readout, layer: document.createElement("canvas"), series: spec.series.map((series) => ({ ...series })), shown: true };
    const legend = make("p", { class: "legend" });
    if (data.legend) for (const series of panel.series) {
      const values = arrays[series.y];
      const mark = make("i", { class: series.faint ? "swatch faint" : "swatch" });
      mark.style.setProperty("--colour", series.colour.startsWith("#") ? series.colour : `var(--${series.colour})`);
      const end = series.faint ? "" : ` ${numberText(values[values.length - 1])}`;
      legend.append(make("span", {}, mark, series.name, make("b", { text: end })));
    }
    const about = panel.series.slice(0, 6).map((series) => {
      const values = arrays[series.y];
      return `${series.name} from ${numberText(values[0])} to ${numberText(values[values.length - 1])}`;
    });
    canvas.setAttribute("aria-label", `${spec.title}: ${about.join("; ")}`);
    const box = make("div", { class: "plot" }, canvas, readout);
    box.style.setProperty("--height", `${height}px`);
    grid.append(make("figure", { class: "panel" }, make("figcaption", { text: spec.title }), legend, box));
    panels.push(panel);
    listen(panel);
  }

  const sized = (canvas, width, tall) => {  // its brush, over nothing
    const ratio = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(tall * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(tall * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, tall);
    return pen;
  };
  const drawCurves = (panel, width, tall) => {  // all that stays while the cursor moves
    const pen = sized(panel.layer, width, tall);
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const [from, to] = range();
    let low = Infinity, high = -Infinity;
    for (const series of panel.series) {
      if (!visible(series)) continue;
      const { times, values } = series;
      const first = Math.max(0, below(times, from) - 1), last = Math.min(times.length - 1, below(times, to));
      series.first = first;
      series.last = last;
      for (let i = first; i <= last; i++) {
        const value = values[i];
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    if (low > high) [low, high] = [0, 1];
    if (state.from === null) {
      for (const level of panel.levels) {
        if (level.value > high && level.value < high + 0.6 * (high - low)) high = level.value;
        if (level.value < low && (panel.zero || level.value > low - 0.6 * (high - low))) low = level.value;
      }
      if (panel.zero) low = Math.min(0, low);
    }
    if (high === low) { high += Math.abs(high) / 10 || 1; low -= Math.abs(low) / 10 || 0; }
    high += 0.06 * (high - low);
    const step = niceStep(high - low, tall / 48);
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high; tick += step) ticks.push(Math.abs(tick) < step / 1e6 ? 0 : tick);
    const left = 10 + Math.max(...ticks.map((tick) => pen.measureText(tickText(tick, step)).width), 12), right = width - 8;
    const top = 8, bottom = tall - 24;
    const x = (time) => left + (time - from) / (to - from || 1) * (right - left);
    const y = (value) => bottom - (value - low) / (high - low) * (bottom - top);
    panel.frame = { left, right, top, bottom, x, y, from, to };

    pen.lineWidth = 1;
    pen.strokeStyle = colours.grid;
    pen.fillStyle = colours.muted;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const tick of ticks) {
      const at = Math.round(y(tick)) + 0.5;
      pen.beginPath(); pen.moveTo(left, at); pen.lineTo(right, at); pen.stroke();
      pen.fillText(tickText(tick, step).replace("-", "\u2212"), left - 6, at);
    }
    pen.textAlign = "center";
    pen.textBaseline = "alphabetic";
    const across = niceStep(to - from, (right - left) / 62), whole = state.axis !== "minutes";
    const every = whole && to - from > 2 ? Math.max(1, across) : across;
    let end = -Infinity;
    for (let tick = Math.ceil(from / every - 1e-9) * every; tick <= to * (1 + 1e-9); tick += every) {
      const text = tickText(tick, every), half = pen.measureText(text).width / 2;
      const at = Math.min(x(tick), width - half);
      if (at - half < end + 8) continue;
      pen.fillText(text, at, tall - 7);
      end = at + half;
    }

    pen.save();
    pen.beginPath(); pen.rect(left, top - 4, right - left + 6, bottom - top + 8); pen.clip();
    for (const level of panel.levels) {
      if (level.value < low || level.value > high) continue;
      pen.setLineDash([3, 3]);
      pen.strokeStyle = colours.muted;
      pen.beginPath(); pen.moveTo(left, y(level.value)); pen.lineTo(right, y(level.value)); pen.stroke();
      pen.setLineDash([]);
      pen.textAlign = "right";
      pen.fillText(level.name, right - 2, y(level.value) + (y(level.value) < top + 18 ? 14 : -5));
    }
    pen.lineJoin = "round";
    for (const series of panel.series) {
      if (!visible(series)) continue;
      pen.strokeStyle = pen.fillStyle = colours[series.colour] ??= colourOf(series.colour);
      pen.globalAlpha = series.faint ? 0.35 : 1;
      // Lines of one pixel are drawn ten times as fast as wider ones.
      pen.lineWidth = series.faint || panel.series.length > MANY ? 1 : 2;
      trace(pen, series, x, y, panel.series.length > MANY ? 3 : 1);
    }
    pen.restore();
  };
  const draw = (panel) => {
    const { canvas } = panel, width = canvas.clientWidth, tall = canvas.clientHeight;
    if (!width) return;
    const seen = `${version} ${width} ${tall} ${window.devicePixelRatio}`;
    if (panel.seen !== seen) drawCurves(panel, width, tall);
    panel.seen = seen;
    const pen = sized(canvas, width, tall), { left, right, top, bottom, x, y, from, to } = panel.frame;
    pen.drawImage(panel.layer, 0, 0, width, tall);
    pen.save();
    pen.beginPath(); pen.rect(left, top - 4, right - left + 6, bottom - top + 8); pen.clip();
    if (nearestRow !== null) {
      pen.fillStyle = colours.paper;
      pen.globalAlpha = 0.6;
      pen.fillRect(left, 0, right - left + 6, bottom);
      pen.globalAlpha = 1;
      pen.lineJoin = "round";
      pen.lineWidth = 2;
      for (const series of panel.series) if (series.row === nearestRow && visible(series)) {
        pen.strokeStyle = pen.fillStyle = colours[series.colour];
        trace(pen, series, x, y, 1);
      }
    }
    if (cursor !== null && cursor >= from && cursor <= to) {
      pen.strokeStyle = colours.muted;
      pen.lineWidth = 1;
      pen.beginPath(); pen.moveTo(Math.round(x(cursor)) + 0.5, top); pen.lineTo(Math.round(x(cursor)) + 0.5, bottom); pen.stroke();
      if (panel.series.length <= MANY) for (const series of panel.series) {
        if (!visible(series) || series.faint) continue;
        const at = nearestPoint(series, cursor);
        if (Math.abs(x(series.times[at]) - x(cursor)) > 40 && series.times.length > 1) continue;
        pen.fillStyle = colours[series.colour];
        pen.beginPath(); pen.arc(x(series.times[at]), y(series.values[at]), 4, 0, 7); pen.fill();
        pen.strokeStyle = colours.paper; pen.lineWidth = 1.5; pen.stroke();
      }
    }
    if (dragged && Math.abs(dragged.to - dragged.from) > 0) {
      pen.fillStyle = colours.accent;
      pen.globalAlpha = 0.14;
      pen.fillRect(x(dragged.from), top, x(dragged.to) - x(dragged.from), bottom - top);
      pen.globalAlpha = 1;
    }
    pen.restore();
  };
  const trace = (pen, { times, values, first, last, faint }, x, y, wide) => {
    const columns = (x(times[last]) - x(times[first])) / wide;
    pen.beginPath();
    if (last - first > 2.5 * columns) {  // of more points than columns the highest and the lowest of each column
      let column = null, low = 0, high = 0;
      for (let i = first; i <= last; i++) {
        const at = wide * Math.round(x(times[i]) / wide);
        if (at !== column) {
          if (column !== null) { pen.lineTo(column, y(low)); pen.lineTo(column, y(high)); }
          column = at; low = high = values[i];
        } else if (values[i] < low) low = values[i]; else if (values[i] > high) high = values[i];
      }
      pen.lineTo(column, y(low)); pen.lineTo(column, y(high));
    } else for (let i = first; i <= last; i++) pen.lineTo(x(times[i]), y(values[i]));
    pen.stroke();
    if (last - first < 25 && !faint) for (let i = first; i <= last; i++) {
      pen.beginPath(); pen.arc(x(times[i]), y(values[i]), times.length === 1 ? 4 : 2.6, 0, 7); pen.fill();
    }
  };
  const nearestPoint = ({ times }, time) => {
    const i = below(times, time);
    return i > 0 && (i === times.length || time - times[i - 1] <= times[i] - time) ? i - 1 : i;
  };

  const redraw = () => { version++; refresh(); };  // all of it
  const refresh = () => {  // the cursor alone
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      for (const panel of panels) if (panel.shown) { draw(panel); api.drawn++; }
    });
  };
  const paint = () => {
    colours = Object.fromEntries(["ink", "muted", "grid", "paper", "accent", "wrong"].map((name) => [name, colourOf(name)]));
    redraw();
  };
  const zoom = (from, to) => {
    [from, to] = [Math.max(whole[0], Math.min(from, to)), Math.min(whole[1], Math.max(from, to))];
    const all = to - from > 0.999 * (whole[1] - whole[0]);
    if (!all && to - from < 1e-5 * whole[1]) return;
    [state.from, state.to] = all ? [null, null] : [from, to];
    reset.hidden = all;
    redraw();
    change(state);
  };
  const zoomBy = (factor, at) => {
    const [from, to] = range();
    zoom(at - (at - from) * factor, at + (to - at) * factor);
  };
  const shift = (by) => {
    const [from, to] = range(), far = Math.max(whole[0] - from, Math.min(whole[1] - to, by * (to - from)));
    zoom(from + far, to + far);
  };

  const tell = (panel, atY) => {  // what the curves say at the cursor
    const found = [];
    for (const series of panel.series) {
      if (!visible(series)) continue;
      const at = nearestPoint(series, cursor), { x, y } = panel.frame;
      if (Math.abs(x(series.times[at]) - x(cursor)) > 40 && series.times.length > 1) continue;
      found.push({ series, at, far: Math.abs(y(series.values[at]) - (atY ?? 0)), value: series.values[at] });
    }
    const most = 8, many = found.length > most;
    if (many) found.sort((a, b) => a.far - b.far).length = most;
    found.sort((a, b) => b.value - a.value);
    nearestRow = data.legend || atY === null || !found.length ? null : found.reduce((a, b) => b.far < a.far ? b : a).series.row;
    const unit = labels[state.axis];
    const where = state.axis === "epochs" || state.axis === "minutes" ? numberText(cursor) : numberText(Math.round(cursor));
    const rows = found.map(({ series, value }) => {
      const mark = make("i", { class: "swatch" });
      mark.style.setProperty("--colour", colours[series.colour] ?? colourOf(series.colour));
      const line = make("div", series.row === nearestRow && !data.legend ? { class: "near" } : {}, mark, make("span", { text: series.name }));
      line.append(make("b", { text: numberText(value) }));
      return line;
    });
    panel.readout.replaceChildren(make("div", { class: "where", text: `${unit} ${where}${many ? ", the nearest" : ""}` }), ...rows);
    return `${unit} ${where}: ${found.map(({ series, value }) => `${series.name} ${numberText(value)}`).join(", ")}`;
  };
  const place = (panel) => {
    const { readout, frame, canvas } = panel;
    readout.hidden = false;
    const at = frame.x(cursor), wide = readout.offsetWidth;
    readout.style.left = `${at + 14 + wide > canvas.clientWidth ? Math.max(0, at - 14 - wide) : at + 14}px`;
  };
  const look = (panel, time, atY) => {
    cursor = Math.max(panel.frame.from, Math.min(panel.frame.to, time));
    for (const other of panels) other.readout.hidden = true;
    const said = tell(panel, atY);
    place(panel);
    refresh();
    return said;
  };
  const leave = (panel) => {
    cursor = nearestRow = null;
    panel.readout.hidden = true;
    refresh();
  };

  function listen(panel) {
    const { canvas } = panel, fingers = new Map();
    const timeAt = (event) => {
      const { left, right, from, to } = panel.frame;
      const at = event.clientX - canvas.getBoundingClientRect().left;
      return from + Math.max(0, Math.min(1, (at - left) / (right - left))) * (to - from);
    };
    const yAt = (event) => event.clientY - canvas.getBoundingClientRect().top;
    let pinch = null;
    canvas.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, event);
      if (event.pointerType === "mouse" && event.button === 0) {
        canvas.setPointerCapture(event.pointerId);
        dragged = { from: timeAt(event), to: timeAt(event) };
      } else if (fingers.size === 2) {
        const [a, b] = [...fingers.values()].map(timeAt);
        pinch = { times: [a, b], gap: Math.abs(b - a) || 1, range: range() };
      }
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!panel.frame) return;
      if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
      if (pinch && fingers.size === 2) {
        const { left, right } = panel.frame, [a, b] = [...fingers.values()].map((finger) => finger.clientX);
        const factor = pinch.gap / (Math.abs(b - a) / (right - left) * (pinch.range[1] - pinch.range[0]) || 1);
        const middle = (pinch.times[0] + pinch.times[1]) / 2;
        zoom(middle - (middle - pinch.range[0]) * factor, middle + (pinch.range[1] - middle) * factor);
        return;
      }
      if (dragged) dragged.to = timeAt(event);
      look(panel, timeAt(event), yAt(event));
    });
    const release = (event) => {
      fingers.delete(event.pointerId);
      pinch = fingers.size === 2 ? pinch : null;
      if (!dragged) return;
      const { from, to } = dragged;
      dragged = null;
      if (Math.abs(panel.frame.x(from) - panel.frame.x(to)) > 6) zoom(from, to); else refresh();
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") fingers.clear();
      if (!dragged && document.activeElement !== canvas) leave(panel);
    });
    canvas.addEventListener("blur", () => leave(panel));
    canvas.addEventListener("dblclick", () => zoom(...whole));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;  // the page scrolls
      event.preventDefault();
      zoomBy(Math.exp(event.deltaY / 300), timeAt(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const [from, to] = range(), at = cursor ?? (from + to) / 2;
      const keys = {
        ArrowLeft: () => event.shiftKey ? shift(-0.2) : look(panel, at - (to - from) / 50, null),
        ArrowRight: () => event.shiftKey ? shift(0.2) : look(panel, at + (to - from) / 50, null),
        Home: () => look(panel, from, null), End: () => look(panel, to, null),
        "+": () => zoomBy(0.7, at), "=": () => zoomBy(0.7, at), "-": () => zoomBy(1 / 0.7, at), "_": () => zoomBy(1 / 0.7, at),
        0: () => zoom(...whole), Escape: () => zoom(...whole),
      };
      if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const said = keys[event.key]();
      if (said) spoken.textContent = said;
    });
  }

  const setAxis = (name) => {
    if (!data.axes.includes(name)) return;
    const [from, to] = range(), share = [from / whole[1], to / whole[1]], zoomed = state.from !== null;
    state.axis = name;
    cursor = null;
    settle();
    if (zoomed) zoom(share[0] * whole[1], share[1] * whole[1]);
    redraw();
    change(state);
  };
  axis.addEventListener("change", () => setAxis(axis.value));
  const setSmooth = (value) => {
    if (!(value >= 0 && value < 1)) return;
    state.smooth = value;
    settle();
    redraw();
    change(state);
  };
  smooth.addEventListener("input", () => setSmooth(Number(smooth.value)));
  reset.addEventListener("click", () => zoom(...whole));
  const api = { state, zoom, setAxis, setSmooth, redraw, panels, range, drawn: 0, hide: (rows) => {
    hidden.clear();
    rows.forEach((row) => hidden.add(Number(row)));
    redraw();
  } };
  root.charts = api;
  settle();
  new ResizeObserver(refresh).observe(grid);
  const watched = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) panels.find(({ canvas }) => canvas === target).shown = isIntersecting;
    refresh();
  }, { rootMargin: "200px" });
  panels.forEach(({ canvas }) => watched.observe(canvas));
  document.addEventListener("themechange", paint);
  window.addEventListener("beforeprint", () => panels.forEach(draw));
  paint();
  return api;
};
