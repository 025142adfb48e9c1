// Rows of the table as points: a setting against a figure, each of which can be chosen.
const scatter = (root, data, change) => {
  const x = make("select", { "aria-label": "setting, horizontal" }), y = make("select", { "aria-label": "figure, vertical" });
  data.settings.forEach((name) => x.append(make("option", { value: name, text: name })));
  Object.entries(data.figures).forEach(([name, title]) => y.append(make("option", { value: name, text: title })));
  const canvas = make("canvas", { tabindex: 0, role: "img" }), readout = make("div", { class: "readout", hidden: true });
  const spoken = make("p", { class: "spoken", "aria-live": "polite" });
  const box = make("div", { class: "plot" }, canvas, readout);
  box.style.setProperty("--height", "320px");
  root.append(make("div", { class: "tools" }, make("label", {}, y), make("span", { class: "hint", text: "against" }), make("label", {}, x)), box, spoken);
  const isNumber = (value) => typeof value === "number";
  const spread = data.settings.map((name) => new Set(data.rows.map((row) => row.settings[name])).size);
  x.value = data.settings[spread.indexOf(Math.max(...spread))];
  y.value = data.first;
  const hidden = new Set();
  let points = [], current = null, due = false;

  const draw = () => {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const muted = colourOf("muted"), grid = colourOf("grid"), ink = colourOf("ink");
    const rows = data.rows.map((row, number) => ({ row, number })).filter(({ row, number }) => !hidden.has(number) && row.figures[y.value]);
    const values = rows.map(({ row }) => row.settings[x.value]);
    const numeric = values.length > 0 && values.every(isNumber);
    // Of numbers a few stand below the axis, of words all that have room.
    const kinds = [...new Set(values)].sort((a, b) => isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
    const log = numeric && Math.min(...values) > 0 && Math.max(...values) >= 20 * Math.min(...values);
    const scaled = (value) => !numeric ? kinds.indexOf(value) : log ? Math.log10(value) : value;
    let [left, right] = [Math.min(...values.map(scaled)), Math.max(...values.map(scaled))];
    const room = (right - left) * 0.06 || 0.5;
    [left, right] = [left - room, right + room];
    let low = Math.min(...rows.map(({ row }) => row.figures[y.value].numbers[1])), high = Math.max(...rows.map(({ row }) => row.figures[y.value].numbers[2]));
    if (!(high > low)) { low = (Number.isFinite(low) ? low : 0) - 1; high = low + 2; }
    const air = 0.08 * (high - low);
    [low, high] = [low - air, high + air];
    const step = niceStep(high - low, height / 52), top = 8, bottom = height - 30, start = 52, end = width - 12;
    const atX = (value) => start + (scaled(value) - left) / (right - left) * (end - start), atY = (value) => bottom - (value - low) / (high - low) * (bottom - top);
    pen.strokeStyle = grid; pen.fillStyle = muted; pen.textAlign = "right"; pen.textBaseline = "middle";
    for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) {
      pen.beginPath(); pen.moveTo(start, atY(tick)); pen.lineTo(end, atY(tick)); pen.stroke();
      pen.fillText(tickText(tick, step), start - 8, atY(tick));
    }
    pen.textAlign = "center";
    let free = -Infinity;
    for (const kind of kinds) {
      let text = isNumber(kind) ? String(Number(kind.toPrecision(4))) : String(kind);
      if (text.length > 18) text = `${text.slice(0, 17)}\u2026`;
      const half = pen.measureText(text).width / 2, at = Math.max(half, Math.min(width - half, atX(kind)));
      if (at - half < free + 10) continue;
      pen.fillText(text, at, height - 12);
      free = at + half;
    }
    points = rows.map(({ row, number }) => ({ row, number, x: atX(row.settings[x.value]), y: atY(row.figures[y.value].numbers[0]), low: atY(row.figures[y.value].numbers[1]), high: atY(row.figures[y.value].numbers[2]) }));
    points.forEach((point, i) => {
      pen.strokeStyle = pen.fillStyle = point.row.colour;
      pen.lineWidth = 1.5;
      pen.globalAlpha = 0.6;
      pen.beginPath(); pen.moveTo(point.x, point.low); pen.lineTo(point.x, point.high); pen.stroke();
      pen.globalAlpha = 1;
      pen.beginPath(); pen.arc(point.x, point.y, i === current ? 8 : 5.5, 0, 7); pen.fill();
      if (i === current) { pen.strokeStyle = ink; pen.lineWidth = 2; pen.stroke(); }
    });
    canvas.setAttribute("aria-label", `${data.figures[y.value]} against ${x.value}: ${points.map(({ row }) => `${row.name} ${row.settings[x.value]}, ${row.figures[y.value].text}`).join("; ")}`);
  };
  const redraw = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; draw(); });
  };
  const look = (i) => {
    current = i;
    readout.hidden = i === null;
    redraw();
    if (i === null) return;
    const { row, x: at, y: down } = points[i];
    readout.replaceChildren(make("div", {}, make("b", { text: row.name })), make("div", { text: row.figures[y.value].text }), make("div", { class: "where", text: `${x.value} ${row.settings[x.value]}` }));
    readout.querySelector("b").style.marginLeft = 0;
    const wide = readout.offsetWidth;
    readout.style.left = `${at + 14 + wide > canvas.clientWidth ? Math.max(0, at - 14 - wide) : at + 14}px`;
    readout.style.top = `${Math.max(0, down - 30)}px`;
    spoken.textContent = `${row.name}: ${x.value} ${row.settings[x.value]}, ${row.figures[y.value].text}`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), from = [event.clientX - box.left, event.clientY - box.top];
    let best = null, least = 30;
    points.forEach((point, i) => {
      const far = Math.hypot(point.x - from[0], point.y - from[1]);
      if (far < least) [best, least] = [i, far];
    });
    if (best !== current) look(best);
  });
  canvas.addEventListener("pointerleave", () => look(null));
  canvas.addEventListener("blur", () => look(null));
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || !points.length) return;
    event.preventDefault();
    const order = points.map((_, i) => i).sort((a, b) => points[a].x - points[b].x), at = order.indexOf(current);
    look(order[at < 0 ? 0 : (at + by + order.length) % order.length]);
  });
  const chosen = () => { look(null); change(x.value, y.value); redraw(); };
  x.addEventListener("change", chosen);
  y.addEventListener("change", chosen);
  new ResizeObserver(redraw).observe(canvas);
  document.addEventListener("themechange", redraw);
  window.addEventListener("beforeprint", draw);
  const api = {
    hide: (rows) => { hidden.clear(); rows.forEach((row) => hidden.add(Number(row))); look(null); },
    set: (setting, figure) => {
      if (data.settings.includes(setting)) x.value = setting;
      if (figure in data.figures) y.value = figure;
      redraw();
    },
    points: () => points,
  };
  root.scatter = api;
  return api;
};
